// RateMeter: bytes per second, smoothed over about a second of busy time.
#pragma once

#include "mirror/types.hpp"

namespace nbdferry::mirror {

class RateMeter {
 public:
  void add(std::uint64_t bytes) { pending_ += bytes; }

  // `busy`: there was work for the target all the time. An idle interval says nothing of what the
  // target could carry, so it is left out.
  void tick(Time now, bool busy) {
    if (since_ == Time{0}) since_ = now;  // the first interval begins with the first tick
    if (now - since_ < interval) return;
    const double seconds = std::chrono::duration<double>(now - since_).count();
    const double sample = static_cast<double>(pending_) / seconds;
    if (busy || sample > rate_) rate_ = rate_ == 0 ? sample : rate_ + (sample - rate_) * weight;
    since_ = now;
    pending_ = 0;
  }

  [[nodiscard]] double bytes_per_second() const { return rate_; }

 private:
  static constexpr Duration interval = std::chrono::milliseconds(100);
  static constexpr double weight = 0.2;
  Time since_{0};
  std::uint64_t pending_ = 0;
  double rate_ = 0;
};

}  // namespace nbdferry::mirror
