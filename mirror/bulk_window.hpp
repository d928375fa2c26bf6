// BulkWindow: how much of what nobody waits for may be under way to the target at once.
//
// A write that the guest waits for queues behind all that is under way, in the kernel and in the
// network. So copies and acknowledged writes fill the path and little more: what it carries in its
// own delay, and in a few milliseconds of queue. Its own delay is the fastest answer to a write
// since the connections were made; later ones include the queue.
#pragma once

#include <algorithm>
#include <cstdint>

#include "mirror/types.hpp"

namespace nbdferry::mirror {

class BulkWindow {
 public:
  explicit BulkWindow(std::uint64_t bytes_min) : bytes_min_(bytes_min) {}

  // Other connections, perhaps another route.
  void reset() { fastest_ = Duration::max(); }

  // The target answered a write that was sent so long ago.
  void answered(Duration took) { fastest_ = std::min(fastest_, took); }

  // Zero while nothing is known.
  [[nodiscard]] Duration fastest() const {
    return fastest_ == Duration::max() ? Duration{0} : fastest_;
  }
  // For a path that carries so many bytes a second.
  [[nodiscard]] std::uint64_t bytes(double bytes_per_second) const {
    if (fastest_ == Duration::max()) return bytes_min_;
    const Duration delay = fastest_ + std::max(queue, fastest_ / 4);
    const double carried = bytes_per_second * std::chrono::duration<double>(delay).count();
    return std::max(bytes_min_, static_cast<std::uint64_t>(carried));
  }

 private:
  static constexpr Duration queue = std::chrono::milliseconds(10);
  std::uint64_t bytes_min_;
  Duration fastest_ = Duration::max();
};

}  // namespace nbdferry::mirror
