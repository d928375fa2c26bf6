// ConnectionGrowth: how many connections a path is worth. One TCP connection carries its window in each round
// trip, and one session what one thread of the server does: a few are enough in a rack, many are needed far
// away. So it begins with few, and makes half as many more as long as that brings a tenth more throughput.
// When what the path carries becomes much better by itself (a limit was lifted, a link was mended) it tries again.
//
// The kernel sizes the sockets' buffers to delay and rate (net.ipv4.tcp_wmem): a size of ours would switch that
// off, and be bounded by net.core.wmem_max.
#pragma once

#include <algorithm>
#include <chrono>

namespace nbdferry::transport {

class ConnectionGrowth {
 public:
  using Clock = std::chrono::steady_clock;

  ConnectionGrowth(unsigned start, unsigned max) : start_(start), count_(start), max_(max) {}

  [[nodiscard]] unsigned start() const { return start_; }
  [[nodiscard]] unsigned count() const { return count_; }

  // The path carries so many bytes a second while it is busy; 0: unknown. True when count() has grown.
  bool observe(Clock::time_point now, double rate, Clock::duration round_trip) {
    if (rate == 0 || now < next_) return false;
    const bool first = next_ == Clock::time_point{};
    next_ = now + std::max<Clock::duration>(interval, round_trip * 8);
    // What was measured first is how it begins, not what it carries.
    if (first) return false;
    const bool worth = trying_ ? rate >= before_ * gain : rate >= before_ * changed;
    trying_ = worth && count_ < max_;
    before_ = trying_ ? rate : std::max(rate, before_);
    if (!trying_) return false;
    count_ = std::min(max_, count_ + std::max(1U, count_ / 2));
    return true;
  }

  // So many are what can be had.
  void stop(unsigned count) { count_ = max_ = count; }

 private:
  static constexpr Clock::duration interval = std::chrono::seconds(1);
  static constexpr double gain = 1.1;
  static constexpr double changed = 1.25;

  unsigned start_;
  unsigned count_;
  unsigned max_;
  bool trying_ = false;  // the last look made more
  double before_ = 0;    // what it carried then
  Clock::time_point next_{};
};

}  // namespace nbdferry::transport
