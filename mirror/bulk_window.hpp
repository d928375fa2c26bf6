// BulkWindow: how much of what nobody waits for may be under way to the target at once.
//
// A write that the guest waits for queues behind all that is under way, in the kernel and in the
// network. So copies and acknowledged writes fill the path and little more: what it carries in its
// own delay, and in a few milliseconds of queue. Its own delay is the fastest answer to a write of the
// last while; the others include the queue. It may grow (another route, a busy host); so that it is seen
// without a queue, the window is too small to make one for a moment now and then.
//
// What it carries is measured as BBR does it ("BBR: Congestion-Based Congestion Control", ACM Queue
// 14(5), 2016): each answer says what was answered since its own request left, over the time that
// this took, or that the sending of it took if that was longer: answers may come all at once after a
// server, or we, had a pause, and the path is no faster for it. The most of the last while counts, and
// only what was held back by this window says that there is no more; or answers that took longer than it
// allows, for then something waits in a queue. At first the window is twice as much, until that no longer
// brings more: a long path is full after a few of its round trips.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "mirror/types.hpp"

namespace nbdferry::mirror {

class BulkWindow {
 public:
  explicit BulkWindow(std::uint64_t bytes_min) : bytes_min_(bytes_min) {}

  // Other connections, perhaps another route.
  void reset() { *this = BulkWindow(bytes_min_); }

  // To be remembered with what is sent.
  struct Sending {
    Time at{0};
    std::uint64_t delivered = 0;  // bytes answered by then, in all
    Time since{0};  // when the newest of these had been sent: what is under way was sent since then
  };
  // So many bytes are under way before it.
  [[nodiscard]] Sending sends(Time now, std::uint64_t under_way) const {
    return {now, delivered_, under_way == 0 ? now : newest_answered_};
  }
  // Something had to wait for room in it.
  void held_back() { limited_ = true; }

  // The target answered a write of so many bytes.
  void answered(Time now, const Sending& sending, std::uint64_t bytes);

  // The path's own delay. Zero while nothing is known.
  [[nodiscard]] Duration fastest() const {
    const Duration least = std::min(fastest_, fastest_before_);
    return least == Duration::max() ? Duration{0} : least;
  }
  // What the path carries, at most.
  [[nodiscard]] double bytes_per_second() const {
    return *std::max_element(most_.begin(), most_.end());
  }
  [[nodiscard]] std::uint64_t bytes() const {
    if (fastest() == Duration{0}) return bytes_min_;
    if (draining_) return std::max(bytes_min_ / 4, carried_in(fastest()) / 2);
    return std::max(bytes_min_, carried_in(delay()) * (starting_ ? 2 : 1));
  }

 private:
  [[nodiscard]] std::uint64_t carried_in(Duration time) const {
    return static_cast<std::uint64_t>(bytes_per_second() *
                                      std::chrono::duration<double>(time).count());
  }
  void end_round();
  void renew_fastest(Time now);
  // Of an answer, with the queue that there may be.
  [[nodiscard]] Duration delay() const { return fastest() + std::max(queue, fastest() / 4); }

  static constexpr Duration quickest = std::chrono::microseconds(10);  // no answer is
  static constexpr Duration queue = std::chrono::milliseconds(10);
  static constexpr Duration remembered = std::chrono::milliseconds(200);  // each of most_, at least
  static constexpr Duration period = std::chrono::seconds(5);             // of fastest_, at least
  static constexpr int delays_per_period = 100;                           // … and
  static constexpr double growth = 1.25;         // less than that in a round is none
  static constexpr unsigned rounds_without = 3;  // of growth, and the path is full

  std::uint64_t bytes_min_;
  Duration fastest_ = Duration::max();         // in this period
  Duration fastest_before_ = Duration::max();  // in the one before
  Time period_began_{0};
  bool draining_ = false;  // what is under way, at the beginning of a period
  std::uint64_t delivered_ = 0;
  Time newest_answered_{0};        // when it was sent
  std::array<double, 10> most_{};  // the last while, in parts; the newest first
  Time part_began_{0};
  bool limited_ = false;         // since the round began
  bool part_limited_ = false;    // since the part began
  std::uint64_t round_end_ = 0;  // an answer to what was sent after so much was delivered ends it
  bool starting_ = true;
  double full_ = 0;
  unsigned rounds_flat_ = 0;
};

}  // namespace nbdferry::mirror
