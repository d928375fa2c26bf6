// Deadline: finish by then, with just the bandwidth that this needs.
//
// The copier is held to what is left over the time that is left, but for a tenth of it. It begins at full
// speed for a moment: how fast the paths are must be known to say early that it can't be done.
#pragma once

#include <algorithm>

#include "mirror/types.hpp"

namespace nbdferry::mirror {

class Deadline {
 public:
  // From now on; zero: none.
  void set(Duration within, Time now) {
    begin_ = now;
    within_ = within;
  }
  [[nodiscard]] bool given() const { return within_ != Duration{0}; }
  [[nodiscard]] Duration left(Time now) const {
    return std::max(Duration{0}, begin_ + within_ - now);
  }

  // Bytes a second that `bytes` need from now on; 0 without a deadline, or when it is over.
  [[nodiscard]] double needed(std::uint64_t bytes, Time now) const {
    const Duration until = left(now) > reserve() ? left(now) - reserve() : left(now);
    if (!given() || until == Duration{0}) return 0;
    return static_cast<double>(bytes) / std::chrono::duration<double>(until).count();
  }
  // What the copier may use; 0: all that there is.
  [[nodiscard]] double allowed(std::uint64_t bytes, Time now) const {
    if (now - begin_ < std::min(trial_max, within_ / trial_part) || left(now) <= reserve())
      return 0;
    return needed(bytes, now);
  }

 private:
  // For the end: a last round, whatever was not foreseen.
  [[nodiscard]] Duration reserve() const { return within_ / 10; }
  static constexpr Duration trial_max = std::chrono::seconds(2);
  static constexpr int trial_part = 20;
  Time begin_{0};
  Duration within_{0};
};

}  // namespace nbdferry::mirror
