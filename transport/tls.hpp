// TLS to the target: what an operator may ask for, what a connection needs, and how libnbd (GnuTLS) is told.
//
// What must hold: a connection of an nbds URI is encrypted or is none, and unless the operator said otherwise
// its server has proved who it is: by a certificate that the CA in the folder signed for the host's name, or by
// knowing the pre-shared key. libnbd alone doesn't promise that: see tls.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

struct nbd_handle;

namespace nbdferry::transport {

enum class TlsUse : std::uint8_t {
  off,      // refuse nbds URIs
  on,       // as each URI says
  require,  // refuse the others
};

// Of a migration, for all its URIs.
struct TlsOptions {
  TlsUse use = TlsUse::on;
  std::string
      certificates;  // folder (absolute) with ca-cert.pem, as libnbd and QEMU lay it out; or empty
  std::string psk_file;     // absolute; lines of USER:HEX; or empty
  bool verify_peer = true;  // certificates only

  friend bool operator==(const TlsOptions&, const TlsOptions&) = default;
};

// Of one URI; either certificates or a file of keys.
struct TlsPeer {
  std::string certificates;
  std::string psk_file;
  std::string user;      // PSK; empty: the only one in the file
  std::string hostname;  // certificates: whom the server's must name, if it is verified
  bool verify = true;
};

// Before the handle connects. Returns why it can't be: "what: why: what to do", or nothing. Reads small files.
[[nodiscard]] std::string prepare_tls(nbd_handle* handle, const TlsPeer& peer);

// After it was given its socket: does libnbd verify what it was told to?
[[nodiscard]] bool will_verify(nbd_handle* handle, const TlsPeer& peer);

// Changes whenever the files do that libnbd reads during the handshake.
[[nodiscard]] std::string tls_files_version(const TlsPeer& peer);

// What libnbd says of a failed handshake, for a person: "why: what to do"; empty: it isn't about TLS.
// `peer` is null for a connection in the clear.
[[nodiscard]] std::string explain_tls_failure(std::string_view why, const TlsPeer* peer);

// The one failure whose reason libnbd keeps to itself.
[[nodiscard]] bool is_certificate_refused(std::string_view why);

enum class CertificateFault : std::uint8_t {
  unknown,  // or more than one
  unknown_signer,
  other_name,
  expired,
  not_yet_valid,
};

[[nodiscard]] std::string explain_certificate(CertificateFault fault, const TlsPeer& peer);

}  // namespace nbdferry::transport
