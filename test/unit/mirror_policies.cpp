// The core's small controllers: each is a function of what it is told and of the time.
#include <random>

#include <doctest/doctest.h>

#include "mirror/bulk_window.hpp"
#include "mirror/mode_policy.hpp"
#include "mirror/pacer.hpp"
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

TEST_CASE("bulk fills the path's own delay and a short queue") {
  BulkWindow window(1024 * 1024);
  CHECK(window.bytes(1e9) == 1024 * 1024);  // nothing is known yet
  window.answered(milliseconds(2));
  CHECK(window.bytes(125e6) == doctest::Approx(125e6 * 0.012).epsilon(0.001));
  window.answered(milliseconds(50));  // its own queue: not the path's delay
  CHECK(window.bytes(125e6) == doctest::Approx(125e6 * 0.012).epsilon(0.001));
  CHECK(window.bytes(1e6) == 1024 * 1024);
  window.reset();
  window.answered(milliseconds(150));
  CHECK(window.bytes(125e6) == doctest::Approx(125e6 * 0.1875).epsilon(0.001));
}

}  // namespace
}  // namespace nbdferry::mirror
