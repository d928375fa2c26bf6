// Several paths to one target: which is tried when, what is used after which proof, and what the loss of one
// of them means. Against real servers, by local addresses of the loopback, and against scripted peers.
#include <algorithm>
#include <string>

#include "transport_harness.hpp"

#include <doctest/doctest.h>

#include "transport/rate_gauge.hpp"

namespace nbdferry::test {

namespace {

constexpr std::uint64_t mib = 1024 * 1024;

transport::TargetConfig config_of(std::vector<std::string> uris,
                                  std::vector<std::string> vias = {}) {
  transport::TargetConfig config;
  config.uris = std::move(uris);
  config.vias = std::move(vias);
  return config;
}

std::vector<std::string> nbdkit(std::vector<std::string> plugin) {
  std::vector<std::string> command = {"nbdkit", "-f"};
  command.insert(command.end(), plugin.begin(), plugin.end());
  return command;
}

mirror::DiskOp read_by(PathId path) {
  auto op = make_op(Command::read, 0, 4096);
  op.path = path;
  return op;
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Two scripted peers, one behind each path, both used.
struct TwoPaths {
  explicit TwoPaths(std::uint16_t flags = flags_multi, Duration silence = 10s)
      : d([&] {
          auto config = config_of({a.uri(), b.uri()});
          config.connections = 1;
          config.path_silence = silence;
          return config;
        }()) {
    d.target->open();
    first = d.accept(a);
    first->send_hello(mib, flags);
    second = d.accept(b);
    second->send_hello(mib, flags);
    REQUIRE(d.until([&] { return d.found.size() == 1; }));
  }
  void use() {
    d.target->use(d.found.back().path);
    REQUIRE(d.until([&] { return d.connections(1) == 1; }));
  }
  // Whatever has come by now is answered.
  void answer(Peer& peer) {
    while (const auto r = peer.next()) peer.send_reply(*r);
  }
  Listener a;
  Listener b;
  Driver d;
  std::unique_ptr<Peer> first;
  std::unique_ptr<Peer> second;
};

}  // namespace

TEST_CASE("two local addresses make two paths, and both carry once the second is proved") {
  Listener listener;
  const auto uri = listener.uri();
  Process server(nbdkit({"memory", "8M"}), &listener);
  Driver d(config_of({uri}, {"127.0.0.2", "127.0.0.3"}));
  REQUIRE_MESSAGE(d.open(), d.reason);
  REQUIRE(d.until([&] { return d.connections() == 4 && d.found.size() == 1; }));
  CHECK_FALSE(d.found[0].known);
  CHECK(d.target->paths()[1].via == "127.0.0.3");
  CHECK(d.state(1) == "connecting");
  const auto window = d.window_ops;
  for (std::uint64_t i = 0; i < 16; ++i) (void)d.write(i * 65536, 65536, 'x');
  REQUIRE(d.until([&] { return d.unanswered() == 0; }));
  CHECK(d.target->paths()[1].sent_bytes == 0);
  CHECK(d.call(read_by(d.found[0].path)).data.data()[0] == std::byte{'x'});
  CHECK(d.call(read_by(PathId{99})).error == IoError::lost);

  d.target->use(d.found[0].path);
  CHECK(d.until([&] { return d.connections(1) == 4 && d.window_ops == 2 * window; }));
  // How much by which one is a matter of their speed.
  CHECK(d.write_until([&] { return d.target->paths()[1].sent_bytes > mib; }));
  REQUIRE(d.until([&] { return d.unanswered() == 0; }));
  CHECK(d.call(make_op(Command::flush)).error == IoError::none);
  CHECK(d.state(1) == "up");
}

TEST_CASE("an address that is not this host's, or of the other kind") {
  const auto refusal = [](const std::string& via) {
    Driver d(config_of({"nbd://127.0.0.1:1/"}, {via}));
    CHECK_FALSE(d.open());
    return d.reason;
  };
  CHECK(has(refusal("203.0.113.7"), "cannot bind to 203.0.113.7: "));
  CHECK(has(refusal("203.0.113.7"), "is it this host's?"));
  CHECK(has(refusal("::1"), "one is IPv4, the other IPv6"));
}

TEST_CASE("paths that can't be") {
  const auto wrong = [](std::vector<std::string> uris, std::vector<std::string> vias,
                        const std::string& why) {
    std::string text;
    try {
      Driver d(config_of(std::move(uris), std::move(vias)));
    } catch (const std::invalid_argument& e) {
      text = e.what();
    }
    CAPTURE(text);
    CHECK(has(text, why));
  };
  wrong({}, {}, "no URI");
  wrong({"nbd://a", "nbd://b"}, {"10.0.0.1"}, "1 local addresses for 2 URIs");
  wrong({"nbd://a", "nbd://a"}, {}, "given twice");
  wrong({"nbd://a"}, {"10.0.0.1", "10.0.0.1"}, "given twice");
  wrong({"nbd://a"}, {"eth0"}, "not an address");
  wrong({"nbd+unix:///?socket=/s"}, {"10.0.0.1"}, "no local address");
  wrong({"nbd://a"}, std::vector<std::string>(17, "10.0.0.1"), "at most 16");
}

TEST_CASE(
    "the first path can't be reached: the next one is the target, and the first comes later") {
  Listener dead;
  const auto port = dead.port();
  const auto uri = dead.uri();
  dead.close();
  Listener listener;
  auto config = config_of({uri, listener.uri()});
  Process server(nbdkit({"memory", "8M"}), &listener);
  SUBCASE("the next one") {
    Driver d(config);
    REQUIRE_MESSAGE(d.open(), d.reason);
    CHECK(d.until([&] { return d.connections(1) == 4 && d.state(0) == "down"; }));
    Listener late(port);
    Process other(nbdkit({"memory", "8M"}), &late);
    CHECK(d.until([&] { return d.found.size() == 1; }));
  }
  SUBCASE("none: each says why") {
    server.kill();
    Driver d(config);
    CHECK_FALSE(d.open());
    CHECK(has(d.reason, config.uris[0] + ": cannot connect"));
    CHECK(has(d.reason, config.uris[1] + ": cannot connect"));
  }
}

TEST_CASE("a path that leads elsewhere is refused, by its offer or by the core") {
  Listener listener;
  Listener wrong;
  const auto config = config_of({listener.uri(), wrong.uri()});
  Process server(nbdkit({"memory", "8M"}), &listener);
  bool by_offer = false;
  SUBCASE("another size") { by_offer = true; }
  SUBCASE("alike, and the core finds out") {}
  Process other(nbdkit({"memory", by_offer ? "16M" : "8M"}), &wrong);
  Driver d(config);
  REQUIRE_MESSAGE(d.open(), d.reason);
  if (!by_offer) {
    REQUIRE(d.until([&] { return d.found.size() == 1; }));
    d.target->refuse(d.found[0].path, "it is another one");
  }
  CHECK(d.until([&] { return d.count("path refused") == 1; }));
  MESSAGE(d.reason);
  CHECK(has(d.reason, config.uris[1]));
  CHECK(has(d.reason, config.uris[0]));
  d.run_for(300ms);
  CHECK(d.found.size() == (by_offer ? 0 : 1));
  CHECK(d.state(1) == "refused");
  CHECK(d.connections(0) == 4);
  CHECK(d.count("lost") == 0);
}

TEST_CASE("a flush is on every path, and a path that wrote since is lost with what it wrote") {
  TwoPaths two;
  two.use();
  auto& d = two.d;
  (void)d.write(0, 4096, 'a');
  (void)d.write(4096, 4096, 'b');
  d.run_for(20ms);
  two.answer(*two.first);
  two.answer(*two.second);
  REQUIRE(d.until([&] { return d.unanswered() == 0; }));

  const auto flush = d.submit(make_op(Command::flush));
  const auto on_first = d.request(*two.first);
  const auto on_second = d.request(*two.second);
  REQUIRE(on_first);
  REQUIRE(on_second);
  two.first->send_reply(*on_first);
  d.run_for(30ms);
  CHECK(d.done(flush) == nullptr);
  bool flushed = false;
  SUBCASE("flushed") { flushed = true; }
  SUBCASE("lost within the flush") {}
  if (flushed) {
    two.second->send_reply(*on_second);
    REQUIRE(d.until([&] { return d.done(flush) != nullptr; }));
    CHECK(d.done(flush)->error == IoError::none);
  }
  two.second->close();
  CHECK(d.until([&] { return d.connections(1) == 0; }));
  d.run_for(20ms);
  CHECK(d.count("path lost") == 1);
  CHECK(d.unflushed == !flushed);
  REQUIRE(d.done(flush) != nullptr);
  CHECK(d.done(flush)->error == (flushed ? IoError::none : IoError::lost));
  CHECK(d.count("lost") == 0);
  CHECK(d.connections(0) == 1);
  CHECK(d.state(1) == "down");

  // It comes back, and has to be proved again.
  auto again = d.accept(two.b);
  again->send_hello(mib, flags_multi);
  REQUIRE(d.until([&] { return d.found.size() == 2; }));
  CHECK(d.found[1].known);
  CHECK(d.found[1].path != d.found[0].path);
  CHECK(d.found[1].nonce != d.found[0].nonce);
  d.target->use(d.found[0].path);  // of before: it is there no more
  d.run_for(20ms);
  CHECK(d.connections(1) == 0);
  d.target->use(d.found[1].path);
  CHECK(d.until([&] { return d.connections(1) == 1; }));
}

TEST_CASE(
    "all paths lost: the target is lost, and whichever known one is back first brings it up") {
  TwoPaths two;
  bool known = true;
  SUBCASE("the second was used") { two.use(); }
  SUBCASE("the second was never proved: it is not tried") { known = false; }
  auto& d = two.d;
  two.first->close();
  two.second->close();
  REQUIRE(d.until([&] { return d.count("lost") == 1; }));
  if (known) {
    auto back = d.accept(two.b);
    back->send_hello(mib, flags_multi);
    CHECK(d.until([&] { return d.count("up") == 2; }));
    CHECK(d.connections(1) == 1);
    // The first one is a path like any other now.
    std::unique_ptr<Peer> probe;
    CHECK(d.until([&] {
      probe = d.accept(two.a);
      try {
        probe->send_hello(mib, flags_multi);
      } catch (const std::exception&) {
        return false;  // from before the other one was back: let go of
      }
      d.run_for(50ms);
      return d.found.size() == 2;
    }));
  } else {
    auto back = d.accept(two.a);
    back->send_hello(mib, flags_multi);
    CHECK(d.until([&] { return d.count("up") == 2; }));
  }
}

TEST_CASE("a server says ESHUTDOWN among good answers while the window is full") {
  TwoPaths two;
  two.use();
  auto& d = two.d;
  d.run_for(20ms);
  std::uint64_t n = 0;
  const auto write = [&] { (void)d.write(n++ % 256 * 4096, 4096, 'a'); };
  while (d.unanswered() < d.window_ops) write();
  d.run_for(300ms);
  std::vector<Peer::Request> first;
  while (const auto r = two.first->next()) first.push_back(*r);
  REQUIRE(first.size() > 2);
  // As the core does: whatever is answered makes room within the window that it was told.
  d.on_event = [&](const mirror::Event& e) {
    if (!std::holds_alternative<mirror::TargetDone>(e)) return;
    if (d.unanswered() - 1 < d.window_ops && n < 2000) write();
  };
  std::string all;  // in one segment
  for (std::size_t i = 0; i <= first.size() / 2; ++i) {
    all += Peer::reply(first[i], i < first.size() / 2 ? 0 : error_shutdown);
  }
  two.first->send(all);
  CHECK(d.until([&] { return d.count("path lost") == 1; }));
  CHECK(d.connections(1) == 1);
}

TEST_CASE("a path that says nothing while the other answers is given up") {
  TwoPaths two(flags_multi, 1s);
  two.use();
  auto& d = two.d;
  bool flushing = false;
  SUBCASE("with a write to answer") {}
  SUBCASE("with a flush to answer, which the other has answered") { flushing = true; }
  if (flushing) {
    (void)d.submit(make_op(Command::flush));
  } else {
    while (!two.second->next()) {
      (void)d.write(0, 4096, 'a');
      d.run_for(5ms);
      two.answer(*two.first);
    }
  }
  std::uint64_t at = 0;
  CHECK(d.until(
      [&] {
        two.answer(*two.first);
        if (d.count("path lost") != 0) return true;
        (void)d.write(++at % 128 * 4096, 4096, 'b');
        d.run_for(20ms);
        return false;
      },
      10s));
  CHECK(has(d.reason, "no answer, while other paths answer"));
  CHECK(d.count("lost") == 0);
  CHECK(d.connections(0) == 1);
}

TEST_CASE("a path that is left is found again, and its read is lost") {
  TwoPaths two;
  auto& d = two.d;
  const auto read = d.submit(read_by(d.found[0].path));
  REQUIRE(d.request(*two.second));
  d.target->leave(d.found[0].path);
  REQUIRE(d.until([&] { return d.done(read) != nullptr; }));
  CHECK(d.done(read)->error == IoError::lost);
  auto again = d.accept(two.b);
  again->send_hello(mib, flags_multi);
  CHECK(d.until([&] { return d.found.size() == 2; }));
}

TEST_CASE("a path that is found again and again, and never answers, is refused") {
  TwoPaths two;
  auto& d = two.d;
  std::vector<std::unique_ptr<Peer>> probes;
  CHECK(d.until(
      [&] {
        if (two.second) two.second->close();
        two.second.reset();
        if (d.count("path refused") != 0) return true;
        probes.push_back(d.accept(two.b));
        probes.back()->send_hello(mib, flags_multi);
        d.run_for(50ms);
        probes.back()->close();
        return false;
      },
      20s));
  CHECK(has(d.reason, "never answers"));
}

TEST_CASE("a path that dies while it waits for the verdict is found again") {
  TwoPaths two;
  auto& d = two.d;
  const auto read = d.submit(read_by(d.found[0].path));
  REQUIRE(d.request(*two.second));
  two.second->close();
  REQUIRE(d.until([&] { return d.done(read) != nullptr; }));
  CHECK(d.done(read)->error == IoError::lost);
  CHECK(d.count("window") == 0);
  auto again = d.accept(two.b);
  again->send_hello(mib, flags_multi);
  CHECK(d.until([&] { return d.found.size() == 2; }));
}

TEST_CASE("without multi-conn a path that was proved stands by, and takes over") {
  TwoPaths two(flags_plain);
  auto& d = two.d;
  d.target->use(d.found[0].path);
  CHECK(d.until([&] { return d.state(1) == "standby"; }));
  CHECK(two.second->ending() == "end");
  CHECK(d.connections(0) == 1);
  two.first->close();
  REQUIRE(d.until([&] { return d.count("lost") == 1; }));
  auto over = d.accept(two.b);
  over->send_hello(mib, flags_plain);
  CHECK(d.until([&] { return d.count("up") == 2 && d.state(1) == "up"; }));
  CHECK(d.state(0) == "standby");
}

TEST_CASE("a server that shuts down is left, and the next one awaited") {
  TwoPaths two;
  auto& d = two.d;
  const auto write = d.write(0, 4096, 'a');
  const auto r = d.request(*two.first);
  REQUIRE(r);
  two.first->send_reply(*r, error_shutdown);
  REQUIRE(d.until([&] { return d.count("lost") == 1; }));
  CHECK(d.done(write)->error == IoError::shutdown);
  CHECK(has(d.reason, "shutting down"));
}

TEST_CASE("what is small does not wait behind bulk, and a silent path gets nothing more") {
  TwoPaths two;
  two.use();
  auto& d = two.d;
  (void)d.write(0, 512 * 1024, 'a');  // by the first
  (void)d.write(mib / 2, 4096, 'b');
  CHECK(d.request(*two.second));
  // Of the two the second has less in flight; but it says nothing.
  d.run_for(100ms);
  const auto r = d.request(*two.first);
  REQUIRE(r);
  two.first->send_reply(*r);
  REQUIRE(d.until([&] { return d.unanswered() == 1; }));
  (void)d.write(0, 256 * 1024, 'c');
  (void)d.write(3 * mib / 4, 4096, 'd');
  CHECK(d.request(*two.first));
  CHECK(d.request(*two.first));
  CHECK_FALSE(two.second->next());
}

TEST_CASE("a gauge knows a path that had enough to carry, and forgets") {
  transport::RateGauge gauge;
  transport::RateGauge::Clock::time_point t{std::chrono::hours(1)};
  gauge.update(t, 4096, 0);
  gauge.update(t += 1s, 0, 4096);
  CHECK(gauge.rate(t) == 0);  // a second for 4 KiB: it waited for work
  gauge.update(t, mib, 0);
  for (int i = 0; i < 10; ++i) gauge.update(t += 10ms, mib, mib);
  CHECK(gauge.rate(t) == doctest::Approx(100.0 * mib));
  CHECK(gauge.rate(t + 3s) == 0);
}

}  // namespace nbdferry::test
