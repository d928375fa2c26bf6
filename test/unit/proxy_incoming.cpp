// An incoming disk, and the migrations that come to it.
#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <doctest/doctest.h>

#include "proxy/export.hpp"
#include "test/unit/proxy_disk_fixture.hpp"

namespace nbdferry::proxy::test {

namespace {

constexpr std::uint64_t mib = 1024 * 1024;
const std::string source(32, 'a');

struct Client final : ReplySink {
  void reply(mirror::Reply&& reply) override { replies.push_back(reply.error); }
  void fence() override { fenced = true; }
  std::vector<IoError> replies;
  bool fenced = false;
};

struct Incoming {
  TempDir dir;
  std::string disk = dir / "disk.img";
  boost::asio::io_context io{1};
  // The record's helper thread posts to it.
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work{io.get_executor()};
  std::unique_ptr<Export> front = open();

  std::unique_ptr<Export> open() {
    ExportOptions options;
    options.disk = disk;
    options.incoming = true;
    options.create_size = mib;
    return Export::open(io, options);
  }
  void write(std::uint32_t session, std::byte fill) {
    mirror::GuestRequest request;
    request.id = make_request_id(session, 0);
    request.command = Command::write;
    request.range = {0, 4096};
    Buffer data(4096);
    std::fill(data.bytes().begin(), data.bytes().end(), fill);
    request.payload = std::move(data).freeze();
    front->submit(std::move(request));
  }
  template <typename Done>
  void run_until(Done&& done) {
    for (int i = 0; i < 1000 && !done(); ++i) io.run_for(std::chrono::milliseconds(10));
  }
  static std::string id(char which) { return source + "." + std::string(32, which); }
};

}  // namespace

TEST_CASE("incoming: a migration is recorded before anything of it is written, and then held") {
  Incoming incoming;
  Client client;
  const auto session = incoming.front->attach(client, {Incoming::id('1'), "s"});
  incoming.write(session, std::byte{1});
  CHECK(client.replies.empty());
  CHECK_FALSE(incoming.front->holds_migration(Incoming::id('1')));
  incoming.run_until([&] { return !client.replies.empty(); });
  CHECK(client.replies == std::vector{IoError::none});
  CHECK(incoming.front->holds_migration(Incoming::id('1')));
  CHECK_FALSE(incoming.front->holds_migration(Incoming::id('2')));
}

TEST_CASE("incoming: one that replaces another while that is being recorded is served") {
  Incoming incoming;
  Client first;
  Client second;
  const auto a = incoming.front->attach(first, {Incoming::id('1'), "s"});
  incoming.write(a, std::byte{1});
  const auto b = incoming.front->attach(second, {Incoming::id('2'), "t"});
  incoming.write(b, std::byte{2});
  CHECK(first.fenced);
  CHECK(incoming.front->may_write(b));
  CHECK_FALSE(incoming.front->may_write(a));
  incoming.run_until([&] { return !second.replies.empty(); });
  CHECK(second.replies == std::vector{IoError::none});
  CHECK_FALSE(second.fenced);
  CHECK(incoming.front->holds_migration(Incoming::id('2')));
  CHECK_FALSE(incoming.front->holds_migration(Incoming::id('1')));
  CHECK(file_contents(incoming.disk)[0] == 2);

  SUBCASE("its other sessions are let go when a newer one comes") {
    Client newer;
    (void)incoming.front->attach(newer, {Incoming::id('2'), "u"});
    CHECK(second.fenced);
    CHECK_FALSE(newer.fenced);
  }
}

}  // namespace nbdferry::proxy::test
