// The core's small controllers: each is a function of what it is told and of the time.
#include <deque>
#include <random>

#include <doctest/doctest.h>

#include "mirror/bulk_window.hpp"
#include "mirror/deadline.hpp"
#include "mirror/heat_map.hpp"
#include "mirror/mode_policy.hpp"
#include "mirror/pacer.hpp"
#include "mirror/read_share.hpp"
#include "mirror/token_bucket.hpp"

namespace nbdferry::mirror {
namespace {

using std::chrono::milliseconds;
using std::chrono::minutes;
using std::chrono::seconds;

constexpr Duration tick = milliseconds(5);

TEST_CASE("auto: async until the buffer is full, sync until the target has caught up") {
  ModePolicy policy(seconds(2));
  Time now = seconds(100);
  CHECK_FALSE(policy.decide(now, {0.79, false, true, false}));
  CHECK_FALSE(policy.decide(now, {0.9, true, false, false}));  // a target that is silent
  const auto to_sync = policy.decide(now, {0.81, false, true, false});
  REQUIRE(to_sync);
  CHECK(to_sync->mode == Mode::sync);
  CHECK_FALSE(policy.decide(now + seconds(1), {0, false, true, true}));   // too soon
  CHECK_FALSE(policy.decide(now + seconds(3), {0, false, true, false}));  // not yet
  const auto to_async = policy.decide(now + seconds(3), {0, false, true, true});
  REQUIRE(to_async);
  CHECK(to_async->mode == Mode::async);
  CHECK(policy.decide(now + minutes(5), {0.1, true, true, false}));  // what overflowed is enough
}

// A guest whose load oscillates, whatever its period: a few changes a minute, once the policy has
// seen it a few times.
TEST_CASE("auto does not flap") {
  for (const int period_ms : {10, 100, 500, 1000, 3000, 10000}) {
    CAPTURE(period_ms);
    ModePolicy policy(seconds(2));
    int changes = 0;
    const Time settled = minutes(3);
    for (Time now = seconds(1); now < minutes(13); now += tick) {
      const bool high = now / milliseconds(period_ms) % 2 == 0;
      const double used = high && policy.mode() == Mode::async ? 0.9 : 0.0;
      const auto change = policy.decide(now, {used, false, true, !high});
      if (change && now >= settled) ++changes;
    }
    CHECK(changes <= 10 * 6);
  }
}

TEST_CASE("pacing keeps its limit, comes smoothly, and goes when the buffer drains") {
  std::mt19937 dice(7);
  const Duration limit = milliseconds(50);
  Pacer pacer;
  Time now{0};
  Duration before{0};
  double used = 0;
  for (int i = 0; i < 100'000; ++i) {
    used = std::clamp(used + std::uniform_real_distribution<>(-0.05, 0.05)(dice), 0.0, 1.0);
    pacer.tick(now += tick, used, limit);
    CHECK(pacer.delay() >= Duration{0});
    CHECK(pacer.delay() <= limit);
    CHECK(pacer.delay() - before <= limit / 10 + milliseconds(1));
    before = pacer.delay();
  }
  for (int i = 0; i < 100; ++i) pacer.tick(now += tick, 0.7, limit);
  CHECK(pacer.delay() > Duration{0});
  // Released soon although the buffer is far from empty.
  for (int i = 0; i < 20; ++i) pacer.tick(now += tick, 0.7 - 0.005 * i, limit);
  CHECK(pacer.delay() == Duration{0});
  for (int i = 0; i < 100; ++i) pacer.tick(now += tick, 0.3, limit);
  CHECK(pacer.delay() == Duration{0});
  for (int i = 0; i < 100; ++i) pacer.tick(now += tick, 0.9, Duration{0});
  CHECK(pacer.delay() == Duration{0});
}

TEST_CASE("a bandwidth limit holds over time, whatever the size of what is sent") {
  std::mt19937 dice(7);
  constexpr std::uint64_t rate = 50 * 1024 * 1024;
  TokenBucket bucket;
  CHECK(bucket.may_send());
  bucket.set_rate(rate);
  Time now = seconds(3);
  bucket.refill(now);
  const Time begin = now;
  std::uint64_t sent = 0;
  while (now < begin + seconds(5)) {
    bucket.refill(now += milliseconds(std::uniform_int_distribution<>(0, 10)(dice)));
    while (bucket.may_send()) {
      const std::uint64_t bytes = std::uniform_int_distribution<std::uint64_t>(1, 1 << 20)(dice);
      bucket.sent(bytes);
      sent += bytes;
    }
  }
  CHECK(static_cast<double>(sent) > 0.95 * 5 * rate);
  CHECK(static_cast<double>(sent) < 1.05 * 5 * rate);
  bucket.set_rate(0);
  CHECK(bucket.may_send());
}

namespace {

// One that takes bytes one after the other, at a rate, and answers after its delay.
struct Path {
  BulkWindow& window;
  double rate;
  Duration delay;
  Time now = seconds(1);
  Time free_at{0};
  struct Sent {
    BulkWindow::Sending sending;
    Time answered;
  };
  std::deque<Sent> sent = {};
  static constexpr std::uint64_t piece = 128 * 1024;

  void send() {
    free_at = std::max(free_at, now) + Duration(static_cast<std::int64_t>(piece / rate * 1e9));
    sent.push_back({window.sends(now, sent.size() * piece), free_at + delay});
  }
  void answer() {
    now = std::max(now, sent.front().answered);
    const Sent s = sent.front();
    sent.pop_front();
    window.answered(now, s.sending, piece);
  }
  // The server has a pause: then all answers come at once.
  void pause(Duration time) {
    now += time;
    for (auto& s : sent) s.answered = std::max(s.answered, now);
  }
  // As much as may be, for so long.
  void fill(Duration time) {
    for (const Time end = now + time; now < end;) {
      while (sent.empty() || (sent.size() + 1) * piece <= window.bytes()) send();
      window.held_back();
      answer();
    }
  }
  void trickle(Duration time) {
    while (!sent.empty()) answer();
    for (const Time end = now + time; now < end; now += milliseconds(50)) {
      send();
      answer();
    }
  }
};

}  // namespace

TEST_CASE("bulk fills the path's own delay and a short queue") {
  BulkWindow window(1024 * 1024);
  CHECK(window.bytes() == 1024 * 1024);  // nothing is known yet
  Path path{window, 125e6, milliseconds(2)};
  path.fill(seconds(3));
  CHECK(window.bytes() == doctest::Approx(125e6 * 0.012).epsilon(0.1));
  path.rate = 30e6;  // less now: that is seen when the old is forgotten
  path.fill(seconds(4));
  CHECK(window.bytes() == 1024 * 1024);
  CHECK(window.bytes_per_second() == doctest::Approx(30e6).epsilon(0.1));
  // A long path is full soon: 1 MiB, then twice as much in each of its round trips.
  window.reset();
  Path far{window, 125e6, milliseconds(150)};
  far.fill(milliseconds(1500));
  CHECK(window.bytes() > 125e6 * 0.1875 * 0.9);
  far.fill(seconds(5));
  CHECK(window.bytes() == doctest::Approx(125e6 * 0.1875).epsilon(0.1));
  // Nobody has anything to send: what it carries is not forgotten.
  far.trickle(seconds(10));
  CHECK(window.bytes() == doctest::Approx(125e6 * 0.1875).epsilon(0.1));
}

TEST_CASE(
    "bulk: answers that come all at once are no fast path, and what was too much is forgotten") {
  BulkWindow window(1024 * 1024);
  Path path{window, 125e6, milliseconds(2)};
  for (int i = 0; i < 40; ++i) {
    path.fill(milliseconds(50));
    path.pause(milliseconds(20));
  }
  CHECK(window.bytes() < 125e6 * 0.012 * 1.25);
  // A tenth of the rate, and nobody who sends that much: others hold it back.
  path.rate = 12.5e6;
  for (const Time end = path.now + seconds(4); path.now < end;) {
    while (path.sent.size() < 8) path.send();
    path.answer();
  }
  CHECK(window.bytes_per_second() < 15e6);
}

TEST_CASE(
    "bulk: a path whose own delay grows is filled again, and a queue is not taken for delay") {
  BulkWindow window(1024 * 1024);
  Path path{window, 125e6, milliseconds(2)};
  path.fill(seconds(60));
  CHECK(window.fastest() < milliseconds(5));
  CHECK(window.bytes() < 125e6 * 0.015 * 1.1);
  path.delay = milliseconds(60);
  path.fill(seconds(20));
  CHECK(window.bytes() > 125e6 * 0.06);
  CHECK(window.bytes() < 125e6 * 0.08 * 1.1);
}

TEST_CASE("heat: a place that is written much more than the rest, until it cools") {
  constexpr std::uint64_t mib = 1024 * 1024;
  HeatMap heat(1024 * mib, mib);
  Time now = seconds(1);
  heat.tick(now);
  for (std::uint64_t at = 0; at < 1024; ++at) heat.wrote({at * mib, at * mib + 4096});
  CHECK_FALSE(heat.hot(5 * mib));
  for (int i = 0; i < 20; ++i) heat.wrote({5 * mib + 4096, 5 * mib + 8192});
  CHECK(heat.hot(5 * mib));
  CHECK_FALSE(heat.hot(6 * mib));
  CHECK(heat.alike({0, 8 * mib}) == ByteRange{0, 5 * mib});
  CHECK(heat.alike({5 * mib, 8 * mib}) == ByteRange{5 * mib, 6 * mib});
  CHECK(heat.alike({6 * mib, 8 * mib}) == ByteRange{6 * mib, 8 * mib});
  for (int i = 0; i < 3; ++i) heat.tick(now += seconds(1));
  CHECK_FALSE(heat.hot(5 * mib));
}

TEST_CASE("heat: a disk that is written evenly has no hot place, and the map is bounded") {
  constexpr std::uint64_t size = std::uint64_t{64} << 40;
  HeatMap heat(size, 1024 * 1024);
  std::mt19937_64 dice(3);
  for (int i = 0; i < 200'000; ++i) {
    const std::uint64_t at = dice() % (size / 4096) * 4096;
    heat.wrote({at, at + 4096});
  }
  int hot = 0;
  for (int i = 0; i < 10'000; ++i) hot += heat.hot(dice() % size) ? 1 : 0;
  CHECK(hot < 500);       // chance: a region of 1 GiB got four times its share
  heat.wrote({0, size});  // touches each region, and fills none
  CHECK(heat.region_end(0) == (std::uint64_t{2} << 30));
}

TEST_CASE("the copier reads less while the guest waits for its disk, and more again after it") {
  ReadShare share(256, 8192);
  Time now = seconds(1);
  const auto interval = [&](Duration latency) {
    for (int i = 0; i < 50; ++i) share.guest_waited(latency);
    share.tick(now += milliseconds(100));
  };
  interval(milliseconds(1));
  CHECK(share.bytes() == 8192);
  interval(milliseconds(2));  // within what is normal
  CHECK(share.bytes() == 8192);
  interval(milliseconds(20));
  CHECK(share.bytes() == 4096);
  for (int i = 0; i < 20; ++i) interval(milliseconds(20));
  CHECK(share.bytes() == 256);  // never nothing
  for (int i = 0; i < 40; ++i) interval(milliseconds(1));
  CHECK(share.bytes() == 8192);
  // A disk that has become slow for good is the normal one after a while.
  for (int i = 0; i < 600; ++i) interval(milliseconds(20));
  CHECK(share.bytes() == 8192);
  // One slow request is no measure, and an idle guest is not disturbed.
  share.guest_waited(seconds(1));
  share.tick(now += milliseconds(100));
  CHECK(share.bytes() == 8192);
}

TEST_CASE(
    "a deadline: full speed for a moment, then what it needs, and all of it when it is over") {
  Deadline deadline;
  Time now = seconds(10);
  CHECK_FALSE(deadline.given());
  CHECK(deadline.allowed(1000, now) == 0);
  deadline.set(seconds(100), now);
  CHECK(deadline.left(now + seconds(30)) == seconds(70));
  CHECK(deadline.allowed(90'000, now + seconds(1)) == 0);  // to see what the paths carry
  CHECK(deadline.needed(90'000, now) == doctest::Approx(1000));
  CHECK(deadline.allowed(40'000, now + seconds(50)) == doctest::Approx(1000));
  CHECK(deadline.allowed(80'000, now + seconds(50)) == doctest::Approx(2000));
  CHECK(deadline.allowed(80'000, now + seconds(92)) == 0);
  CHECK(deadline.needed(80'000, now + seconds(92)) == doctest::Approx(10'000));
  CHECK(deadline.allowed(90'000, now + seconds(101)) == 0);
  deadline.set(Duration{0}, now + seconds(20));
  CHECK_FALSE(deadline.given());
  CHECK(deadline.needed(90'000, now + seconds(50)) == 0);
}

}  // namespace
}  // namespace nbdferry::mirror
