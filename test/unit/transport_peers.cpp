// The target against scripted peers: what no well-behaved server does, and what can only be seen
// from the other end of the wire (how a connection is closed, what is sent where).
#include <string>

#include "transport_harness.hpp"

#include <doctest/doctest.h>

namespace nbdferry::test {

namespace {

constexpr std::uint64_t mib = 1024 * 1024;

transport::TargetConfig config_for(const Listener& listener,
                                   std::chrono::milliseconds timeout = 10s) {
  transport::TargetConfig config;
  config.uris = {listener.uri()};
  config.connect_timeout = timeout;
  return config;
}

// A target that is up, with both of its connections.
struct TwoConnections {
  using Change = std::function<void(transport::TargetConfig&)>;
  explicit TwoConnections(const Change& change = [](auto&) {})
      : d([&] {
          auto config = config_for(listener);
          config.connections = 2;
          change(config);
          return config;
        }()) {
    d.target->open();
    first = d.accept(listener);
    first->send_hello(mib, flags_multi);
    second = d.accept(listener);
    second->send_hello(mib, flags_multi);
    REQUIRE(d.until([&] { return d.connections() == 2; }));
  }
  Listener listener;
  Driver d;
  std::unique_ptr<Peer> first;
  std::unique_ptr<Peer> second;
};

}  // namespace

TEST_CASE("a peer that isn't NBD is refused") {
  Listener listener;
  Driver d(config_for(listener));
  d.target->open();
  auto peer = d.accept(listener);
  peer->send("SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n");
  CHECK(d.until([&] { return d.count("refused") == 1; }));
  MESSAGE(d.reason);
}

TEST_CASE("a peer that closes at once is refused") {
  Listener listener;
  Driver d(config_for(listener));
  d.target->open();
  d.accept(listener)->close();
  CHECK(d.until([&] { return d.count("refused") == 1; }));
  MESSAGE(d.reason);
  CHECK(d.reason.find("the NBD handshake failed: ") != std::string::npos);
}

TEST_CASE("a peer that hangs in the handshake is refused in time, and reset") {
  Listener listener;
  Driver d(config_for(listener, 300ms));
  d.target->open();
  auto peer = d.accept(listener);
  peer->send("NBDMAGIC");
  CHECK(d.until([&] { return d.count("refused") == 1; }, 2s));
  CHECK(d.reason.find("handshake did not end within 0.3 s") != std::string::npos);
  CHECK(peer->ending() == "reset");
}

TEST_CASE("a peer that hangs with requests in flight is given up, and a slow one is not") {
  Listener listener;
  auto config = config_for(listener);
  config.answer_timeout = 400ms;
  Driver d(config);
  d.target->open();
  auto peer = d.accept(listener);
  peer->send_hello(mib, flags_plain);
  REQUIRE(d.until([&] { return d.count("up") == 1; }));
  d.run_for(800ms);  // nobody asked anything
  CHECK(d.count("lost") == 0);

  for (int i = 0; i < 6; ++i) (void)d.write(4096, 4096, 'a');
  for (int i = 0; i < 5; ++i) {  // in all longer than the timeout
    d.run_for(200ms);
    const auto r = d.request(*peer);
    REQUIRE(r);
    peer->send_reply(*r);
  }
  CHECK(d.count("lost") == 0);

  CHECK(d.until([&] { return d.count("lost") == 1; }, 2s));
  CHECK(d.reason.find("nothing moving for 0.4 s") != std::string::npos);
  CHECK(d.unanswered() == 0);
  CHECK(peer->ending() == "reset");
}

TEST_CASE("a hang costs one connection, or all when none answers") {
  TwoConnections two([](auto& config) { config.answer_timeout = 1200ms; });
  auto& [listener, d, first, second] = two;

  // The first vouches for the second; then it hangs.
  (void)d.write(0, 4096, 'a');
  const auto vouching = d.request(*first);
  REQUIRE(vouching);
  first->send_reply(*vouching);
  REQUIRE(d.until([&] { return d.unanswered() == 0; }));
  (void)d.write(0, 4096, 'a');
  REQUIRE(d.request(*first));
  bool others_answer = false;
  SUBCASE("none answers") {}
  SUBCASE("another answers") { others_answer = true; }
  if (others_answer) {
    d.run_for(600ms);
    (void)d.write(4096, 4096, 'b');
    const auto r = d.request(*second);
    REQUIRE(r);
    second->send_reply(*r);
  }
  CHECK(d.until([&] { return d.connections() == (others_answer ? 1 : 0); }, 5s));
  CHECK(d.count("lost") == (others_answer ? 0 : 1));
}

TEST_CASE("closing with nothing in flight says DISC and isn't a reset") {
  Listener listener;
  Driver d(config_for(listener));
  d.target->open();
  auto peer = d.accept(listener);
  peer->send_hello(mib, flags_plain);
  REQUIRE(d.until([&] { return d.count("up") == 1; }));
  d.target->close();
  CHECK(d.count("closed") == 0);  // never from inside a member function
  CHECK(d.until([&] { return d.count("closed") == 1; }));
  const auto disc = d.request(*peer);
  REQUIRE(disc);
  CHECK(disc->type == cmd_disc);
  CHECK(peer->ending() == "end");
}

TEST_CASE("closing with a write in flight is a reset, and the write is lost (rule 8)") {
  Listener listener;
  Driver d(config_for(listener));
  d.target->open();
  auto peer = d.accept(listener);
  peer->send_hello(mib, flags_plain);
  REQUIRE(d.until([&] { return d.count("up") == 1; }));
  const auto id = d.write(0, 4096, 'x');
  REQUIRE(d.request(*peer));
  d.target->close();
  CHECK(d.until([&] { return d.count("closed") == 1; }));
  REQUIRE(d.done(id) != nullptr);
  CHECK(d.done(id)->error == IoError::lost);
  CHECK(peer->ending() == "reset");
}

TEST_CASE("a target that is destroyed with all in flight says nothing, and resets") {
  Listener listener;
  Driver d(config_for(listener));
  d.target->open();
  auto peer = d.accept(listener);
  peer->send_hello(mib, flags_plain);
  REQUIRE(d.until([&] { return d.count("up") == 1; }));
  const auto id = d.write(0, 4096, 'x');
  REQUIRE(d.request(*peer));
  d.target.reset();
  d.run_for(50ms);
  CHECK(d.done(id) == nullptr);
  CHECK(peer->ending() == "reset");
}

TEST_CASE("a target may be destroyed from its own event") {
  Listener listener;
  Driver d(config_for(listener));
  d.target->open();
  auto peer = d.accept(listener);
  peer->send_hello(mib, flags_plain);
  REQUIRE(d.until([&] { return d.count("up") == 1; }));
  d.on_event = [&](const mirror::Event& event) {
    if (std::holds_alternative<mirror::TargetDone>(event)) d.target.reset();
  };
  d.write(0, 4096, 'x');
  d.write(4096, 4096, 'x');
  for (int i = 0; i < 2; ++i) {
    const auto r = d.request(*peer);
    REQUIRE(r);
    peer->send_reply(*r);
  }
  CHECK(d.until([&] { return d.target == nullptr; }));
  d.run_for(50ms);
}

TEST_CASE("a reply that makes no sense ends the connection: the rest is lost") {
  Listener listener;
  Driver d(config_for(listener));
  d.target->open();
  auto peer = d.accept(listener);
  peer->send_hello(mib, flags_plain);
  REQUIRE(d.until([&] { return d.count("up") == 1; }));
  const auto answered = d.write(0, 4096, 'a');
  const auto unanswered = d.write(4096, 4096, 'b');
  const auto r = d.request(*peer);
  REQUIRE(r);
  peer->send_reply(*r, 28);  // ENOSPC
  peer->send(std::string(16, 'Z'));
  CHECK(d.until([&] { return d.count("lost") == 1; }));
  CHECK(d.done(answered)->error == IoError::no_space);
  CHECK(d.done(unanswered)->error == IoError::lost);
  CHECK(d.reason.find("magic") != std::string::npos);
}

TEST_CASE("a loss closes the window first, and is said when even late operations are answered") {
  Listener listener;
  Driver d(config_for(listener));
  d.target->open();
  auto peer = d.accept(listener);
  peer->send_hello(mib, flags_plain);
  REQUIRE(d.until([&] { return d.count("up") == 1; }));
  int late = 0;
  d.on_event = [&](const mirror::Event& event) {
    if (const auto* done = std::get_if<mirror::TargetDone>(&event); done && late < 5) {
      CHECK(done->error == IoError::lost);
      CHECK(d.window_ops == 0);
      ++late;
      d.submit(make_op(Command::flush));
    }
  };
  d.write(0, 4096, 'a');
  d.write(4096, 4096, 'b');
  REQUIRE(d.request(*peer));
  peer->close();
  // That nothing is unanswered at TargetLost is checked as it arrives.
  CHECK(d.until([&] { return d.count("lost") == 1; }));
  CHECK(late == 5);
  CHECK(d.log == std::vector<std::string>{"up", "window", "lost"});
}

TEST_CASE("one connection of several is replaced: its operations are lost, the others go on") {
  TwoConnections two;
  auto& [listener, d, first, second] = two;
  const auto window = d.window_ops;

  // Least in flight first: one each. (At once they would leave together.)
  const auto a = d.write(0, 4096, 'a');
  const auto on_first = d.request(*first);
  const auto b = d.write(4096, 4096, 'b');
  const auto on_second = d.request(*second);
  REQUIRE(on_first);
  REQUIRE(on_second);
  second->close();
  REQUIRE(d.until([&] { return d.window_ops == window / 2; }));
  CHECK(d.done(b)->error == IoError::lost);
  CHECK(d.done(a) == nullptr);
  first->send_reply(*on_first);
  REQUIRE(d.until([&] { return d.done(a) != nullptr; }));
  CHECK(d.done(a)->error == IoError::none);

  auto third = d.accept(listener);
  third->send_hello(mib, flags_multi);
  CHECK(d.until([&] { return d.window_ops == window; }));
  CHECK(d.count("lost") == 0);
}

TEST_CASE("what is small and submitted at once leaves together, the rest spreads") {
  TwoConnections two;
  auto& [listener, d, first, second] = two;
  for (std::uint64_t i = 0; i < 12; ++i) (void)d.write(i * 4096, 4096, 'a');
  (void)d.write(mib / 2, 65536, 'b');
  std::vector<std::uint64_t> on_first;
  std::vector<std::uint64_t> on_second;
  for (auto [peer, offsets] : {std::pair(first.get(), &on_first), {second.get(), &on_second}}) {
    while (const auto request = d.request(*peer)) {
      offsets->push_back(request->offset);
      if (offsets->size() == (offsets == &on_first ? 8 : 4)) break;
    }
  }
  // 32 KiB, then the other one has less in flight; each in order.
  CHECK(on_first == std::vector<std::uint64_t>{0, 4096, 8192, 12288, 16384, 20480, 24576, 28672});
  CHECK(on_second == std::vector<std::uint64_t>{32768, 36864, 40960, 45056});
  const auto large = d.request(*second);
  REQUIRE(large);
  CHECK(large->length == 65536);
}

TEST_CASE("all connections reset at once: who asks again at each loss is not answered for ever") {
  TwoConnections two;
  auto& [listener, d, first, second] = two;
  (void)d.write(0, 4096, 'a');  // so that the second counts, too (rule 7)
  const auto vouching = d.request(*first);
  REQUIRE(vouching);
  first->send_reply(*vouching);
  REQUIRE(d.until([&] { return d.unanswered() == 0; }));
  (void)d.write(0, 4096, 'a');
  (void)d.write(4096, 4096, 'b');
  d.run_for(50ms);
  for (std::uint64_t i = 0; i < 4; ++i) (void)d.write(i * 4096, 4096, 'b');
  d.run_for(50ms);

  // As the core does after a pivot: what is lost is asked again while there is a window.
  int again = 0;
  constexpr int too_often = 1000;
  d.on_event = [&](const mirror::Event& event) {
    const auto* done = std::get_if<mirror::TargetDone>(&event);
    if (done != nullptr && done->error == IoError::lost && d.window_ops > 0 && again < too_often) {
      ++again;
      (void)d.write(0, 4096, 'c');
    }
  };
  first->close();  // with requests unread: resets
  second->close();
  CHECK(d.until([&] { return d.count("lost") == 1; }));
  CHECK(again < too_often);
  CHECK(d.unanswered() == 0);
}

TEST_CASE("a replacement proves nothing before an older connection has answered (rule 7)") {
  TwoConnections two;
  auto& [listener, d, first, second] = two;

  bool vouched = false;
  SUBCASE("nothing asked meanwhile: the server may have restarted") {}
  SUBCASE("the older one has answered a request of since then") {
    vouched = true;
    d.write(0, 4096, 'a');  // the first connection: it has the least in flight, and comes first
    const auto r = d.request(*first);
    REQUIRE(r);
    first->send_reply(*r);
    REQUIRE(d.until([&] { return d.unanswered() == 0; }));
  }
  if (!vouched) {
    // Flushes go where the answer means something.
    d.submit(make_op(Command::flush));
    d.submit(make_op(Command::flush));
    REQUIRE(d.request(*first));
    REQUIRE(d.request(*first));
    CHECK_FALSE(second->next());
  }
  const auto in_flight = d.unanswered();
  first->close();
  if (vouched) {
    CHECK(d.until([&] { return d.connections() == 1; }));
    CHECK(d.count("lost") == 0);
  } else {
    CHECK(d.until([&] { return d.count("lost") == 1; }));
    CHECK(in_flight == 2);
    CHECK(d.unanswered() == 0);
  }
}

TEST_CASE("a replacement that offers something else isn't taken") {
  Listener listener;
  auto config = config_for(listener);
  config.connections = 2;
  Driver d(config);
  d.target->open();
  auto first = d.accept(listener);
  first->send_hello(mib, flags_multi);
  auto second = d.accept(listener);
  second->send_hello(2 * mib, flags_multi);
  d.run_for(80ms);
  CHECK(d.connections() == 1);
  CHECK(d.log == std::vector<std::string>{"up"});
  auto third = d.accept(listener);
  third->send_hello(mib, flags_multi);
  CHECK(d.until([&] { return d.connections() == 2; }));
}

TEST_CASE("an attempt that fails later is repeated, with growing delays, and never refused") {
  Listener listener;
  Driver d(config_for(listener));
  d.target->open();
  auto peer = d.accept(listener);
  peer->send_hello(mib, flags_plain);
  REQUIRE(d.until([&] { return d.count("up") == 1; }));
  peer->close();
  REQUIRE(d.until([&] { return d.count("lost") == 1; }));
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 3; ++i) d.accept(listener)->close();  // after 100, 200, 400 ms
  const auto taken = std::chrono::steady_clock::now() - begin;
  CHECK(taken >= 600ms);
  CHECK(taken < 2s);
  CHECK(d.log == std::vector<std::string>{"up", "window", "lost"});
  d.target->close();
  CHECK(d.until([&] { return d.count("closed") == 1; }));
}

TEST_CASE("operations before TargetUp and after close are lost, once") {
  Listener listener;
  Driver d(config_for(listener));
  CHECK(d.call(make_op(Command::read, 0, 4096)).error == IoError::lost);
  d.target->open();
  CHECK(d.call(make_op(Command::flush)).error == IoError::lost);
  d.target->close();
  CHECK(d.until([&] { return d.count("closed") == 1; }));
  CHECK(d.call(make_op(Command::cache, 0, 4096)).error == IoError::lost);
}

}  // namespace nbdferry::test
