// RateGauge: what a path carries when it has enough to carry. Bytes a second, smoothed, over the time in
// which it is busy: a path that waits for work says nothing of how fast it is. What is old is forgotten, so
// that a path which was slow is tried again.
#pragma once

#include <chrono>
#include <cstdint>

namespace nbdferry::transport {

class RateGauge {
 public:
  using Clock = std::chrono::steady_clock;

  // So much is in flight from now on; `done` of it was answered just now.
  void update(Clock::time_point now, std::uint64_t in_flight, std::uint64_t done) {
    if (busy_) {
      elapsed_ += now - since_;
      done_ += done;
    }
    since_ = now;
    busy_ = in_flight >= busy_bytes_min;
    if (elapsed_ < sample_time) return;
    const double sample =
        static_cast<double>(done_) / std::chrono::duration<double>(elapsed_).count();
    rate_ = rate_ == 0 ? sample : rate_ + (sample - rate_) / 4;
    elapsed_ = {};
    done_ = 0;
    sampled_at_ = now;
  }

  // 0: not known.
  [[nodiscard]] double rate(Clock::time_point now) const {
    return now - sampled_at_ < forget_after ? rate_ : 0;
  }

 private:
  static constexpr std::uint64_t busy_bytes_min = 64ULL * 1024;
  static constexpr Clock::duration sample_time = std::chrono::milliseconds(50);
  static constexpr Clock::duration forget_after = std::chrono::seconds(2);

  bool busy_ = false;
  Clock::time_point since_{};
  Clock::duration elapsed_{};  // busy, since the last sample
  std::uint64_t done_ = 0;     // in that time
  double rate_ = 0;
  Clock::time_point sampled_at_{};
};

}  // namespace nbdferry::transport
