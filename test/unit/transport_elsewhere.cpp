// What is sent by a helper thread: with TLS, all that doesn't leave at once.
#include <atomic>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "transport_harness.hpp"

#include <doctest/doctest.h>

#include "transport/elsewhere.hpp"

namespace nbdferry::test {

namespace {

constexpr std::uint64_t mib = 1024 * 1024;

// nbdkit with a pre-shared key.
struct SecretServer {
  TempDir dir;
  Listener listener;
  std::string keys = dir.path("keys");
  std::string uri =
      "nbds://alice@localhost:" + std::to_string(listener.port()) + "/?tls-psk-file=" + keys;
  std::unique_ptr<Process> process;

  SecretServer() {
    std::ofstream(keys) << "alice:0123456789abcdef0123456789abcdef\n";
    process =
        std::make_unique<Process>(std::vector<std::string>{"nbdkit", "-f", "--tls=require",
                                                           "--tls-psk=" + keys, "memory", "64M"},
                                  &listener);
  }
};

// As much as the window takes, of many sizes, each with a letter of its own; large ones do not leave at once.
std::vector<mirror::DiskOp> many_writes() {
  std::vector<mirror::DiskOp> ops;
  const std::vector<std::uint64_t> sizes = {512, mib, 4096, 3 * 65536, 16384, 2 * mib, 1024};
  std::uint64_t at = 0;
  for (unsigned i = 0; i < 32; ++i) {
    const auto size = sizes[i % sizes.size()];
    ops.push_back(make_op(Command::write, at, size));
    ops.back().payload = filled(size, static_cast<char>('a' + i % 26));
    at += size;
  }
  return ops;
}

}  // namespace

TEST_CASE("work elsewhere comes back, unless it was recalled") {
  boost::asio::io_context io{1};
  const auto here = std::this_thread::get_id();
  transport::Elsewhere elsewhere(io.get_executor());
  std::thread::id worked;
  int backs = 0;
  for (int i = 0; i < 3; ++i) {
    CHECK_FALSE(elsewhere.is_busy());
    elsewhere.start([&] { worked = std::this_thread::get_id(); },
                    [&] {
                      ++backs;
                      CHECK_FALSE(elsewhere.is_busy());
                      CHECK(std::this_thread::get_id() == here);
                    });
    CHECK(elsewhere.is_busy());
    io.run();  // the work keeps it from ending
    io.restart();
    CHECK(backs == i + 1);
    CHECK(worked != here);
  }

  // Recalled at any moment: its work has ended, or never begins.
  for (int i = 0; i < 300; ++i) {
    std::atomic<bool> works = false;
    std::atomic<int> ran = 0;
    elsewhere.start(
        [&] {
          works = true;
          std::this_thread::sleep_for(std::chrono::microseconds(i % 7 * 10));
          ++ran;
          works = false;
        },
        [&] { ++backs; });
    std::this_thread::sleep_for(std::chrono::microseconds(i % 11 * 10));
    elsewhere.recall();
    CHECK_FALSE(works);
    CHECK_FALSE(elsewhere.is_busy());
    const int before = ran;
    io.poll();
    io.restart();
    CHECK(ran == before);
  }
  CHECK(backs == 3);
}

TEST_CASE("with TLS small and large writes all arrive, whoever sends them") {
  SecretServer server;
  Driver d(server.uri, 64 * mib);
  REQUIRE(d.open());
  REQUIRE(d.until([&] { return d.connections() == 4; }));
  const auto ops = many_writes();
  std::vector<OpId> ids;
  for (int round = 0; round < 4; ++round) {
    ids.clear();
    for (const auto& op : ops) {
      ids.push_back(d.submit(op));
      if (round % 2 == 1) d.io.poll();  // between large ones that are under way
    }
    CHECK(d.until([&] { return d.unanswered() == 0; }));
    for (const auto id : ids) CHECK(d.done(id)->error == IoError::none);
  }
  for (const auto& op : ops) {
    const auto read = d.call(make_op(Command::read, op.range.begin, op.range.length()));
    REQUIRE(read.error == IoError::none);
    CHECK(std::equal(read.data.bytes().begin(), read.data.bytes().end(), op.payload.bytes().begin(),
                     op.payload.bytes().end()));
  }
  d.target->close();
  CHECK(d.until([&] { return d.count("closed") == 1; }));
}

TEST_CASE("with TLS a server that dies in the middle of large writes: each is lost, once") {
  SecretServer server;
  Driver d(server.uri, 64 * mib);
  REQUIRE(d.open());
  REQUIRE(d.until([&] { return d.connections() == 4; }));
  for (const auto& op : many_writes()) d.submit(op);
  for (int i = 0; i < 3; ++i) d.io.poll_one();
  server.process->kill();
  CHECK(d.until([&] { return d.count("lost") == 1 && d.unanswered() == 0; }));
  CHECK_FALSE(d.reason.empty());
}

TEST_CASE("with TLS a target may be closed, or destroyed, at any moment of large writes") {
  SecretServer server;
  for (int moment = 0; moment < 40; ++moment) {
    CAPTURE(moment);
    Driver d(server.uri, 64 * mib);
    REQUIRE(d.open());
    for (const auto& op : many_writes()) d.submit(op);
    for (int i = 0; i < moment; ++i) d.io.run_one_for(1ms);
    if (moment % 2 == 0) {
      d.target->close();
      CHECK(d.until([&] { return d.count("closed") == 1; }));
      CHECK(d.unanswered() == 0);
    } else {
      d.target.reset();
    }
    d.io.poll();
  }
}

}  // namespace nbdferry::test
