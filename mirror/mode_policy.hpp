// ModePolicy: `--mode auto`: async while the target keeps up, sync while the guest outruns it.
//
// What must hold: no flapping. Sync lasts for a while at least, and for twice as long each time that
// async did not last: a guest that always outruns the target is left in sync but for short trials.
#pragma once

#include <optional>

#include "mirror/events.hpp"

namespace nbdferry::mirror {

class ModePolicy {
 public:
  explicit ModePolicy(Duration dwell_min) : dwell_min_(dwell_min), dwell_(dwell_min) {}

  struct Signals {
    double buffer_used = 0;      // of what it may hold, 0 to 1
    bool overflowed = false;     // since the last time: what did not fit became debt
    bool target_answers = true;  // or has nothing to answer
    bool caught_up = false;      // no acknowledged write is on its way
  };
  struct Change {
    Mode mode;
    const char* reason;
  };

  // The mode in force until now was left for another reason (a switchover, a fallback).
  void entered(Mode mode, Time now) {
    if (mode != mode_) since_ = now;
    mode_ = mode;
  }
  [[nodiscard]] Mode mode() const { return mode_; }

  [[nodiscard]] std::optional<Change> decide(Time now, const Signals& s) {
    if (mode_ == Mode::async) {
      if (!s.overflowed && s.buffer_used < full) return std::nullopt;
      // A target that does not answer at all makes each write wait in vain.
      if (!s.target_answers) return std::nullopt;
      const bool soon = since_ != Time{0} && now - since_ < dwell_ * 2;
      dwell_ = soon ? std::min(dwell_ * 2, dwell_min_ * dwell_growth_max) : dwell_min_;
      entered(Mode::sync, now);
      return Change{Mode::sync, "the guest outruns the target: the buffer is full"};
    }
    if (now - since_ < dwell_ || !s.caught_up) return std::nullopt;
    entered(Mode::async, now);
    return Change{Mode::async, "the target has caught up"};
  }

 private:
  static constexpr double full = 0.8;
  static constexpr int dwell_growth_max = 32;
  Duration dwell_min_;
  Mode mode_ = Mode::async;
  Time since_{0};
  Duration dwell_;  // of the present or the latest sync
};

}  // namespace nbdferry::mirror
