// The NBD handshake over a real socket: each fact that naive servers get wrong.
#include <doctest/doctest.h>

#include "proxy/limits.hpp"
#include "test/unit/proxy_nbd_fixture.hpp"

namespace nbdferry::proxy::test {
namespace {

constexpr std::uint32_t ack = 1;
constexpr std::uint32_t err_unsup = 0x80000001;
constexpr std::uint32_t err_invalid = 0x80000003;
constexpr std::uint32_t err_unknown = 0x80000006;
constexpr std::uint32_t err_too_big = 0x80000009;
constexpr std::uint32_t opt_export_name = 1, opt_abort = 2, opt_list = 3, opt_starttls = 5,
                        opt_info = 6, opt_go = 7, opt_structured = 8, opt_list_meta = 9,
                        opt_set_meta = 10;
constexpr std::uint64_t size = 1 << 20;

RawClient client_of(ServerThread& server) {
  RawClient client = RawClient::unix_socket(server.path());
  client.greet();
  return client;
}

// The server goes on with this client.
bool still_talks(RawClient& client) { return client.option(99, "what").back().type == err_unsup; }

}  // namespace

TEST_CASE("unknown client flags end the connection") {
  ServerThread server(size);
  RawClient client = RawClient::unix_socket(server.path());
  client.greet(4);
  CHECK(client.is_closed());
}

TEST_CASE("EXPORT_NAME: zeroes follow only without NO_ZEROES") {
  ServerThread server(size, "disk");
  for (const bool no_zeroes : {false, true}) {
    CAPTURE(no_zeroes);
    RawClient client = RawClient::unix_socket(server.path());
    client.greet(no_zeroes ? 3 : 1);
    client.send_option(opt_export_name, "disk");
    const auto answer = client.receive(10 + (no_zeroes ? 0 : 124));
    CHECK(unwire<std::uint64_t>(answer) == size);
    // HAS_FLAGS FLUSH FUA TRIM ZEROES MULTI_CONN CACHE FAST_ZERO
    CHECK(unwire<std::uint16_t>(answer.substr(8)) == 0b1101'0110'1101);
    CHECK(client.ask(nbd::RequestType::read, 0, 512).error == 0);
  }
  RawClient client = client_of(server);
  client.send_option(opt_export_name, "other");
  CHECK(client.is_closed());
}

TEST_CASE("GO never sends zeroes and accepts the default name") {
  ServerThread server(size, "disk");
  for (const char* name : {"", "disk"}) {
    RawClient client = RawClient::unix_socket(server.path());
    client.greet(1);
    const auto answers = client.option(opt_go, info_request(name));
    CHECK(answers.front().data.substr(0, 2) == wire(std::uint16_t{0}));
    CHECK(answers.back().type == ack);
    CHECK(client.ask(nbd::RequestType::read, 4096, 512).error == 0);
  }
}

TEST_CASE("INFO and GO: same answers, known infos only, malformed ones refused") {
  ServerThread server(size, "disk");
  RawClient client = client_of(server);
  const auto request = info_request("", {1, 2, 3, 77});
  const auto info = client.option(opt_info, request);
  REQUIRE(info.size() == 5);
  CHECK(info[0].data.size() == 12);
  CHECK(info[1].data == wire(std::uint16_t{3}) + wire(1U) + wire(4096U) + wire(32U << 20));
  CHECK(info[2].data == wire(std::uint16_t{1}) + "disk");
  CHECK(info[3].data == wire(std::uint16_t{2}) + "a disk in memory");
  for (const auto& [data, type] : std::vector<std::pair<std::string, std::uint32_t>>{
           {info_request("other"), err_unknown},
           {"", err_invalid},
           {"abc", err_invalid},
           {wire(5U) + "disk" + wire(std::uint16_t{0}), err_invalid},  // name beyond length - 6
           {wire(0xffffffffU) + "disk" + wire(std::uint16_t{0}), err_invalid},
           {info_request("disk") + "x", err_invalid},
           {wire(4U) + "disk" + wire(std::uint16_t{2}) + wire(std::uint16_t{1}), err_invalid},
           {info_request(std::string("di\0sk", 5)), err_invalid},
           {info_request(std::string(5000, 'n')), err_invalid}}) {
    CAPTURE(data);
    CHECK(client.option(opt_info, data).back().type == type);
    CHECK(client.option(opt_go, data).back().type == type);
  }
  const auto go = client.option(opt_go, request);
  REQUIRE(go.size() == info.size());
  for (std::size_t i = 0; i < go.size(); ++i) CHECK(go[i].data == info[i].data);
}

TEST_CASE("LIST names the exports; data with it is refused") {
  ServerThread server(size, "disk");
  RawClient client = client_of(server);
  CHECK(client.option(opt_list, "x").back().type == err_invalid);
  const auto list = client.option(opt_list);
  REQUIRE(list.size() == 2);
  CHECK(list[0].data == wire(4U) + "disk" + "a disk in memory");
}

TEST_CASE("ABORT is acknowledged, even with data, and ends the connection") {
  ServerThread server(size);
  for (const std::string& data : {std::string(), std::string("bye"), std::string(100'000, 'x')}) {
    RawClient client = client_of(server);
    CHECK(client.option(opt_abort, data).back().type == ack);
    CHECK(client.is_closed());
  }
}

TEST_CASE("unknown options are skipped, whatever their size; long known ones too") {
  ServerThread server(size);
  RawClient client = client_of(server);
  CHECK(client.option(4711).back().type == err_unsup);
  CHECK(client.option(4711, std::string(3'000'000, 'x')).back().type == err_unsup);
  CHECK(client.option(opt_starttls).back().type == err_unsup);
  CHECK(client.option(opt_info, std::string(70'000, 'x')).back().type == err_too_big);
  CHECK(client.option(opt_structured, "x").back().type == err_invalid);
  CHECK(still_talks(client));
}

TEST_CASE("options are bounded in number, served or not") {
  ServerThread server(size);
  for (const std::uint32_t number : {opt_list, std::uint32_t{99}}) {
    RawClient client = RawClient::unix_socket(server.path());
    client.greet();
    for (std::uint32_t i = 0; i < limits::options_max; ++i) (void)client.option(number);
    client.send_option(number, "");
    CHECK(client.is_closed());
  }
}

TEST_CASE("several exports: found by name, the first is the default") {
  boost::asio::io_context io;
  MemoryFront first(io, 1 << 16, "a");
  MemoryFront second(io, 1 << 17, "b");
  const std::vector<Front*> fronts{&first, &second};
  const auto size_of = [&](const std::string& name) {
    Handshake handshake(fronts);
    handshake.output().clear();
    const std::string data = info_request(name);
    const std::string input =
        wire(3U) + "IHAVEOPT" + wire(opt_go) + wire(static_cast<std::uint32_t>(data.size())) + data;
    auto bytes = std::as_bytes(std::span(input));
    while (handshake.state() == Handshake::State::negotiating && !bytes.empty()) {
      bytes = bytes.subspan(handshake.consume(bytes));
    }
    return handshake.state() == Handshake::State::transmission
               ? handshake.negotiated().front->info().size
               : 0;
  };
  CHECK(size_of("") == 1 << 16);
  CHECK(size_of("a") == 1 << 16);
  CHECK(size_of("b") == 1 << 17);
}

TEST_CASE("meta contexts") {
  ServerThread server(size, "disk");
  server.on_loop([&] {
    server.front.known_migration = "id-1";
    return 0;
  });
  RawClient client = client_of(server);
  const auto names = [](const std::vector<OptionAnswer>& answers) {
    std::string all;
    for (const auto& a : answers) {
      if (a.type == 4) all += a.data.substr(4) + ";";
    }
    return all;
  };
  const auto set = [&](const std::vector<std::string>& queries, const std::string& name = "") {
    return client.option(opt_set_meta, context_request(name, queries));
  };
  const auto list = [&](const std::vector<std::string>& queries) {
    return client.option(opt_list_meta, context_request("", queries));
  };
  CHECK(set({"base:allocation"}).back().type == err_invalid);  // structured replies come first
  CHECK(list({}).back().type == err_invalid);
  REQUIRE(client.option(opt_structured).back().type == ack);

  CHECK(names(list({})) == "base:allocation;");
  CHECK(names(list({"base:"})) == "base:allocation;");
  CHECK(names(list({"base:other", "qemu:x", "nonsense"})) == "");
  CHECK(names(set({})) == "");
  CHECK(names(set({"base:"})) == "");
  CHECK(names(set({"qemu:allocation-depth", "base:allocation", "base:allocation"})) ==
        "base:allocation;");
  CHECK(set({"base:allocation"}, "other").back().type == err_unknown);
  CHECK(names(set({"x-nbdferry:migration=id-2"})) == "");
  CHECK(names(set({"x-nbdferry:migration="})) == "");
  const auto both = set({"x-nbdferry:migration=id-1", "base:allocation"});
  CHECK(names(both) == "base:allocation;x-nbdferry:migration=id-1;");
  CHECK(both[0].data.substr(0, 4) != both[1].data.substr(0, 4));
  for (const std::string& data :
       {std::string(), wire(0U), wire(0U) + wire(1U), wire(0U) + wire(0xffffffffU),
        wire(0U) + wire(1U) + wire(10U) + "base:", context_request("", {"base:allocation"}) + "x",
        context_request("", {std::string(4097, 'x')})}) {
    CAPTURE(data);
    CHECK(client.option(opt_set_meta, data).back().type == err_invalid);
  }
  CHECK(still_talks(client));
}

TEST_CASE("a SET_META_CONTEXT that failed, or for another export, selects nothing") {
  ServerThread server(size, "disk");
  const auto status_error = [&](const std::function<void(RawClient&)>& selects) {
    RawClient client = client_of(server);
    REQUIRE(client.option(opt_structured).back().type == ack);
    selects(client);
    REQUIRE(client.option(opt_go, info_request("disk")).back().type == ack);
    return client.ask(nbd::RequestType::block_status, 0, 4096).error;
  };
  const auto good = context_request("", {"base:allocation"});
  CHECK(status_error([&](RawClient& c) { (void)c.option(opt_set_meta, good); }) == 0);
  CHECK(status_error([](RawClient&) {}) == 22);
  CHECK(status_error([&](RawClient& c) {
          (void)c.option(opt_set_meta, good);
          (void)c.option(opt_set_meta, "bad");
        }) == 22);
  CHECK(status_error([&](RawClient& c) {
          (void)c.option(opt_set_meta, good);
          (void)c.option(opt_set_meta, context_request("other", {"base:allocation"}));
        }) == 22);
  CHECK(status_error([&](RawClient& c) {
          (void)c.option(opt_set_meta, good);
          (void)c.option(opt_list_meta, context_request("", {}));
        }) == 0);
}

TEST_CASE(
    "the migration that was selected reaches the export, with BLOCK_STATUS for both contexts") {
  ServerThread server(size);
  server.on_loop([&] {
    server.front.known_migration = "id-1";
    return 0;
  });
  RawClient client = RawClient::unix_socket(server.path());
  client.go(true, {"x-nbdferry:migration=id-1", "base:allocation"});
  client.send_request(nbd::RequestType::block_status, 0, 8192);
  const RawReply first = client.reply();
  const RawReply second = client.reply();
  CHECK(first.body == wire(1U) + wire(8192U) + wire(3U));
  CHECK(first.flags == 0);
  CHECK(second.body == wire(2U) + wire(8192U) + wire(0U));
  CHECK(second.flags == 1);
  CHECK(server.on_loop([&] { return server.front.migrations; }) ==
        std::vector<std::string>{"id-1"});
}

TEST_CASE("a migration's session, and what the disk holds of it") {
  ServerThread server(size);
  server.on_loop([&] {
    server.front.known_migration = "id-1";
    server.front.holding = "id-1";
    return 0;
  });
  RawClient client = RawClient::unix_socket(server.path());
  client.go(true, {"x-nbdferry:migration=id-1", "x-nbdferry:session=s", "x-nbdferry:holds=id-1"});
  client.send_request(nbd::RequestType::block_status, 0, 8192);
  for (const std::uint32_t id : {2U, 3U, 4U}) {
    const RawReply reply = client.reply();
    CHECK(reply.body == wire(id) + wire(8192U) + wire(0U));
    CHECK(reply.flags == (id == 4 ? 1 : 0));
  }
  CHECK(server.on_loop([&] { return server.front.sessions; }) == std::vector<std::string>{"s"});

  SUBCASE("it holds nothing of another, and a session is one of a migration") {
    RawClient other = RawClient::unix_socket(server.path());
    other.go(true, {"x-nbdferry:session=s", "x-nbdferry:holds=id-2", "base:allocation"});
    other.send_request(nbd::RequestType::block_status, 0, 8192);
    CHECK(other.reply().flags == 1);  // base:allocation alone
    CHECK(server.on_loop([&] { return server.front.sessions.back(); }).empty());
  }
}

TEST_CASE("garbage at each stage of the handshake ends that connection only") {
  ServerThread server(size);
  const std::string garbage(1000, 'G');
  {
    RawClient client = RawClient::unix_socket(server.path());
    client.send(garbage);  // instead of client flags
    (void)client.receive(18);
    CHECK(client.is_closed());
  }
  {
    RawClient client = client_of(server);
    client.send(garbage);  // instead of an option
    CHECK(client.is_closed());
  }
  {
    RawClient client = client_of(server);
    client.send_option(opt_export_name, std::string(5000, 'n'));
    CHECK(client.is_closed());
  }
  {
    RawClient client = RawClient::unix_socket(server.path());
    client.go();
    client.send(garbage);  // instead of a request
    CHECK(client.is_closed());
  }
  for (const std::string& part : {std::string(), wire(3U), wire(3U) + "IHAVEOPT" + wire(7U)}) {
    RawClient client = RawClient::tcp(server.port());  // gone in the middle
    client.send(part);
  }
  CHECK(server.eventually([&] { return server.server->sessions() == 0; }));
  RawClient client = RawClient::unix_socket(server.path());
  client.go();
  CHECK(client.ask(nbd::RequestType::read, 0, 512).error == 0);
}

TEST_CASE("options sent byte by byte, and all at once, are understood alike") {
  ServerThread server(size);
  const std::string all = wire(3U) + "IHAVEOPT" + wire(opt_structured) + wire(0U) + "IHAVEOPT" +
                          wire(opt_go) + wire(6U) + info_request("") +
                          request_header(nbd::RequestType::read, 0, 512, 0, 7);
  for (const std::size_t piece : {std::size_t{1}, all.size()}) {
    RawClient client = RawClient::tcp(server.port());
    for (std::size_t at = 0; at < all.size(); at += piece) client.send(all.substr(at, piece));
    (void)client.receive(18);
    CHECK(client.option_answer().type == ack);
    CHECK(client.option_answer().type == 3);
    CHECK(client.option_answer().type == 3);
    CHECK(client.option_answer().type == ack);
    const RawReply reply = client.reply();
    CHECK(reply.chunk == 1);
    CHECK(reply.cookie == 7);
  }
}

}  // namespace nbdferry::proxy::test
