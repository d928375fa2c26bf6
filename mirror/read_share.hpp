// ReadShare: how much the copier reads from the local disk at once. It yields to the guest: where the
// guest's own reads and writes there take much longer than they do without the copier, it reads less.
//
// What must hold: never less than one copy at a time, so that the end comes nearer; the guest's p99
// of an interval decides, against the best p99 of late.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "mirror/types.hpp"

namespace nbdferry::mirror {

class ReadShare {
 public:
  ReadShare(std::uint64_t bytes_min, std::uint64_t bytes_max)
      : bytes_min_(bytes_min), bytes_max_(bytes_max), bytes_(bytes_max) {}

  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }

  // The local disk answered the guest after so long.
  void guest_waited(Duration took) {
    if (samples_.size() < samples_max) samples_.push_back(took);
  }

  void tick(Time now) {
    if (now - since_ < interval) return;
    since_ = now;
    if (samples_.size() < samples_min) {
      // An idle guest is not disturbed. The few that it sends are judged later, together.
      bytes_ = std::min(bytes_max_, bytes_ + bytes_min_);
      return;
    }
    const auto nth = samples_.begin() + static_cast<std::ptrdiff_t>(samples_.size() * 99 / 100);
    std::nth_element(samples_.begin(), nth, samples_.end());
    const Duration p99 = *nth;
    samples_.clear();
    // A disk that became slower for another reason is the normal one after a while.
    best_ = p99 <= best_ ? p99 : best_ + best_ / forget;
    if (p99 > 2 * best_ + slack) {
      bytes_ = std::max(bytes_min_, bytes_ / 2);
    } else {
      bytes_ = std::min(bytes_max_, bytes_ + bytes_min_);
    }
  }

 private:
  static constexpr Duration interval = std::chrono::milliseconds(100);
  static constexpr Duration slack = std::chrono::milliseconds(1);
  static constexpr std::size_t samples_min = 20;
  static constexpr std::size_t samples_max = 4096;
  static constexpr int forget = 100;  // 1 % at each interval
  std::uint64_t bytes_min_;
  std::uint64_t bytes_max_;
  std::uint64_t bytes_;
  std::vector<Duration> samples_;
  Duration best_ = std::chrono::hours(1);
  Time since_{0};
};

}  // namespace nbdferry::mirror
