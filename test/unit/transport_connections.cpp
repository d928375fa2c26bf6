// How many connections a path gets: chosen by what they bring, within what the server takes.
#include "transport_harness.hpp"

#include <doctest/doctest.h>

#include "transport/connection_growth.hpp"

namespace nbdferry::test {

using transport::ConnectionGrowth;

namespace {

auto now = ConnectionGrowth::Clock::time_point{} + 1h;

// Looks for a minute at a path that carries what `rate` says of a number of connections.
template <typename Rate>
void grow(ConnectionGrowth& growth, Rate rate) {
  for (int i = 0; i < 1200; ++i) {
    now += 50ms;
    (void)growth.observe(now, rate(growth.count()), 150ms);
  }
}

// nbdkit, each of whose connections carries 64 KiB in 30 ms from the first one on. (Its filter `rate` has
// saved up for a while when a connection begins.)
struct Slow {
  explicit Slow(const std::vector<std::string>& filters, const std::vector<std::string>& arguments)
      : uri(listener.uri()),
        server(
            [&] {
              std::vector<std::string> command = {"nbdkit", "-f", "--threads=1"};
              command.insert(command.end(), filters.begin(), filters.end());
              command.insert(command.end(), {"--filter=delay", "memory", "8M", "wdelay=30ms"});
              command.insert(command.end(), arguments.begin(), arguments.end());
              return command;
            }(),
            &listener),
        d(uri) {}

  Listener listener;
  std::string uri;
  Process server;
  Driver d;
};

}  // namespace

TEST_CASE("connections are added as long as they bring more") {
  ConnectionGrowth growth(4, 16);
  SUBCASE("each brings as much as the others: as many as there may be") {
    grow(growth, [](unsigned n) { return 20e6 * n; });
    CHECK(growth.count() == 16);
  }
  SUBCASE("the link is full with four: one look at more") {
    grow(growth, [](unsigned) { return 110e6; });
    CHECK(growth.count() == 6);
    // It was mended since, and each carries so much.
    grow(growth, [](unsigned n) { return 50e6 * n; });
    CHECK(growth.count() == 16);
  }
  SUBCASE("the link is full with seven") {
    grow(growth, [](unsigned n) { return std::min(20e6 * n, 140e6); });
    CHECK(growth.count() == 13);
  }
  SUBCASE("nothing to carry") {
    grow(growth, [](unsigned) { return 0; });
    CHECK(growth.count() == 4);
  }
  SUBCASE("no more are to be had") {
    growth.stop(5);
    grow(growth, [](unsigned n) { return 20e6 * n; });
    CHECK(growth.count() == 5);
  }
}

TEST_CASE("a path whose connections are slow gets more of them") {
  Slow slow({}, {});
  REQUIRE_MESSAGE(slow.d.open(), slow.d.reason);
  CHECK(slow.d.write_until([&] { return slow.d.connections() > 6; }, 20s));
}

TEST_CASE("a server that takes no more connections keeps those that it took") {
  Slow slow({"--filter=limit"}, {"limit=5"});
  REQUIRE_MESSAGE(slow.d.open(), slow.d.reason);
  CHECK(slow.d.write_until([&] { return slow.d.connections() == 5; }, 20s));
  slow.d.run_for(300ms);
  CHECK(slow.d.connections() == 5);
  CHECK(slow.d.state(0) == "up");
  CHECK(slow.d.count("lost") == 0);
}

}  // namespace nbdferry::test
