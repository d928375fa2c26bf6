// GuestOps: the guest's open requests, and the one order of its overlapping writes (rule 4).
//
// What must hold: the writes that run at any time are disjoint, their ranges widened to the order
// alignment; a write that overlaps an earlier one, running or waiting, runs after it, in order of
// arrival. Requests other than writes run at once.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <unordered_map>
#include <vector>

#include "mirror/events.hpp"

namespace nbdferry::mirror {

struct GuestOp {
  OpId id{};  // also the id of its operation on the serving disk
  RequestId request{};
  Command command = Command::read;
  ByteRange range;
  Payload payload;
  bool fua = false;
  bool no_hole = false;
  bool fast_zero = false;

  // Order.
  ByteRange span;                // range, widened
  std::uint32_t blockers = 0;    // earlier writes that it waits for
  std::vector<OpId> dependents;  // later writes that wait for it
  std::uint64_t admission = 0;   // order of admission, from 1; 0: not admitted

  // Progress.
  bool source_done = false;
  bool replied = false;
  IoError result = IoError::none;
  Payload data;                 // answer of a read
  std::vector<Extent> extents;  // answer of block_status
  std::uint64_t checksum = 0;   // likewise

  // Mirroring: the blocks that the target needs it for; shrinks where they become stale.
  std::vector<ByteRange> mirrored;
  bool waits_for_target = false;  // sync: the reply waits for `pieces`
  bool queued_early = false;      // its entries went out beside the source write
  std::uint32_t pieces = 0;       // entries queued or in flight that the reply waits for
  std::uint32_t readbacks = 0;
  bool overwrites = false;  // blocks that were stale: the target needs it before it is level
  std::uint64_t epoch = 0;  // of its entries in the queue
  Time admitted_at{0};
  Time submitted_at{0};  // to the serving disk
  Time reply_at{0};      // paced: not answered before; 0: not decided yet
};

class GuestOps {
 public:
  // Takes the request in. A write that overlaps an earlier one is not runnable yet.
  GuestOp& add(OpId id, GuestRequest&& request, std::uint64_t align);
  [[nodiscard]] static bool runnable(const GuestOp& op) { return op.blockers == 0; }

  // The write runs from now on; its place in the order of admission is fixed.
  void admit(GuestOp& op, Time now);

  // The request has ended on every side. Returns the writes that became runnable, in order.
  [[nodiscard]] std::vector<OpId> remove(OpId id);

  [[nodiscard]] GuestOp* find(OpId id) {
    const auto it = ops_.find(id);
    return it == ops_.end() ? nullptr : &it->second;
  }
  [[nodiscard]] std::size_t size() const { return ops_.size(); }
  [[nodiscard]] std::uint64_t last_admission() const { return last_admission_; }

  // Is a write that was admitted up to `admission` and touches `range` not done on the source yet?
  [[nodiscard]] bool source_busy(ByteRange range, std::uint64_t admission) const;
  // Any admitted write at all that has not ended.
  [[nodiscard]] bool any_running(std::uint64_t admission) const;
  [[nodiscard]] std::size_t running() const { return running_.size(); }

  // Calls f(GuestOp&) for admitted writes whose span overlaps `range`. f must not add or remove.
  template <typename F>
  void for_each_running(ByteRange range, F&& f) {
    auto it = running_.upper_bound(range.begin);
    if (it != running_.begin()) --it;
    for (; it != running_.end() && it->first < range.end; ++it) {
      GuestOp& op = *it->second;
      if (op.span.overlaps(range)) f(op);
    }
  }
  template <typename F>
  void for_each(F&& f) {
    for (auto& [id, op] : ops_) f(op);
  }

  void check_invariants() const;

 private:
  std::unordered_map<OpId, GuestOp> ops_;
  std::multimap<std::uint64_t, GuestOp*> running_;  // by begin of span; disjoint at any time
  std::vector<OpId> waiting_;                       // writes not admitted, in order of arrival
  std::uint64_t last_admission_ = 0;
};

}  // namespace nbdferry::mirror
