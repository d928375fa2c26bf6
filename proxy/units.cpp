// Parsing is exact and strict: what is not understood is refused, never guessed at.
#include "proxy/units.hpp"

#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <system_error>
#include <utility>

#include <fmt/format.h>

namespace nbdferry::proxy {
namespace {

struct NumberAndUnit {
  std::uint64_t number;
  std::string_view unit;
};

std::optional<NumberAndUnit> split(std::string_view text) {
  std::uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc{}) return std::nullopt;
  return NumberAndUnit{number, {rest, static_cast<std::size_t>(end - rest)}};
}

std::optional<std::uint64_t> multiply(std::uint64_t a, std::uint64_t b, std::uint64_t max) {
  if (b != 0 && a > max / b) return std::nullopt;
  return a * b;
}

}  // namespace

std::optional<std::uint64_t> parse_size(std::string_view text) {
  const auto parts = split(text);
  if (!parts) return std::nullopt;
  if (parts->unit.empty()) return parts->number;
  if (parts->unit.size() != 1) return std::nullopt;
  constexpr std::string_view units = "KMGT";
  const auto power = units.find(parts->unit.front());
  if (power == std::string_view::npos) return std::nullopt;
  return multiply(parts->number, std::uint64_t{1} << (10 * (power + 1)),
                  std::numeric_limits<std::uint64_t>::max());
}

std::optional<Duration> parse_time(std::string_view text) {
  constexpr std::array<std::pair<std::string_view, std::uint64_t>, 3> units{
      {{"ms", 1'000'000}, {"s", 1'000'000'000}, {"min", 60'000'000'000}}};
  const auto parts = split(text);
  if (!parts) return std::nullopt;
  if (parts->unit.empty() && parts->number == 0) return Duration{0};
  for (const auto& [name, nanoseconds] : units) {
    if (parts->unit != name) continue;
    const auto product =
        multiply(parts->number, nanoseconds, static_cast<std::uint64_t>(Duration::max().count()));
    if (!product) return std::nullopt;
    return Duration{static_cast<Duration::rep>(*product)};
  }
  return std::nullopt;
}

std::string format_size(double bytes) {
  constexpr std::array<const char*, 6> units{"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  std::size_t unit = 0;
  // From 999.5 on three digits would be shown as four: the next unit says it better.
  while (bytes >= 999.5 && unit + 1 < units.size()) {
    bytes /= 1024;
    ++unit;
  }
  const bool whole = unit == 0 || bytes >= 99.95;
  return fmt::format("{:.{}f} {}", bytes, whole ? 0 : 1, units.at(unit));
}

std::string format_rate(double bytes_per_second) { return format_size(bytes_per_second) + "/s"; }

std::string format_seconds(double seconds) {
  if (seconds < 9.95) return fmt::format("{:.1f} s", seconds);
  if (seconds < 59.5) return fmt::format("{:.0f} s", seconds);
  const auto total = static_cast<std::uint64_t>(std::llround(std::min(seconds, 1e9)));
  const auto hours = total / 3600;
  const auto minutes = total / 60 % 60;
  if (hours == 0) return fmt::format("{}:{:02} min", minutes, total % 60);
  return fmt::format("{}:{:02}:{:02} h", hours, minutes, total % 60);
}

}  // namespace nbdferry::proxy
