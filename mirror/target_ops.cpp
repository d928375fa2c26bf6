#include "mirror/target_ops.hpp"

#include "mirror/assert.hpp"

namespace nbdferry::mirror {

std::optional<OpId> TargetOps::conflict(ByteRange range) const {
  const ByteRange wide = range.widened(align_);
  if (NBDFERRY_MUTANT(no_target_order)) return std::nullopt;
  auto it = by_begin_.upper_bound(wide.begin);
  if (it != by_begin_.begin()) {
    const auto before = std::prev(it);
    if (ops_.at(before->second).range.widened(align_).end > wide.begin) return before->second;
  }
  if (it != by_begin_.end() && it->first < wide.end) return it->second;
  return std::nullopt;
}

bool TargetOps::writes_in(ByteRange range) const {
  auto it = by_begin_.upper_bound(range.begin);
  if (it != by_begin_.begin()) --it;
  for (; it != by_begin_.end() && it->first < range.end; ++it) {
    const TargetOp& op = ops_.at(it->second);
    if (is_write(op.command) && op.range.overlaps(range)) return true;
  }
  return false;
}

void TargetOps::add(TargetOp op) {
  NBDFERRY_ASSERT(has_room(op.window_bytes), "more in flight than the target's window");
  bytes_ += op.window_bytes;
  buffer_bytes_ += op.buffer_bytes;
  if (op.debt) ++debts_;
  if (op.command != Command::flush) {
    NBDFERRY_ASSERT(!conflict(op.range), "overlapping operations in flight on the target");
    by_begin_.emplace(op.range.widened(align_).begin, op.id);
  }
  const OpId id = op.id;
  ops_.emplace(id, std::move(op));
}

TargetOp TargetOps::remove(OpId id) {
  const auto it = ops_.find(id);
  NBDFERRY_ASSERT(it != ops_.end(), "an answer to an operation that is not in flight");
  TargetOp op = std::move(it->second);
  ops_.erase(it);
  bytes_ -= op.window_bytes;
  buffer_bytes_ -= op.buffer_bytes;
  if (op.debt) --debts_;
  if (op.command != Command::flush) {
    const auto at = by_begin_.find(op.range.widened(align_).begin);
    if (at != by_begin_.end() && at->second == id) by_begin_.erase(at);
  }
  return op;
}

std::uint32_t TargetOps::forget_waiter(OpId waiter) {
  std::uint32_t n = 0;
  for (auto& [id, op] : ops_) {
    if (op.waiter != waiter) continue;
    op.waiter.reset();
    if (!op.debt) ++debts_;
    op.debt = true;
    ++n;
  }
  return n;
}

void TargetOps::check_invariants() const {
  std::uint64_t end = 0;
  for (const auto& [begin, id] : by_begin_) {
    NBDFERRY_ASSERT(begin >= end, "overlapping operations in flight on the target");
    end = ops_.at(id).range.widened(align_).end;
  }
  std::uint64_t bytes = 0;
  for (const auto& [id, op] : ops_) bytes += op.window_bytes;
  NBDFERRY_ASSERT(bytes == bytes_, "bytes in flight are miscounted");
}

}  // namespace nbdferry::mirror
