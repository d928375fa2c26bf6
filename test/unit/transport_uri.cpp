// URIs: what is understood, and that everything else is refused with a reason.
#include <stdexcept>
#include <string>

#include <doctest/doctest.h>

#include "transport/uri.hpp"

namespace nbdferry::transport {

namespace {

std::string refusal(const std::string& uri) {
  try {
    (void)parse_uri(uri);
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return {};
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("an nbd URI names host, port and export") {
  auto e = parse_uri("nbd://example.org:1234/disk%20one");
  CHECK(e.host == "example.org");
  CHECK(e.port == "1234");
  CHECK(e.export_name == "disk one");
  CHECK_FALSE(e.is_unix());

  e = parse_uri("nbd://10.0.0.1");
  CHECK(e.port == "10809");
  CHECK(e.export_name.empty());
  CHECK(parse_uri("nbd://h/").export_name.empty());
  CHECK(parse_uri("nbd://h//abs/name").export_name == "/abs/name");
  CHECK(parse_uri("nbd:///x").host == "localhost");

  e = parse_uri("nbd://[fe80::1]:99/x");
  CHECK(e.host == "fe80::1");
  CHECK(e.port == "99");
  CHECK(parse_uri("nbd://[::1]").port == "10809");
}

TEST_CASE("an nbd+unix URI names socket and export") {
  auto e = parse_uri("nbd+unix:///?socket=/tmp/a.sock");
  CHECK(e.socket_path == "/tmp/a.sock");
  CHECK(e.export_name.empty());
  CHECK(e.is_unix());
  e = parse_uri("nbd+unix:///name?socket=/tmp/a%2fb");
  CHECK(e.socket_path == "/tmp/a/b");
  CHECK(e.export_name == "name");
  CHECK(parse_uri("nbd+unix://?socket=rel.sock").socket_path == "rel.sock");
}

TEST_CASE("what isn't understood is refused with the reason") {
  CHECK(has(refusal(""), "not an NBD URI"));
  CHECK(has(refusal("/dev/sda"), "not an NBD URI"));
  CHECK(has(refusal("nbd:host:10809"), "not an NBD URI"));
  CHECK(has(refusal("http://h/"), "unknown scheme 'http'"));
  CHECK(has(refusal("nbdx://h/"), "unknown scheme 'nbdx'"));
  CHECK(has(refusal("nbd://user@h/"), "user name needs TLS"));
  CHECK(has(refusal("nbd+unix://user@/?socket=/s"), "user name needs TLS"));
  CHECK(has(refusal("nbds://@h/"), "no user name"));
  CHECK(has(refusal("nbd://h:0/"), "not a port"));
  CHECK(has(refusal("nbd://h:65536/"), "not a port"));
  CHECK(has(refusal("nbd://h:12x/"), "not a port"));
  CHECK(has(refusal("nbd://::1/"), "brackets"));
  CHECK(has(refusal("nbd://[::1/"), "without ']'"));
  CHECK(has(refusal("nbd://[::1]9/"), "after ']'"));
  CHECK(has(refusal("nbd://h/a%2"), "two hex digits"));
  CHECK(has(refusal("nbd://h/a%00"), "NUL"));
  CHECK(has(refusal("nbd://h/?tls-certificates=/x"), "'tls-certificates' needs TLS"));
  CHECK(has(refusal("nbds://h/?tls-type=anon"), "unknown parameter 'tls-type'"));
  CHECK(has(refusal("nbds://h/?tls-verify-peer=0"), "say --tls-verify-peer off"));
  CHECK(has(refusal("nbds://h/?tls-certificates=pki"), "not an absolute path"));
  CHECK(has(refusal("nbds://h/?tls-hostname="), "is empty"));
  CHECK(has(refusal("nbds://h/?tls-hostname=a&tls-hostname=b"), "given twice"));
  CHECK(has(refusal("nbd://h/?socket=/x"), "belongs to nbd+unix"));
  CHECK(has(refusal("nbd+unix:///"), "'socket' is missing"));
  CHECK(has(refusal("nbd+unix://h/?socket=/x"), "no host"));
  CHECK(has(refusal("nbd+unix:///?socket=/" + std::string(107, 'a')), "too long"));
  CHECK(has(refusal("nbd://h/" + std::string(4097, 'a')), "too long"));
}

TEST_CASE("a password in a URI is not repeated") {
  const auto why = refusal("nbds://alice:secret@h/");
  CHECK(has(why, "a password has no place"));
  CHECK_FALSE(has(why, "secret"));
}

TEST_CASE("an nbds URI says what it likes of TLS") {
  auto e = parse_uri("nbds://al%20ice@h:1/x?tls-psk-file=/etc/a%3fb");
  REQUIRE(e.tls);
  CHECK(e.host == "h");
  CHECK(e.tls->user == "al ice");
  CHECK(e.tls->psk_file == "/etc/a?b");
  e = parse_uri("nbds+unix:///x?socket=/s&tls-certificates=/pki&tls-hostname=h.example");
  REQUIRE(e.tls);
  CHECK(e.is_unix());
  CHECK(e.tls->certificates == "/pki");
  CHECK(e.tls->hostname == "h.example");
  CHECK(parse_uri("nbds+unix://alice@/?socket=/s").tls->user == "alice");
  CHECK_FALSE(parse_uri("nbd://h/").tls);
}

TEST_CASE("URIs and options make one set of TLS parameters, or are refused") {
  const auto settled = [](const std::string& uri, const TlsOptions& options) {
    return parse_paths({uri}, {}, options).at(0).tls;
  };
  const auto wrong = [&](const std::string& uri, const TlsOptions& options, const char* why) {
    std::string text;
    try {
      (void)settled(uri, options);
    } catch (const std::invalid_argument& e) {
      text = e.what();
    }
    CAPTURE(uri);
    CAPTURE(text);
    CHECK(has(text, why));
  };
  const TlsOptions none;
  const TlsOptions pki{TlsUse::on, "/pki", "", true};
  const TlsOptions any{TlsUse::on, "/pki", "", false};
  const TlsOptions psk{TlsUse::require, "", "/keys", true};
  const std::string socket = "nbds+unix:///?socket=/s";

  CHECK_FALSE(settled("nbd://h/", none));
  CHECK_FALSE(settled("nbd://h/", {TlsUse::off, "", "", true}));
  CHECK(settled("nbds://h/", pki)->certificates == "/pki");
  CHECK(settled("nbds://h/", pki)->hostname == "h");
  CHECK(settled("nbds://h/", pki)->verify);
  CHECK_FALSE(settled("nbds://h/", any)->verify);
  CHECK(settled("nbds://h/?tls-hostname=b", pki)->hostname == "b");
  CHECK(settled("nbds://h/?tls-certificates=/pki", none)->certificates == "/pki");
  CHECK(settled("nbds://h/?tls-certificates=/pki", pki)->certificates == "/pki");
  CHECK(settled("nbds://alice@h/", psk)->user == "alice");
  CHECK(settled(socket, psk)->psk_file == "/keys");
  CHECK(settled(socket + "&tls-hostname=b", pki)->hostname == "b");
  CHECK(settled(socket, any)->hostname.empty());

  wrong("nbd://h/", psk, "--tls require forbids");
  wrong("nbd://h/", pki, "in the clear, and TLS is set up");
  wrong("nbds://h/", {TlsUse::off, "/pki", "", true}, "--tls off forbids");
  wrong("nbds://h/", none, "TLS needs credentials");
  wrong("nbds://h/", {TlsUse::on, "/pki", "/keys", true}, "either certificates or keys");
  wrong("nbds://h/?tls-certificates=/other", pki, "names other certificates than the options");
  wrong("nbds://h/?tls-psk-file=/other", psk, "names other keys than the options");
  wrong("nbds://h/?tls-psk-file=/keys", pki, "either certificates or keys");
  wrong("nbds://h/", {TlsUse::on, "", "/keys", false}, "always verified");
  wrong("nbds://h/?tls-hostname=b", psk, "is for certificates");
  wrong("nbds://alice@h/", pki, "is for --tls-psk");
  wrong(socket, pki, "add tls-hostname=NAME");
}

}  // namespace nbdferry::transport
