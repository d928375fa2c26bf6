// NBD requests over a real socket: what is checked, what reaches the export, how it is answered.
#include <algorithm>
#include <random>

#include <doctest/doctest.h>

#include "proxy/checksum.hpp"
#include "proxy/limits.hpp"
#include "proxy/nbd_errors.hpp"
#include "proxy/nbd_request.hpp"
#include "test/unit/proxy_nbd_fixture.hpp"

namespace nbdferry::proxy::test {
namespace {

using Type = nbd::RequestType;

constexpr std::uint64_t size = 64ULL << 20;
constexpr std::uint32_t eperm = 1, eio = 5, einval = 22, enospc = 28, enotsup = 95, eshutdown = 108;

RawClient client_of(ServerThread& server, bool structured = false,
                    const std::vector<std::string>& contexts = {}) {
  RawClient client = RawClient::unix_socket(server.path());
  client.go(structured, contexts);
  return client;
}

std::string pattern(std::size_t bytes, unsigned seed) {
  std::string text(bytes, '\0');
  std::mt19937 random(seed);
  std::generate(text.begin(), text.end(), [&] { return static_cast<char>(random()); });
  return text;
}

}  // namespace

TEST_CASE("what is written is read back, small and large, in place and copied, on unix and TCP") {
  ServerThread server(size);
  for (const auto when : {MemoryFront::When::at_once, MemoryFront::When::posted}) {
    server.on_loop([&] { return server.front.when = when; });
    for (const bool structured : {false, true}) {
      RawClient client =
          structured ? RawClient::tcp(server.port()) : RawClient::unix_socket(server.path());
      client.go(structured);
      for (const std::uint32_t length :
           {1U, 511U, 4096U, 16384U, 16385U, 65536U, 1U << 20, 32U << 20}) {
        CAPTURE(length);
        const auto data = pattern(length, length);
        CHECK(client.ask(Type::write, 12345, length, 0, data).error == 0);
        const RawReply read = client.ask(Type::read, 12345, length);
        // Compared outside of CHECK: nobody wants to see 32 MiB.
        const bool same = read.body == (structured ? wire(std::uint64_t{12345}) : "") + data;
        CHECK(same);
        CHECK(read.flags == (structured ? 1 : 0));
      }
    }
  }
}

TEST_CASE("many requests at once are each answered, with their own cookie and data") {
  ServerThread server(size);
  for (const auto when : {MemoryFront::When::at_once, MemoryFront::When::posted}) {
    server.on_loop([&] { return server.front.when = when; });
    RawClient client = client_of(server);
    constexpr std::uint32_t count = 1000;  // beyond the requests in flight
    std::string all;
    std::mt19937 random(7);
    for (std::uint32_t i = 0; i < count; ++i) {
      const std::uint32_t length = 1 + random() % (i % 10 == 0 ? 40'000 : 5000);
      all += request_header(Type::write, i * 50'000ULL, length, 0, i) + std::string(length, 'a');
    }
    std::thread sender([&] { client.send(all); });
    std::vector<bool> answered(count);
    for (std::uint32_t i = 0; i < count; ++i) {
      const RawReply reply = client.reply();
      CHECK(reply.error == 0);
      REQUIRE(reply.cookie < count);
      CHECK_FALSE(answered[reply.cookie]);
      answered[reply.cookie] = true;
    }
    sender.join();
  }
}

TEST_CASE("errors are those of the protocol, and the connection goes on") {
  ServerThread server(size);
  RawClient client = client_of(server);
  const std::string block(4096, 'x');
  CHECK(client.ask(Type::write, size - 4095, 4096, 0, block).error == enospc);
  CHECK(client.ask(Type::write, ~0ULL - 100, 4096, 0, block).error == enospc);
  CHECK(client.ask(Type::write_zeroes, size, 1).error == enospc);
  CHECK(client.ask(Type::read, size - 1, 2).error == einval);
  CHECK(client.ask(Type::read, ~0ULL, 2).error == einval);
  CHECK(client.ask(Type::trim, size, 1).error == einval);
  CHECK(client.ask(Type::cache, size, 1).error == einval);
  CHECK(client.ask(Type::read, 0, (32U << 20) + 1).error == einval);
  CHECK(client.ask(Type{8}, 0, 0).error == einval);
  CHECK(client.ask(Type{4711}, 0, 512).error == einval);
  CHECK(client.ask(Type::flush, 0, 1).error == einval);
  CHECK(client.ask(Type::flush, 1, 0).error == einval);
  CHECK(client.ask(Type::block_status, 0, 4096).error == einval);  // never negotiated
  // Flags: known ones on the wrong command, DF without structured replies, unknown ones.
  CHECK(client.ask(Type::read, 0, 512, nbd::cmd_no_hole).error == einval);
  CHECK(client.ask(Type::read, 0, 512, nbd::cmd_df).error == einval);
  CHECK(client.ask(Type::write, 0, 4096, nbd::cmd_fast_zero, block).error == einval);
  CHECK(client.ask(Type::write, 0, 4096, 1 << 15, block).error == einval);
  CHECK(client.ask(Type::trim, 0, 4096, nbd::cmd_req_one).error == einval);
  CHECK(server.on_loop([&] { return server.front.seen.size(); }) == 0);
  // A payload beyond the limit is drained.
  CHECK(client.ask(Type::write, 0, (32U << 20) + 5, 0, std::string((32U << 20) + 5, 'x')).error ==
        einval);
  CHECK(client.ask(Type::write, 0, 4096, 0, block).error == 0);
}

TEST_CASE("FUA is accepted on every command; flags reach the export where they mean something") {
  ServerThread server(size);
  RawClient client = client_of(server, true, {"base:allocation"});
  const std::string block(4096, 'x');
  for (const Type type : {Type::read, Type::write, Type::flush, Type::trim, Type::cache,
                          Type::write_zeroes, Type::block_status}) {
    CAPTURE(static_cast<int>(type));
    const std::uint32_t length = type == Type::flush ? 0 : 4096;
    CHECK(client.ask(type, 0, length, nbd::cmd_fua, type == Type::write ? block : "").error == 0);
  }
  CHECK(client.ask(Type::write_zeroes, 0, 4096, nbd::cmd_no_hole | nbd::cmd_fast_zero).error == 0);
  const auto seen = server.on_loop([&] { return server.front.seen; });
  REQUIRE(seen.size() == 8);
  for (std::size_t i = 0; i < 7; ++i) CHECK(seen[i].fua == is_write(seen[i].command));
  CHECK((seen[7].no_hole && seen[7].fast_zero && !seen[7].fua));
}

TEST_CASE("zero length: success without reaching the export, but for flush") {
  ServerThread server(size);
  RawClient client = client_of(server);
  for (const Type type : {Type::read, Type::write, Type::trim, Type::cache, Type::write_zeroes}) {
    CHECK(client.ask(type, size, 0).error == 0);
  }
  CHECK(server.on_loop([&] { return server.front.seen.size(); }) == 0);
  CHECK(client.ask(Type::flush, 0, 0).error == 0);
  CHECK(server.on_loop([&] { return server.front.seen.size(); }) == 1);
  RawClient structured = client_of(server, true, {"base:allocation"});
  const RawReply read = structured.ask(Type::read, 0, 0);
  CHECK(read.chunk == 0);
  CHECK(read.flags == 1);
  CHECK(structured.ask(Type::block_status, 0, 0).error == einval);
}

TEST_CASE("a trim or zero larger than any payload is fine") {
  constexpr std::uint64_t large = 5ULL << 30;
  boost::asio::io_context io;
  ExportInfo info;
  info.size = large;
  for (const Type type : {Type::trim, Type::write_zeroes, Type::cache}) {
    CHECK(nbd::check({0, type, 0, 0, 0xffffffff}, info, {}) == IoError::none);
  }
  ServerThread server(size);
  RawClient client = client_of(server);
  CHECK(client.ask(Type::write_zeroes, 0, 64U << 20).error == 0);
  CHECK(client.ask(Type::trim, 0, 64U << 20).error == 0);
}

TEST_CASE("read-only exports and foreign sessions get EPERM, and their payload is drained") {
  ServerThread server(size);
  RawClient client = client_of(server);
  const auto all_refused = [&] {
    for (const std::uint32_t length : {512U, 100'000U}) {
      CHECK(client.ask(Type::write, 0, length, 0, std::string(length, 'x')).error == eperm);
    }
    CHECK(client.ask(Type::trim, 0, 512).error == eperm);
    CHECK(client.ask(Type::write_zeroes, 0, 512).error == eperm);
    CHECK(client.ask(Type::read, 0, 512).error == 0);
    CHECK(client.ask(Type::flush, 0, 0).error == 0);
  };
  server.on_loop([&] { return server.front.writes_allowed = false; });
  all_refused();
  server.on_loop([&] {
    server.front.writes_allowed = true;
    return server.front.info_.read_only = true;
  });
  all_refused();
  CHECK((transmission_flags(server.front.info_, false) & nbd::read_only) != 0);
}

TEST_CASE("the minimum block is enforced cleanly") {
  ServerThread server(size);
  server.on_loop([&] { return server.front.info_.block_min = 512; });
  RawClient client = client_of(server);
  CHECK(client.ask(Type::read, 1, 512).error == einval);
  CHECK(client.ask(Type::read, 512, 511).error == einval);
  CHECK(client.ask(Type::write, 256, 512, 0, std::string(512, 'x')).error == einval);
  CHECK(client.ask(Type::read, 512, 512).error == 0);
}

TEST_CASE("the export's errors are told in the protocol's codes") {
  ServerThread server(size);
  RawClient simple = client_of(server);
  RawClient structured = client_of(server, true, {"base:allocation"});
  const std::string block(4096, 'x');
  const auto fail_with = [&](IoError error) {
    server.on_loop([&] {
      for (const auto c : {Command::read, Command::write, Command::zero, Command::block_status}) {
        server.front.failures[c] = error;
      }
      return 0;
    });
  };
  fail_with(IoError::io);
  CHECK(simple.ask(Type::read, 0, 4096).error == eio);
  CHECK(simple.ask(Type::write, 0, 4096, 0, block).error == eio);
  const RawReply read = structured.ask(Type::read, 0, 4096);
  CHECK(read.chunk == 0x8001);  // never a simple reply
  CHECK(read.error == eio);
  CHECK(structured.ask(Type::read, size, 1).chunk == 0x8001);
  CHECK(structured.ask(Type::block_status, 0, 4096).chunk == 0x8001);
  fail_with(IoError::not_supported);
  CHECK(simple.ask(Type::write_zeroes, 0, 4096, nbd::cmd_fast_zero).error == enotsup);
  CHECK(simple.ask(Type::write_zeroes, 0, 4096).error == einval);
  fail_with(IoError::shutdown);
  CHECK(simple.ask(Type::write, 0, 4096, 0, block).error == eshutdown);
  fail_with(IoError::lost);
  CHECK(simple.ask(Type::write, 0, 4096, 0, block).error == eio);
  // Nothing but the protocol's eight codes and zero.
  const std::vector<std::uint32_t> codes{0, 1, 5, 12, 22, 28, 95, 108};
  for (int e = 0; e <= static_cast<int>(IoError::lost); ++e) {
    const auto code = nbd::error_code(static_cast<IoError>(e), e % 2 == 0);
    CHECK(std::count(codes.begin(), codes.end(), code) == 1);
  }
}

TEST_CASE("DF: one content chunk, of any length") {
  ServerThread server(size);
  RawClient client = client_of(server, true);
  for (const std::uint32_t length : {512U, 65536U, 32U << 20}) {
    const RawReply reply = client.ask(Type::read, 0, length, nbd::cmd_df);
    CHECK(reply.chunk == 1);
    CHECK(reply.flags == 1);
    CHECK(reply.body.size() == length + 8);
  }
}

TEST_CASE("BLOCK_STATUS: extents within the request, one with REQ_ONE") {
  ServerThread server(size);
  RawClient client = client_of(server, true, {"base:allocation"});
  CHECK(client.ask(Type::write, 4096, 4096, 0, std::string(4096, 'x')).error == 0);
  const auto hole = [](std::uint32_t n) { return wire(n) + wire(3U); };
  const auto data = [](std::uint32_t n) { return wire(n) + wire(0U); };
  CHECK(client.ask(Type::block_status, 0, 1 << 20).body ==
        wire(1U) + hole(4096) + data(4096) + hole((1 << 20) - 8192));
  CHECK(client.ask(Type::block_status, 100, 5000).body == wire(1U) + hole(3996) + data(1004));
  CHECK(client.ask(Type::block_status, 100, 5000, nbd::cmd_req_one).body == wire(1U) + hole(3996));
  CHECK(client.ask(Type::block_status, 0, 100, nbd::cmd_req_one).body == wire(1U) + hole(100));
  CHECK(client.ask(Type::block_status, size - 1, 2).error == einval);
}

TEST_CASE("BLOCK_STATUS with REQ_ONE: a checksum, in halves, where its contexts are selected") {
  ServerThread server(size);
  const std::string low = "x-nbdferry:xxh3-low";
  const std::string high = "x-nbdferry:xxh3-high";
  RawClient client = client_of(server, true, {high, "base:allocation", low});
  const auto data = pattern(100'000, 3);
  CHECK(client.ask(Type::write, 5000, 100'000, 0, data).error == 0);
  const auto expect = [&](std::uint32_t id, std::uint32_t length, std::uint64_t flags, bool last) {
    const RawReply reply = client.reply();
    CHECK(reply.body == wire(id) + wire(length) + wire(static_cast<std::uint32_t>(flags)));
    CHECK(reply.flags == (last ? 1 : 0));
  };
  const auto sum = checksum_of(std::as_bytes(std::span(data)));
  client.send_request(Type::block_status, 5000, 100'000, nbd::cmd_req_one);
  expect(1, 100'000, 0, false);  // nothing is said of the allocation
  expect(5, 100'000, sum & 0xffffffff, false);
  expect(6, 100'000, sum >> 32, true);
  // Without the flag nothing is computed.
  client.send_request(Type::block_status, 0, 4096);
  expect(1, 4096, 3, false);
  expect(5, 4096, 0, false);
  expect(6, 4096, 0, true);
  CHECK(server.on_loop([&] { return server.front.seen.back().command; }) == Command::block_status);
  // Of more than may be asked at once: of its beginning.
  client.send_request(Type::block_status, 1 << 20, 60 << 20, nbd::cmd_req_one);
  const auto zeroes = checksum_of(Bytes(limits::checksum_bytes_max));
  expect(1, limits::checksum_bytes_max, 0, false);
  expect(5, limits::checksum_bytes_max, zeroes & 0xffffffff, false);
  expect(6, limits::checksum_bytes_max, zeroes >> 32, true);

  SUBCASE("half of it is told, too") {
    client = client_of(server, true, {low});
    client.send_request(Type::block_status, 5000, 100'000, nbd::cmd_req_one);
    expect(5, 100'000, sum & 0xffffffff, true);
  }
  SUBCASE("who can't make one says so") {
    server.on_loop(
        [&] { return server.front.failures[Command::checksum] = IoError::not_supported; });
    CHECK(client.ask(Type::block_status, 0, 4096, nbd::cmd_req_one).error == einval);
    CHECK(client.ask(Type::block_status, size - 1, 2, nbd::cmd_req_one).error == einval);
  }
  SUBCASE("many at once are bounded as reads are") {
    server.on_loop([&] { return server.front.when = MemoryFront::When::held; });
    for (int i = 0; i < 64; ++i) {
      client.send_request(Type::block_status, 0, 60 << 20, nbd::cmd_req_one);
    }
    CHECK(server.eventually([&] { return server.front.held.size() == 16; }));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(server.on_loop([&] { return server.front.held.size(); }) == 16);
  }
}

TEST_CASE("unread input: whole requests up to a DISC, or not") {
  const auto ends = [](const std::string& text, std::size_t skip = 0) {
    return nbd::ends_in_disc(std::as_bytes(std::span(text)), skip);
  };
  const std::string write = request_header(Type::write, 0, 5) + "hello";
  const std::string disc = request_header(Type::disc, 0, 0);
  CHECK(ends(disc));
  CHECK(ends(write + request_header(Type::read, 0, 4096) + write + disc));
  CHECK(ends("llo" + write + disc, 3));
  CHECK(ends(disc + "garbage"));
  CHECK_FALSE(ends(""));
  CHECK_FALSE(ends(write));
  CHECK_FALSE(ends(write + disc.substr(1)));
  CHECK_FALSE(ends(write + disc.substr(0, 27)));
  CHECK_FALSE(ends(request_header(Type::write, 0, 5) + "hell" + disc));
  CHECK_FALSE(ends(disc, 29));
  // They would all be in flight at once: not without a bound.
  std::string trims;
  for (std::size_t i = 0; i < limits::last_words_requests_max; ++i) {
    trims += request_header(Type::trim, 0, 512);
  }
  CHECK(ends(trims + disc));
  CHECK_FALSE(ends(trims + request_header(Type::trim, 0, 512) + disc));
}

}  // namespace nbdferry::proxy::test
