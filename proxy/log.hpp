// Log lines: one line to standard error, `nbdferry: …`.
#pragma once

#include <string_view>
#include <utility>

#include <fmt/format.h>

namespace nbdferry::proxy {

[[nodiscard]] inline bool is_control(char c) {
  return static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
}

// Control characters are replaced, so that nothing a peer sends can forge a line.
void log_line(std::string_view text);

template <typename... Args>
void log(fmt::format_string<Args...> format, Args&&... args) {
  log_line(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace nbdferry::proxy
