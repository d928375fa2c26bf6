// NBD URIs: scheme://[user@][host[:port]][/export][?name=value&…]. Strict: what we don't understand is
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

constexpr std::string_view example =
    "use nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH, with nbds for TLS";

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

// Cuts "user@" off.
void parse_user(std::string_view uri, std::string_view& authority, Endpoint& out) {
  const auto at = authority.rfind('@');
  if (at == std::string_view::npos) return;
  const auto user = authority.substr(0, at);
  authority.remove_prefix(at + 1);
  // Not repeated: it may be in a log or on a screen.
  if (user.find(':') != std::string_view::npos) {
    refuse("URI", "a password has no place in it: keys are in the file that --tls-psk names");
  }
  if (!out.tls) refuse(uri, "a user name needs TLS: use nbds, or leave it out");
  out.tls->user = decoded(uri, user);
  if (out.tls->user.empty()) refuse(uri, "malformed URI: no user name before '@'");
}

void parse_authority(std::string_view uri, std::string_view authority, Endpoint& out) {
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

void parse_query(std::string_view uri, std::string_view query, Endpoint& out) {
  TlsPeer tls;
  while (!query.empty()) {
    std::string_view name = query;
    query = split_off(name, '&');
    const auto value = split_off(name, '=');
    std::string* const field = name == "socket"             ? &out.socket_path
                               : name == "tls-certificates" ? &tls.certificates
                               : name == "tls-psk-file"     ? &tls.psk_file
                               : name == "tls-hostname"     ? &tls.hostname
                                                            : nullptr;
    if (name == "tls-verify-peer") {
      refuse(uri, "'tls-verify-peer' is not for one URI: say --tls-verify-peer off, for all");
    }
    if (field == nullptr) {
      refuse(uri, fmt::format("unknown parameter '{}': only 'socket', 'tls-certificates', "
                              "'tls-psk-file' and 'tls-hostname' are supported",
                              name));
    }
    if (field != &out.socket_path && !out.tls) {
      refuse(uri, fmt::format("'{}' needs TLS: use nbds, or leave it out", name));
    }
    if (!field->empty()) refuse(uri, fmt::format("'{}' is given twice: leave one out", name));
    *field = decoded(uri, value);
    const bool is_file = field == &tls.certificates || field == &tls.psk_file;
    if (is_file && !field->starts_with('/')) {
      refuse(uri, fmt::format("'{}' is not an absolute path: it must begin with '/'", name));
    }
    if (field->empty()) refuse(uri, fmt::format("'{}' is empty: leave it out", name));
  }
  if (out.tls) out.tls = std::move(tls);
}

// What the URI and the options say together.
void settle_tls(Endpoint& path, const TlsOptions& options) {
  const auto& uri = path.uri;
  const bool wanted =
      !options.certificates.empty() || !options.psk_file.empty() || !options.verify_peer;
  if (!path.tls) {
    if (options.use == TlsUse::require) {
      refuse(uri, "is in the clear, and --tls require forbids that: use nbds");
    }
    if (wanted) {
      refuse(uri, "is in the clear, and TLS is set up: use nbds, or leave the --tls-… options out");
    }
    return;
  }
  if (options.use == TlsUse::off) {
    refuse(uri, "asks for TLS, and --tls off forbids that: use nbd, or leave --tls off out");
  }
  TlsPeer& tls = *path.tls;
  const auto join = [&uri](std::string& from_uri, const std::string& option, const char* what) {
    if (!from_uri.empty() && !option.empty() && from_uri != option) {
      refuse(uri, fmt::format("names other {} than the options: leave one of both out", what));
    }
    if (from_uri.empty()) from_uri = option;
  };
  join(tls.certificates, options.certificates, "certificates");
  join(tls.psk_file, options.psk_file, "keys");
  tls.verify = options.verify_peer;
  if (tls.certificates.empty() == tls.psk_file.empty()) {
    refuse(uri, fmt::format("TLS needs {}: give --tls-certificates DIR or --tls-psk FILE",
                            tls.psk_file.empty() ? "credentials" : "either certificates or keys"));
  }
  if (!tls.psk_file.empty()) {
    if (!tls.verify) {
      refuse(uri, "with a key both sides are always verified: leave --tls-verify-peer off out");
    }
    if (!tls.hostname.empty()) refuse(uri, "'tls-hostname' is for certificates: leave it out");
    return;
  }
  if (!tls.user.empty()) refuse(uri, "a user name is for --tls-psk: leave it out");
  if (tls.hostname.empty()) tls.hostname = path.host;
  if (tls.hostname.empty() && tls.verify) {
    refuse(uri,
           "a certificate is verified by a host's name, which a unix socket lacks: add "
           "tls-hostname=NAME to the URI, or say --tls-verify-peer off");
  }
}

}  // namespace

Endpoint parse_uri(std::string_view uri) {
  const auto scheme_end = uri.find("://");
  if (scheme_end == std::string_view::npos) {
    refuse(uri, fmt::format("not an NBD URI: {}", example));
  }
  const auto scheme = uri.substr(0, scheme_end);
  const bool secure = scheme == "nbds" || scheme == "nbds+unix";
  const bool tcp = scheme == "nbd" || scheme == "nbds";
  if (!tcp && !secure && scheme != "nbd+unix") {
    refuse(uri, fmt::format("unknown scheme '{}': {}", scheme, example));
  }

  Endpoint out;
  out.uri = uri;
  if (secure) out.tls.emplace();
  std::string_view rest = uri.substr(scheme_end + 3);
  const auto query = split_off(rest, '?');
  // The path's first slash only separates: "//name" is the export "/name".
  out.export_name = decoded(uri, split_off(rest, '/'));
  if (out.export_name.size() > export_name_max) refuse(uri, "the export's name is too long");
  parse_query(uri, query, out);
  parse_user(uri, rest, out);

  if (tcp) {
    if (out.is_unix()) refuse(uri, fmt::format("'socket' belongs to {0}+unix, not to {0}", scheme));
    parse_authority(uri, rest, out);
    return out;
  }
  if (!rest.empty()) refuse(uri, fmt::format("{} takes no host: {}", scheme, example));
  if (!out.is_unix()) refuse(uri, fmt::format("the parameter 'socket' is missing: {}", example));
  if (out.socket_path.size() >= sizeof(sockaddr_un::sun_path)) {
    refuse(uri, "the socket's path is too long: use at most 107 bytes");
  }
  return out;
}

std::vector<Endpoint> parse_paths(const std::vector<std::string>& uris,
                                  const std::vector<std::string>& vias, const TlsOptions& tls) {
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
    settle_tls(path, tls);
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
