// Pacer: how long a guest's write waits for its answer, so that the buffer does not overflow.
//
// What must hold: never longer than the operator's limit; no delay while the buffer is half empty or
// drains; it comes and goes smoothly, and goes faster than it comes.
#pragma once

#include <algorithm>

#include "mirror/types.hpp"

namespace nbdferry::mirror {

class Pacer {
 public:
  // `used`: of the buffer, 0 to 1. Returns whether the delay is over for all.
  void tick(Time now, double used, Duration delay_max) {
    if (now - at_ < interval) return;
    const bool drains = used < used_ - slack;
    const double wanted = drains ? 0 : std::clamp((used - begin) / (end - begin), 0.0, 1.0);
    level_ += std::clamp(wanted - level_, -step_down, step_up);
    used_ = used;
    at_ = now;
    delay_ = std::chrono::duration_cast<Duration>(delay_max * level_);
  }
  void stop() { level_ = 0, delay_ = Duration{0}; }

  [[nodiscard]] Duration delay() const { return delay_; }

 private:
  static constexpr Duration interval = std::chrono::milliseconds(10);
  static constexpr double begin = 0.4;
  static constexpr double end = 0.75;  // before the buffer is called full
  static constexpr double slack = 0.002;
  static constexpr double step_up = 0.1;
  static constexpr double step_down = 0.2;
  Time at_{0};
  double used_ = 0;
  double level_ = 0;  // of the limit
  Duration delay_{0};
};

}  // namespace nbdferry::mirror
