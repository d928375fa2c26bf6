// The address of a target: what an NBD URI says (NBD project, doc/uri.md): nbd, nbds, nbd+unix and
// nbds+unix.
//
// Parsed here rather than in libnbd, because we make the sockets ourselves: libnbd would resolve
// names on our thread, and gives no way to have a socket's options set before it is used.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "transport/tls.hpp"

namespace nbdferry::transport {

struct Endpoint {
  std::string uri;             // as given, for messages
  std::string host;            // TCP: name or address, without brackets
  std::string port;            // TCP: decimal
  std::string socket_path;     // unix; empty for TCP
  std::string export_name;     // decoded; "" is the default export
  std::string via;             // TCP: this host's address to connect from; empty: any
  std::optional<TlsPeer> tls;  // none: in the clear

  // For messages: "URI", or "URI via ADDRESS".
  [[nodiscard]] std::string name() const { return via.empty() ? uri : uri + " via " + via; }
  [[nodiscard]] bool is_unix() const { return !socket_path.empty(); }
};

// Throws std::invalid_argument: "URI: why: what to do". TLS is what the URI alone says of it.
[[nodiscard]] Endpoint parse_uri(std::string_view uri);

// The paths that these URIs and local addresses make: no address, one for each URI, or several for the one
// URI. What the options and a URI say of TLS is put together, and must not differ. Throws
// std::invalid_argument as above.
[[nodiscard]] std::vector<Endpoint> parse_paths(const std::vector<std::string>& uris,
                                                const std::vector<std::string>& vias,
                                                const TlsOptions& tls);

}  // namespace nbdferry::transport
