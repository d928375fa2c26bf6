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
  CHECK(has(refusal("nbds://h/"), "TLS is not supported"));
  CHECK(has(refusal("nbds+unix:///?socket=/s"), "TLS is not supported"));
  CHECK(has(refusal("nbd://user@h/"), "user name"));
  CHECK(has(refusal("nbd://h:0/"), "not a port"));
  CHECK(has(refusal("nbd://h:65536/"), "not a port"));
  CHECK(has(refusal("nbd://h:12x/"), "not a port"));
  CHECK(has(refusal("nbd://::1/"), "brackets"));
  CHECK(has(refusal("nbd://[::1/"), "without ']'"));
  CHECK(has(refusal("nbd://[::1]9/"), "after ']'"));
  CHECK(has(refusal("nbd://h/a%2"), "two hex digits"));
  CHECK(has(refusal("nbd://h/a%00"), "NUL"));
  CHECK(has(refusal("nbd://h/?tls-certificates=/x"), "unknown parameter 'tls-certificates'"));
  CHECK(has(refusal("nbd://h/?socket=/x"), "belongs to nbd+unix"));
  CHECK(has(refusal("nbd+unix:///"), "'socket' is missing"));
  CHECK(has(refusal("nbd+unix://h/?socket=/x"), "no host"));
  CHECK(has(refusal("nbd+unix:///?socket=/" + std::string(107, 'a')), "too long"));
  CHECK(has(refusal("nbd://h/" + std::string(4097, 'a')), "too long"));
}

}  // namespace nbdferry::transport
