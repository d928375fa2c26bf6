// What is looked at before libnbd sees it, and what is said of a failure. Handshakes: test/interop/tls.py.
#include <array>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include <sys/socket.h>
#include <unistd.h>

#include <doctest/doctest.h>
#include <libnbd.h>

#include "transport/tls.hpp"

namespace nbdferry::transport {

namespace {

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

struct Folder {
  std::filesystem::path path;
  Folder() {
    std::string name = std::filesystem::temp_directory_path() / "nbdferry-tls-XXXXXX";
    path = ::mkdtemp(name.data());
  }
  ~Folder() { std::filesystem::remove_all(path); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  std::string put(const std::string& name, const std::string& text) const {
    std::ofstream(path / name) << text;
    return path / name;
  }
};

struct Handle {
  std::unique_ptr<nbd_handle, decltype(&nbd_close)> nbd{nbd_create(), &nbd_close};
  std::string prepare(const TlsPeer& peer) const { return prepare_tls(nbd.get(), peer); }
  // As libnbd was told.
  [[nodiscard]] std::string user() const {
    const std::unique_ptr<char, decltype(&std::free)> name(nbd_get_tls_username(nbd.get()),
                                                           &std::free);
    return name.get();
  }
};

}  // namespace

TEST_CASE("the user of a pre-shared key") {
  const Folder folder;
  const auto one = folder.put("one", "# ours\n\nalice:00ffAB\r\n");
  const auto two = folder.put("two", "alice:00ff\nbob:11\n");
  const auto user = [](const std::string& file, const std::string& wanted) {
    const Handle handle;
    CHECK(handle.prepare({"", file, wanted, "", true}).empty());
    CHECK(nbd_get_tls(handle.nbd.get()) == LIBNBD_TLS_REQUIRE);
    return handle.user();
  };
  CHECK(user(one, "") == "alice");
  CHECK(user(one, "alice") == "alice");
  CHECK(user(two, "bob") == "bob");

  const auto wrong = [](const std::string& file, const std::string& wanted, const char* why) {
    const auto text = Handle().prepare({"", file, wanted, "", true});
    CAPTURE(text);
    CHECK(has(text, why));
    CHECK(has(text, file));
    CHECK_FALSE(has(text, "secret"));
  };
  wrong(two, "", "holds 2 users");
  wrong(two, "carol", "has no user 'carol'");
  wrong(folder.path / "none", "", "No such file");
  wrong(folder.path, "", "is it a file?");
  wrong(folder.put("empty", "#\n"), "", "holds no key");
  wrong(folder.put("text", "\nalice:secret\n"), "", "line 2 is not USER:KEY");
  wrong(folder.put("odd", "alice:abc\n"), "", "line 1 is not USER:KEY");
  wrong(folder.put("bare", "secret\n"), "", "line 1 is not USER:KEY");
}

TEST_CASE("a folder of certificates is complete, or refused") {
  const Folder folder;
  const TlsPeer peer{folder.path, "", "", "h.example", true};
  const auto why = [&] { return Handle().prepare(peer); };
  CHECK(has(why(), "ca-cert.pem': No such file"));
  const auto before = tls_files_version(peer);
  folder.put("ca-cert.pem", "");
  CHECK(tls_files_version(peer) != before);
  CHECK(why().empty());
  folder.put("client-cert.pem", "");
  CHECK(has(why(), "client-key.pem': No such file"));
  folder.put("client-key.pem", "");
  CHECK(why().empty());
}

// Else nothing is verified.
TEST_CASE("libnbd knows the server's name though the socket is ours") {
  const Folder folder;
  folder.put("ca-cert.pem", "");
  for (const auto* name : {"h.example", "10.0.0.1", "::1", "fe80::1", "a_b-c"}) {
    CAPTURE(name);
    const TlsPeer peer{folder.path, "", "", name, true};
    const Handle handle;
    REQUIRE(handle.prepare(peer).empty());
    CHECK(nbd_aio_is_created(handle.nbd.get()) == 1);
    std::array<int, 2> ends{};
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends.data()) == 0);
    REQUIRE(nbd_aio_connect_socket(handle.nbd.get(), ends[0]) == 0);
    CHECK(will_verify(handle.nbd.get(), peer));
    TlsPeer other = peer;
    other.hostname = "h.examples";
    CHECK_FALSE(will_verify(handle.nbd.get(), other));
    ::close(ends[1]);
  }
}

TEST_CASE("what is said of a TLS failure") {
  const TlsPeer pki{"/pki", "", "", "h", true};
  const TlsPeer psk{"", "/keys", "", "", true};
  CHECK(has(explain_tls_failure("handshake: server requires TLS encryption first", nullptr),
            "use nbds"));
  CHECK(explain_tls_failure("handshake: server is shutting down", nullptr).empty());
  CHECK(explain_tls_failure("handshake: server is shutting down", &pki).empty());
  CHECK(has(explain_tls_failure("handshake: server refused TLS, but …", &pki), "not offer TLS"));
  CHECK(has(explain_tls_failure("gnutls_handshake: Error in the certificate verification.", &pki),
            "is it for 'h', signed by the CA in '/pki/ca-cert.pem'"));
  CHECK(has(explain_tls_failure("gnutls_record_recv: Error in the pull function.", &pki),
            "put client-cert.pem and client-key.pem into '/pki'"));
  CHECK(has(explain_tls_failure("gnutls_handshake: A TLS fatal alert has been received.", &psk),
            "refused our key"));
  CHECK(has(explain_certificate(CertificateFault::other_name, pki), "not for 'h'"));
  CHECK(has(explain_certificate(CertificateFault::unknown_signer, pki), "/pki/ca-cert.pem"));
}

}  // namespace nbdferry::transport
