// BulkWindow: how much of what nobody waits for may be under way to the target at once.
//
// A write that the guest waits for queues behind all that is under way, in the kernel and in the
// network. So copies and acknowledged writes fill the path and little more: what it carries in its
// own delay, and in a few milliseconds of queue. Its own delay is the fastest answer to a write
// since the connections were made; later ones include the queue.
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
    return fastest_ == Duration::max() ? Duration{0} : fastest_;
  }
  // What the path carries, at most.
  [[nodiscard]] double bytes_per_second() const {
    return *std::max_element(most_.begin(), most_.end());
  }
  [[nodiscard]] std::uint64_t bytes() const {
    if (fastest_ == Duration::max()) return bytes_min_;
    const double carried =
        bytes_per_second() * std::chrono::duration<double>(delay()).count() * (starting_ ? 2 : 1);
    return std::max(bytes_min_, static_cast<std::uint64_t>(carried));
  }

 private:
  void end_round();
  // Of an answer, with the queue that there may be.
  [[nodiscard]] Duration delay() const { return fastest_ + std::max(queue, fastest_ / 4); }

  static constexpr Duration quickest = std::chrono::microseconds(10);  // no answer is
  static constexpr Duration queue = std::chrono::milliseconds(10);
  static constexpr Duration remembered = std::chrono::milliseconds(200);  // each of most_, at least
  static constexpr double growth = 1.25;         // less than that in a round is none
  static constexpr unsigned rounds_without = 3;  // of growth, and the path is full

  std::uint64_t bytes_min_;
  Duration fastest_ = Duration::max();
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
