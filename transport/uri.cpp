// NBD URIs: scheme://[host[:port]][/export][?socket=PATH]. Strict: what we don't understand is
// refused, since a parameter that is silently ignored could be the one that asks for encryption.
#include "transport/uri.hpp"

#include <algorithm>
#include <charconv>
#include <stdexcept>

#include <sys/un.h>

#include <boost/asio/ip/address.hpp>
#include <fmt/format.h>

#include "transport/target.hpp"

namespace nbdferry::transport {

namespace {

constexpr std::string_view default_port = "10809";
constexpr std::size_t export_name_max = 4096;  // NBD protocol, "String encoding"

[[noreturn]] void refuse(std::string_view uri, std::string_view why) {
  throw std::invalid_argument(fmt::format("{}: {}", uri, why));
}

constexpr std::string_view example = "use nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH";

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::string decoded(std::string_view uri, std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out.push_back(text[i]);
      continue;
    }
    const int high = i + 1 < text.size() ? hex_digit(text[i + 1]) : -1;
    const int low = i + 2 < text.size() ? hex_digit(text[i + 2]) : -1;
    if (high < 0 || low < 0) refuse(uri, "malformed URI: '%' must be followed by two hex digits");
    out.push_back(static_cast<char>(high * 16 + low));
    i += 2;
  }
  if (out.find('\0') != std::string::npos) refuse(uri, "malformed URI: it contains a NUL byte");
  return out;
}

// Cuts `text` at the first `mark`; what follows the mark is returned.
std::string_view split_off(std::string_view& text, char mark) {
  const auto at = text.find(mark);
  if (at == std::string_view::npos) return {};
  const auto rest = text.substr(at + 1);
  text = text.substr(0, at);
  return rest;
}

void parse_authority(std::string_view uri, std::string_view authority, Endpoint& out) {
  if (authority.find('@') != std::string_view::npos) {
    refuse(uri, "a user name needs TLS, which is not supported: leave it out");
  }
  std::string_view port;
  if (authority.starts_with('[')) {  // IPv6
    const auto end = authority.find(']');
    if (end == std::string_view::npos) refuse(uri, "malformed URI: '[' without ']'");
    port = authority.substr(end + 1);
    if (!port.empty() && port.front() != ':') refuse(uri, "malformed URI: text after ']'");
    if (!port.empty()) port.remove_prefix(1);
    out.host = authority.substr(1, end - 1);
  } else {
    if (std::count(authority.begin(), authority.end(), ':') > 1) {
      refuse(uri, "malformed URI: put an IPv6 address in brackets, as in nbd://[::1]:10809");
    }
    port = split_off(authority, ':');
    out.host = decoded(uri, authority);
  }
  if (out.host.empty()) out.host = "localhost";
  unsigned number = 0;
  if (port.empty()) port = default_port;
  const auto parsed = std::from_chars(port.data(), port.data() + port.size(), number);
  if (parsed.ec != std::errc{} || parsed.ptr != port.data() + port.size() || number == 0 ||
      number > 65535) {
    refuse(uri, fmt::format("malformed URI: '{}' is not a port: use 1 to 65535", port));
  }
  out.port = port;
}

// Only "socket" is known.
std::string parse_query(std::string_view uri, std::string_view query) {
  std::string socket_path;
  while (!query.empty()) {
    std::string_view name = query;
    query = split_off(name, '&');
    const auto value = split_off(name, '=');
    if (name != "socket") {
      refuse(uri, fmt::format("unknown parameter '{}': only 'socket' is supported", name));
    }
    socket_path = decoded(uri, value);
  }
  return socket_path;
}

}  // namespace

Endpoint parse_uri(std::string_view uri) {
  const auto scheme_end = uri.find("://");
  if (scheme_end == std::string_view::npos) {
    refuse(uri, fmt::format("not an NBD URI: {}", example));
  }
  const auto scheme = uri.substr(0, scheme_end);
  if (scheme.starts_with("nbds")) {
    refuse(uri, "TLS is not supported yet: use nbd:// or nbd+unix://");
  }
  if (scheme != "nbd" && scheme != "nbd+unix") {
    refuse(uri, fmt::format("unknown scheme '{}': {}", scheme, example));
  }

  Endpoint out;
  out.uri = uri;
  std::string_view rest = uri.substr(scheme_end + 3);
  const auto query = split_off(rest, '?');
  // The path's first slash only separates: "//name" is the export "/name".
  out.export_name = decoded(uri, split_off(rest, '/'));
  if (out.export_name.size() > export_name_max) refuse(uri, "the export's name is too long");
  out.socket_path = parse_query(uri, query);

  if (scheme == "nbd") {
    if (out.is_unix()) refuse(uri, "'socket' belongs to nbd+unix://, not to nbd://");
    parse_authority(uri, rest, out);
    return out;
  }
  if (!rest.empty()) refuse(uri, fmt::format("nbd+unix takes no host: {}", example));
  if (!out.is_unix()) refuse(uri, fmt::format("the parameter 'socket' is missing: {}", example));
  if (out.socket_path.size() >= sizeof(sockaddr_un::sun_path)) {
    refuse(uri, "the socket's path is too long: use at most 107 bytes");
  }
  return out;
}

std::vector<Endpoint> parse_paths(const std::vector<std::string>& uris,
                                  const std::vector<std::string>& vias) {
  const std::size_t count = std::max(uris.size(), vias.size());
  if (uris.empty()) throw std::invalid_argument("no URI: give one");
  if (count > paths_max) {
    throw std::invalid_argument(fmt::format("{} paths: give at most {}", count, paths_max));
  }
  if (!vias.empty() && uris.size() != 1 && uris.size() != vias.size()) {
    throw std::invalid_argument(
        fmt::format("{} local addresses for {} URIs: give one for each URI, or one URI",
                    vias.size(), uris.size()));
  }
  std::vector<Endpoint> out;
  for (std::size_t i = 0; i < count; ++i) {
    Endpoint& path = out.emplace_back(parse_uri(uris.size() == 1 ? uris[0] : uris[i]));
    if (!vias.empty()) path.via = vias[i];
    const std::string name = path.name();
    if (!path.via.empty() && path.is_unix()) {
      throw std::invalid_argument(name + ": a unix socket has no local address: leave it out");
    }
    boost::system::error_code malformed;
    if (!path.via.empty()) (void)boost::asio::ip::make_address(path.via, malformed);
    if (malformed) {
      throw std::invalid_argument(name +
                                  ": not an address: give an IPv4 or IPv6 address of this host");
    }
    const auto twice = std::count_if(out.begin(), out.end(),
                                     [&](const Endpoint& other) { return other.name() == name; });
    if (twice > 1) throw std::invalid_argument(name + ": given twice: leave one out");
  }
  return out;
}

}  // namespace nbdferry::transport
