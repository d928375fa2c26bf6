// Sizes, rates and times as people write and read them.
//
// Sizes take K M G T, powers of 1024; rates the same, per second; times take ms, s, min. A bare
// number of bytes is a size; a bare number is not a time (but 0 is).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "mirror/types.hpp"

namespace nbdferry::proxy {

// Nothing: malformed, or more than the type can hold.
[[nodiscard]] std::optional<std::uint64_t> parse_size(std::string_view text);
[[nodiscard]] std::optional<Duration> parse_time(std::string_view text);

[[nodiscard]] std::string format_size(double bytes);             // "1.5 GiB"
[[nodiscard]] std::string format_rate(double bytes_per_second);  // "112 MiB/s"
[[nodiscard]] std::string format_seconds(double seconds);        // "4.2 s", "3:05 min", "2:10:00 h"

}  // namespace nbdferry::proxy
