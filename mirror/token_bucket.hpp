// TokenBucket: bytes that may be sent, at a rate. What is sent may overdraw it once, and is paid back
// before the next; so an operation of any size gets through, and the rate holds over time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "mirror/assert.hpp"
#include "mirror/types.hpp"

namespace nbdferry::mirror {

class TokenBucket {
 public:
  // What a late wake-up may catch up with; of a window of 5 s it is 2 %.
  static constexpr double burst_seconds = 0.1;

  // Bytes a second; 0: without limit.
  void set_rate(std::uint64_t rate) {
    rate_ = static_cast<double>(rate);
    tokens_ = std::min(tokens_, burst());
  }

  void refill(Time now) {
    const double seconds = std::chrono::duration<double>(now - at_).count();
    at_ = now;
    tokens_ = std::min(burst(), tokens_ + rate_ * seconds);
  }

  [[nodiscard]] bool may_send() const {
    return rate_ == 0 || tokens_ > 0 || NBDFERRY_MUTANT(bandwidth_is_ignored);
  }
  void sent(std::uint64_t bytes) {
    if (rate_ != 0) tokens_ -= static_cast<double>(bytes);
  }

 private:
  [[nodiscard]] double burst() const { return rate_ * burst_seconds; }
  double rate_ = 0;
  double tokens_ = 0;
  Time at_{0};
};

}  // namespace nbdferry::mirror
