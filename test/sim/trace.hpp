// The record of a history: what went into the core and what came out, one line each; and the way to
// end a history that went wrong.
#pragma once

#include <deque>
#include <stdexcept>
#include <string>

#include <fmt/format.h>

#include "mirror/events.hpp"

namespace nbdferry::sim {

// A checker found the core at fault.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Failure(fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void require(bool condition, fmt::format_string<Args...> format, Args&&... args) {
  if (!condition) fail(format, std::forward<Args>(args)...);
}

class Trace {
 public:
  enum class Level { off, tail, live };
  explicit Trace(Level level) : level_(level) {}

  [[nodiscard]] bool on() const { return level_ != Level::off; }
  template <typename... Args>
  void line(fmt::format_string<Args...> format, Args&&... args) {
    if (on()) add(fmt::format(format, std::forward<Args>(args)...));
  }
  void print_tail() const;

 private:
  void add(std::string line);

  static constexpr std::size_t lines_max = 80;
  Level level_;
  std::deque<std::string> lines_;
};

[[nodiscard]] std::string describe(const mirror::Event& event);
[[nodiscard]] std::string describe(const mirror::Action& action);
[[nodiscard]] std::string describe(const mirror::DiskOp& op);
[[nodiscard]] std::string describe(ByteRange range);

}  // namespace nbdferry::sim

// So that a description costs nothing unless it is printed.
template <>
struct fmt::formatter<nbdferry::mirror::DiskOp> : fmt::formatter<std::string> {
  auto format(const nbdferry::mirror::DiskOp& op, format_context& context) const {
    return formatter<std::string>::format(nbdferry::sim::describe(op), context);
  }
};
template <>
struct fmt::formatter<nbdferry::ByteRange> : fmt::formatter<std::string> {
  auto format(nbdferry::ByteRange range, format_context& context) const {
    return formatter<std::string>::format(nbdferry::sim::describe(range), context);
  }
};
