#include "mirror/guest_ops.hpp"

#include <algorithm>
#include <span>

#include "mirror/assert.hpp"

namespace nbdferry::mirror {

GuestOp& GuestOps::add(OpId id, GuestRequest&& request, std::uint64_t align) {
  GuestOp& op = ops_[id];
  op.id = id;
  op.request = request.id;
  op.command = request.command;
  op.range = request.range;
  op.payload = std::move(request.payload);
  op.fua = request.fua;
  op.no_hole = request.no_hole;
  op.fast_zero = request.fast_zero;
  if (!is_write(op.command)) return op;

  op.span = op.range.widened(align);
  waiting_.push_back(id);
  if (NBDFERRY_MUTANT(no_guest_order)) return op;
  for_each_running(op.span, [&](GuestOp& earlier) {
    earlier.dependents.push_back(id);
    ++op.blockers;
  });
  for (const OpId other : std::span(waiting_).first(waiting_.size() - 1)) {
    GuestOp& earlier = ops_.at(other);
    if (!earlier.span.overlaps(op.span)) continue;
    earlier.dependents.push_back(id);
    ++op.blockers;
  }
  return op;
}

void GuestOps::admit(GuestOp& op, Time now) {
  NBDFERRY_ASSERT(runnable(op) && op.admission == 0, "admitting a write out of order");
  waiting_.erase(std::find(waiting_.begin(), waiting_.end(), op.id));
  op.admission = ++last_admission_;
  op.admitted_at = now;
  running_.emplace(op.span.begin, &op);
}

std::vector<OpId> GuestOps::remove(OpId id) {
  const auto it = ops_.find(id);
  GuestOp& op = it->second;
  if (op.admission != 0) {
    const auto [first, last] = running_.equal_range(op.span.begin);
    running_.erase(std::find_if(first, last, [&](const auto& r) { return r.second == &op; }));
  } else if (is_write(op.command)) {
    waiting_.erase(std::find(waiting_.begin(), waiting_.end(), id));
  }
  std::vector<OpId> runnable_now;
  for (const OpId other : op.dependents) {
    const auto later = ops_.find(other);
    if (later != ops_.end() && --later->second.blockers == 0) runnable_now.push_back(other);
  }
  ops_.erase(it);
  return runnable_now;
}

bool GuestOps::source_busy(ByteRange range, std::uint64_t admission) const {
  auto it = running_.upper_bound(range.begin);
  if (it != running_.begin()) --it;
  for (; it != running_.end() && it->first < range.end; ++it) {
    const GuestOp& op = *it->second;
    if (op.span.overlaps(range) && op.admission <= admission && !op.source_done) return true;
  }
  return false;
}

bool GuestOps::any_running(std::uint64_t admission) const {
  return std::any_of(running_.begin(), running_.end(),
                     [&](const auto& r) { return r.second->admission <= admission; });
}

void GuestOps::check_invariants() const {
  std::uint64_t end = 0;
  for (const auto& [begin, op] : running_) {
    NBDFERRY_ASSERT(begin == op->span.begin && begin >= end, "running guest writes overlap");
    NBDFERRY_ASSERT(op->admission != 0 && op->blockers == 0, "running without admission");
    end = op->span.end;
  }
}

}  // namespace nbdferry::mirror
