// Plain fields stand in tables, so that both directions read the same names.
#include "proxy/status_json.hpp"

#include <array>
#include <chrono>
#include <stdexcept>
#include <string_view>

#include <boost/json.hpp>
#include <fmt/format.h>

#include "proxy/verdict.hpp"

namespace nbdferry::proxy {
namespace {

namespace json = boost::json;

template <class Owner, class T>
struct Field {
  const char* name;
  T Owner::*member;
};

constexpr std::array<Field<mirror::Status, std::uint64_t>, 13> core_numbers{{
    {"size_bytes", &mirror::Status::size_bytes},
    {"stale_bytes", &mirror::Status::stale_bytes},
    {"buffered_bytes", &mirror::Status::buffered_bytes},
    {"copying_bytes", &mirror::Status::copying_bytes},
    {"copied_bytes", &mirror::Status::copied_bytes},
    {"zeroed_bytes", &mirror::Status::zeroed_bytes},
    {"mirrored_bytes", &mirror::Status::mirrored_bytes},
    {"suspects", &mirror::Status::suspect_bytes},
    {"unreadable_bytes", &mirror::Status::unreadable_bytes},
    {"resumed_bytes", &mirror::Status::resumed_bytes},
    {"verified_bytes", &mirror::Status::verified_bytes},
    {"mismatched_bytes", &mirror::Status::mismatched_bytes},
    {"held_requests", &mirror::Status::held_requests},
}};
constexpr std::array<Field<mirror::Status, bool>, 5> core_flags{{
    {"resumed", &mirror::Status::resumed},
    {"verifying", &mirror::Status::verifying},
    {"in_sync", &mirror::Status::in_sync},
    {"consistent", &mirror::Status::consistent},
    {"holding", &mirror::Status::holding},
}};
constexpr std::array<Field<ExportStatus, std::string>, 6> export_strings{{
    {"export", &ExportStatus::name},
    {"disk", &ExportStatus::disk},
    {"role", &ExportStatus::role},
    {"peer", &ExportStatus::peer},
    {"migration_id", &ExportStatus::migration_id},
    {"verdict", &ExportStatus::verdict},
}};
constexpr std::array<Field<ExportStatus, double>, 3> guest_rates{{
    {"write_iops", &ExportStatus::guest_write_iops},
    {"write_bytes_per_second", &ExportStatus::guest_write_bytes_per_second},
    {"read_iops", &ExportStatus::guest_read_iops},
}};

constexpr std::array serving_names{"source", "target", "nobody"};  // in the order of Serving

template <class Owner, class T, std::size_t N>
void write_fields(json::object& to, const std::array<Field<Owner, T>, N>& fields,
                  const Owner& from) {
  for (const auto& field : fields) to[field.name] = from.*field.member;
}

const json::value& at(const json::object& object, const char* name) {
  const json::value* const value = object.if_contains(name);
  if (value == nullptr) throw std::invalid_argument(fmt::format("{} is missing", name));
  return *value;
}

template <class T>
T read(const json::object& object, const char* name) {
  auto result = json::try_value_to<T>(at(object, name));
  if (!result) throw std::invalid_argument(fmt::format("{} is not what it should be", name));
  return *std::move(result);
}

template <class Owner, class T, std::size_t N>
void read_fields(const json::object& from, const std::array<Field<Owner, T>, N>& fields,
                 Owner& to) {
  for (const auto& field : fields) to.*field.member = read<T>(from, field.name);
}

// The enumerator whose name it is; enumerators are numbered from zero to `last`.
template <class Enum, class NameOf>
Enum read_enum(const json::object& object, const char* name, Enum last, NameOf name_of) {
  const auto text = read<std::string>(object, name);
  for (int i = 0; i <= static_cast<int>(last); ++i) {
    const auto candidate = static_cast<Enum>(i);
    if (std::string_view(name_of(candidate)) == text) return candidate;
  }
  throw std::invalid_argument(fmt::format("{} is {}, which is unknown", name, text));
}

const char* serving_name(mirror::Serving serving) {
  return serving_names.at(static_cast<std::size_t>(serving));
}

double seconds_of(Duration time) { return std::chrono::duration<double>(time).count(); }

Duration from_seconds(double seconds) {
  return std::chrono::round<Duration>(std::chrono::duration<double>(seconds));
}

// Empty strings mean "none": JSON says null.
json::value or_null(const std::string& text) {
  return text.empty() ? json::value(nullptr) : json::value(text);
}

std::string read_or_empty(const json::object& object, const char* name) {
  return at(object, name).is_null() ? std::string() : read<std::string>(object, name);
}

json::object path_to_json(const PathStatus& path) {
  return {{"uri", path.uri},
          {"via", or_null(path.via)},
          {"state", path.state},
          {"connections", path.connections},
          {"sent_bytes", path.sent_bytes},
          {"rtt_us", path.rtt_us}};
}

PathStatus path_from_json(const json::object& object) {
  return {read<std::string>(object, "uri"),          read_or_empty(object, "via"),
          read<std::string>(object, "state"),        read<unsigned>(object, "connections"),
          read<std::uint64_t>(object, "sent_bytes"), read<std::uint64_t>(object, "rtt_us")};
}

}  // namespace

json::object status_to_json(const ExportStatus& status) {
  const mirror::Status& core = status.core;
  json::object o;
  write_fields(o, export_strings, status);
  o["phase"] = to_string(core.phase);
  o["mode"] = to_string(core.mode);
  o["mode_wanted"] = to_string(core.mode_wanted);
  o["mode_reason"] = core.mode_reason;
  o["serving"] = serving_name(core.serving);
  write_fields(o, core_numbers, core);
  o["debt_bytes"] = debt_bytes(core);
  write_fields(o, core_flags, core);
  o["bytes_per_second"] = core.bytes_per_second;
  o["bandwidth_bytes_per_second"] = status.bandwidth;
  o["new_bytes_per_second"] = core.new_bytes_per_second;
  o["target_silent_seconds"] = seconds_of(core.target_silent);
  o["quarantine_seconds"] = seconds_of(core.quarantine_left);
  o["eta_seconds"] = status.eta_seconds ? json::value(*status.eta_seconds) : json::value(nullptr);
  o["deadline_seconds"] =
      core.deadline_left ? json::value(seconds_of(*core.deadline_left)) : json::value(nullptr);
  o["needed_bytes_per_second"] = core.needed_bytes_per_second;
  json::array paths;
  for (const PathStatus& path : status.paths) paths.emplace_back(path_to_json(path));
  o["paths"] = std::move(paths);
  json::object guest;
  write_fields(guest, guest_rates, status);
  guest["delay_us"] = status.guest_delay_us;
  guest["connections"] = status.guest_connections;
  o["guest"] = std::move(guest);
  o["last_error"] = or_null(core.last_error);
  return o;
}

ExportStatus status_from_json(const json::object& o) {
  ExportStatus status;
  mirror::Status& core = status.core;
  read_fields(o, export_strings, status);
  core.phase =
      read_enum(o, "phase", mirror::Phase::cancelled, [](mirror::Phase p) { return to_string(p); });
  const auto mode_name = [](mirror::Mode m) { return to_string(m); };
  core.mode = read_enum(o, "mode", mirror::Mode::sync, mode_name);
  core.mode_wanted = read_enum(o, "mode_wanted", mirror::Mode::automatic, mode_name);
  core.mode_reason = read<std::string>(o, "mode_reason");
  core.serving = read_enum(o, "serving", mirror::Serving::nobody, serving_name);
  read_fields(o, core_numbers, core);
  read_fields(o, core_flags, core);
  core.bytes_per_second = read<double>(o, "bytes_per_second");
  status.bandwidth = read<std::uint64_t>(o, "bandwidth_bytes_per_second");
  core.new_bytes_per_second = read<double>(o, "new_bytes_per_second");
  core.target_silent = from_seconds(read<double>(o, "target_silent_seconds"));
  core.quarantine_left = from_seconds(read<double>(o, "quarantine_seconds"));
  if (!at(o, "eta_seconds").is_null()) status.eta_seconds = read<double>(o, "eta_seconds");
  if (!at(o, "deadline_seconds").is_null())
    core.deadline_left = from_seconds(read<double>(o, "deadline_seconds"));
  core.needed_bytes_per_second = read<double>(o, "needed_bytes_per_second");
  for (const json::value& path : read<json::array>(o, "paths")) {
    if (!path.is_object()) throw std::invalid_argument("paths holds something else");
    status.paths.push_back(path_from_json(path.get_object()));
  }
  const auto guest = read<json::object>(o, "guest");
  read_fields(guest, guest_rates, status);
  status.guest_delay_us = read<std::uint64_t>(guest, "delay_us");
  status.guest_connections = read<std::uint32_t>(guest, "connections");
  core.last_error = read_or_empty(o, "last_error");
  return status;
}

}  // namespace nbdferry::proxy
