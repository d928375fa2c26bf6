// Percent-escapes of a query's value (RFC 3986, section 2.1).
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace nbdferry::proxy {

[[nodiscard]] std::string uri_escape(std::string_view text);
// Nothing: a '%' is not followed by two hexadecimal digits.
[[nodiscard]] std::optional<std::string> uri_unescape(std::string_view text);

}  // namespace nbdferry::proxy
