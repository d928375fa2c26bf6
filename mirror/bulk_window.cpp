#include "mirror/bulk_window.hpp"

namespace nbdferry::mirror {

void BulkWindow::answered(Time now, const Sending& sending, std::uint64_t bytes) {
  delivered_ += bytes;
  newest_answered_ = std::max(newest_answered_, sending.at);
  const Duration took = std::max(now - sending.at, quickest);
  renew_fastest(now);
  fastest_ = std::min(fastest_, took);
  const Duration sent_within = std::max(took, sending.at - sending.since);
  const double rate = static_cast<double>(delivered_ - sending.delivered) /
                      std::chrono::duration<double>(sent_within).count();
  most_.front() = std::max(most_.front(), rate);
  if (took > 2 * delay()) part_limited_ = true;
  if (sending.delivered >= round_end_) end_round();
  if (now - part_began_ < std::max(remembered, fastest())) return;
  part_began_ = now;
  // What was not held back could have been more.
  if (!std::exchange(part_limited_, false)) return;
  std::rotate(most_.begin(), most_.end() - 1, most_.end());
  most_.front() = rate;
}

// The window is small until what was under way has been answered, and then what was sent after it.
void BulkWindow::renew_fastest(Time now) {
  if (draining_ && now - period_began_ >= 2 * delay()) draining_ = false;
  if (period_began_ == Time{0}) period_began_ = now;
  if (now - period_began_ < std::max<Duration>(period, delays_per_period * delay())) return;
  period_began_ = now;
  fastest_before_ = std::exchange(fastest_, Duration::max());
  draining_ = true;
}

void BulkWindow::end_round() {
  round_end_ = delivered_;
  if (!std::exchange(limited_, false)) return;
  part_limited_ = true;
  if (!starting_) return;
  const double now = bytes_per_second();
  if (now >= full_ * growth) {
    full_ = now;
    rounds_flat_ = 0;
  } else if (++rounds_flat_ >= rounds_without) {
    starting_ = false;
  }
}

}  // namespace nbdferry::mirror
