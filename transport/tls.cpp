// Why libnbd (1.14) needs watching:
//  - Without a readable ca-cert.pem it takes the system's authorities instead and verifies nothing. An
//    unreadable client certificate or revocation list is left out without a word. So we look first, and
//    afterwards whether the files are still the same.
//  - It verifies only where it knows a host name, and it knows one only if it made the socket itself.
#include "transport/tls.hpp"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include <sys/stat.h>
#include <unistd.h>

#include <fmt/format.h>
#include <libnbd.h>

#include "transport/libnbd_errors.hpp"

namespace nbdferry::transport {

namespace {

constexpr const char* ca_file = "ca-cert.pem";
constexpr const char* crl_file = "ca-crl.pem";
constexpr const char* client_certificate_file = "client-cert.pem";
constexpr const char* client_key_file = "client-key.pem";

std::string in_folder(const TlsPeer& peer, const char* name) {
  return peer.certificates + '/' + name;
}

bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

// As libnbd asks.
std::string why_unreadable(const std::string& path, std::string_view what_to_do) {
  if (::access(path.c_str(), R_OK) == 0) return {};
  return fmt::format("cannot read '{}': {}: {}", path, std::strerror(errno), what_to_do);
}

std::string check_certificates(const TlsPeer& peer) {
  auto why = why_unreadable(in_folder(peer, ca_file),
                            "put the certificate there of who signed the server's");
  if (!why.empty()) return why;
  const auto crl = in_folder(peer, crl_file);
  if (exists(crl)) why = why_unreadable(crl, "let nbdferry's user read it");
  if (!why.empty()) return why;
  const auto certificate = in_folder(peer, client_certificate_file);
  const auto key = in_folder(peer, client_key_file);
  if (!exists(certificate) && !exists(key)) return {};  // not every server asks who we are
  const auto* const what_to_do = "a client needs both its certificate and its key, or neither";
  why = why_unreadable(certificate, what_to_do);
  return why.empty() ? why_unreadable(key, what_to_do) : why;
}

// --- pre-shared keys
// -----------------------------------------------------------------------------------

bool is_key(std::string_view text) {
  return !text.empty() && text.size() % 2 == 0 &&
         std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isxdigit(c); });
}

// Errors name users and lines, never keys.
std::string find_user(const TlsPeer& peer, std::string& user) {
  const auto& path = peer.psk_file;
  auto why = why_unreadable(path, "it must hold lines of USER:KEY, as psktool makes them");
  if (!why.empty()) return why;
  std::ifstream in(path);
  std::vector<std::string> users;
  std::string line;
  for (unsigned number = 1; std::getline(in, line); ++number) {
    if (line.ends_with('\r')) line.pop_back();
    if (line.empty() || line.starts_with('#')) continue;
    const auto colon = line.find(':');
    if (colon == std::string::npos || colon == 0 ||
        !is_key(std::string_view(line).substr(colon + 1))) {
      return fmt::format("PSK file '{}': line {} is not USER:KEY, with the key in hex: {}", path,
                         number, "make it with psktool");
    }
    users.push_back(line.substr(0, colon));
  }
  if (in.bad()) return fmt::format("cannot read '{}': is it a file?", path);
  if (users.empty()) return fmt::format("PSK file '{}': holds no key: make one with psktool", path);
  if (peer.user.empty() && users.size() > 1) {
    return fmt::format("PSK file '{}': holds {} users: say which in the URI: nbds://USER@HOST/",
                       path, users.size());
  }
  user = peer.user.empty() ? users.front() : peer.user;
  if (std::find(users.begin(), users.end(), user) != users.end()) return {};
  return fmt::format("PSK file '{}': has no user '{}': name another in the URI, or add a key", path,
                     user);
}

// --- the name
// -------------------------------------------------------------------------------------------

// So that libnbd knows the server's name though the socket is ours.
bool tell_hostname(nbd_handle* handle, const std::string& name) {
#ifdef LIBNBD_HAVE_NBD_SET_TLS_HOSTNAME
  return nbd_set_tls_hostname(handle, name.c_str()) == 0;
#else
  // An attempt to connect fails before it looks the host up, since there is no such service. It leaves
  // the handle as new, but for the name. will_verify() sees whether that still holds.
  return nbd_aio_connect_tcp(handle, name.c_str(), "nbdferry, nowhere") == -1 &&
         nbd_aio_is_created(handle) == 1;
#endif
}

}  // namespace

std::string prepare_tls(nbd_handle* handle, const TlsPeer& peer) {
  bool ok = nbd_set_tls(handle, LIBNBD_TLS_REQUIRE) == 0;
  if (!peer.psk_file.empty()) {
    std::string user;
    auto why = find_user(peer, user);
    if (!why.empty()) return why;
    ok = ok && nbd_set_tls_psk_file(handle, peer.psk_file.c_str()) == 0 &&
         nbd_set_tls_username(handle, user.c_str()) == 0;
  } else {
    auto why = check_certificates(peer);
    if (!why.empty()) return why;
    ok = ok && nbd_set_tls_certificates(handle, peer.certificates.c_str()) == 0 &&
         nbd_set_tls_verify_peer(handle, peer.verify) == 0 &&
         (peer.hostname.empty() || tell_hostname(handle, peer.hostname));
  }
  return ok ? std::string() : fmt::format("cannot set up TLS: {}", last_libnbd_error());
}

bool will_verify(nbd_handle* handle, const TlsPeer& peer) {
  if (!peer.psk_file.empty() || !peer.verify) return true;
  if (nbd_get_tls_verify_peer(handle) != 1) return false;
#ifdef LIBNBD_HAVE_NBD_SET_TLS_HOSTNAME
  return true;
#else
  const std::unique_ptr<char, decltype(&std::free)> uri(nbd_get_uri(handle), &std::free);
  const bool is_ipv6 = peer.hostname.find(':') != std::string::npos;
  const auto named = is_ipv6 ? '[' + peer.hostname + ']' : peer.hostname;
  return uri != nullptr && std::string_view(uri.get()).starts_with("nbds://" + named + ':');
#endif
}

std::string tls_files_version(const TlsPeer& peer) {
  std::string version;
  const auto add = [&version](const std::string& path) {
    struct stat s {};
    if (::stat(path.c_str(), &s) == 0) {
      version +=
          fmt::format("{}:{}:{}.{}", s.st_dev, s.st_ino, s.st_ctim.tv_sec, s.st_ctim.tv_nsec);
    }
    version += ' ';
  };
  if (!peer.psk_file.empty()) return version;  // without its key nothing is proved
  for (const auto* name : {ca_file, crl_file, client_certificate_file, client_key_file}) {
    add(in_folder(peer, name));
  }
  return version;
}

// --- what went wrong
// ------------------------------------------------------------------------------------

namespace {

bool has(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// Such a server says nothing: it hangs up.
std::string explain_refusal(const TlsPeer& peer, bool after_handshake) {
  if (!peer.psk_file.empty()) {
    return "the server refused our key, or takes none: compare its PSK file with ours, user and "
           "key";
  }
  if (!after_handshake) {
    return "the server ended the TLS handshake: does it take certificates, or keys (--tls-psk)?";
  }
  if (!exists(in_folder(peer, client_certificate_file))) {
    return fmt::format(
        "the server ended the connection when TLS was up: if it demands a client's certificate, "
        "put "
        "{} and {} into '{}'",
        client_certificate_file, client_key_file, peer.certificates);
  }
  return fmt::format(
      "the server ended the connection when TLS was up: does it trust who signed '{}'?",
      in_folder(peer, client_certificate_file));
}

}  // namespace

std::string explain_tls_failure(std::string_view why, const TlsPeer* peer) {
  if (peer == nullptr) {
    if (has(why, "server requires TLS")) return "the server demands TLS: use nbds";
    return {};
  }
  if (has(why, "server refused TLS") || has(why, "server is oldstyle") ||
      has(why, "not using fixed newstyle")) {
    return "the server does not offer TLS, and is not talked to without: set it up there";
  }
  if (is_certificate_refused(why)) return explain_certificate(CertificateFault::unknown, *peer);
  if (has(why, "Insufficient credentials") && !peer->psk_file.empty()) {
    return "the server has a certificate, no keys: use --tls-certificates";
  }
  if (has(why, "non-properly terminated") || has(why, "alert") || has(why, "pull function")) {
    return explain_refusal(*peer, has(why, "gnutls_record"));
  }
  if (has(why, "gnutls_certificate_set") || has(why, "gnutls_psk_set")) {
    return fmt::format("cannot use the TLS files: {}", why);
  }
  if (has(why, "gnutls_handshake")) {
    return fmt::format("the TLS handshake failed: {}: compare both sides' TLS settings", why);
  }
  return {};
}

bool is_certificate_refused(std::string_view why) {
  return has(why, "Error in the certificate verification");
}

std::string explain_certificate(CertificateFault fault, const TlsPeer& peer) {
  const auto ca = in_folder(peer, ca_file);
  switch (fault) {
    case CertificateFault::unknown_signer:
      return fmt::format(
          "the server's certificate is not signed by the CA in '{}': give the server one that is, "
          "or "
          "put its CA there",
          ca);
    case CertificateFault::other_name:
      return fmt::format(
          "the server's certificate is not for '{}': use the name that it has, or add "
          "tls-hostname=NAME to the URI",
          peer.hostname);
    case CertificateFault::expired:
      return "the server's certificate has expired: renew it there";
    case CertificateFault::not_yet_valid:
      return "the server's certificate is not valid yet: compare both hosts' clocks";
    case CertificateFault::unknown:
      break;
  }
  return fmt::format(
      "the server's certificate was not accepted: is it for '{}', signed by the CA in '{}', in "
      "date, "
      "and not revoked?",
      peer.hostname, ca);
}

}  // namespace nbdferry::transport
