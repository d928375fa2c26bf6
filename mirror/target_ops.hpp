// TargetOps: what is in flight on the target.
//
// What must hold (rule 4): no two of them overlap, copies and reads included, their ranges widened
// to the target's alignment; their number and bytes stay within the window. A flush has no range.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <unordered_map>

#include "mirror/bulk_window.hpp"
#include "mirror/context.hpp"

namespace nbdferry::mirror {

struct TargetOp {
  OpId id{};
  OpKind kind = OpKind::mirrored;
  Command command = Command::write;
  ByteRange range;
  std::uint64_t window_bytes = 0;  // payload on the wire
  std::uint64_t buffer_bytes = 0;  // mirrored: memory, counted against the buffer until answered
  std::optional<OpId> waiter;      // mirrored: the guest write that waits for it
  bool debt = false;               // mirrored: stands for bytes that the guest was told are written
  OpId parent{};                   // copy: the copy operation; guest: the guest's request
  BulkWindow::Sending sending;
};

class TargetOps {
 public:
  void set_window(std::uint32_t ops, std::uint64_t bytes) {
    ops_max_ = ops;
    bytes_max_ = bytes;
  }
  void set_alignment(std::uint64_t align) { align_ = align; }

  // A single operation may exceed the window's bytes when nothing else is in flight.
  [[nodiscard]] bool has_room(std::uint64_t bytes) const {
    return ops_.size() < ops_max_ && (bytes_ == 0 || bytes_ + bytes <= bytes_max_);
  }
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
  [[nodiscard]] std::optional<OpId> conflict(ByteRange range) const;
  // Is a write of any of it in flight?
  [[nodiscard]] bool writes_in(ByteRange range) const;

  void add(TargetOp op);
  [[nodiscard]] TargetOp remove(OpId id);

  // The guest write no longer waits for its operations; returns how many did.
  std::uint32_t forget_waiter(OpId waiter);

  template <typename F>
  void for_each(F&& f) const {
    for (const auto& [id, op] : ops_) f(op);
  }

  [[nodiscard]] bool empty() const { return ops_.empty(); }
  [[nodiscard]] std::size_t size() const { return ops_.size(); }
  [[nodiscard]] std::uint64_t buffer_bytes() const { return buffer_bytes_; }
  [[nodiscard]] std::size_t debts() const { return debts_; }

  // So long nothing has been answered, though it was asked; `answered`: when something was, last.
  [[nodiscard]] Duration silence(Time now, Time answered) const {
    Time asked = now;
    for (const auto& [id, op] : ops_) asked = std::min(asked, op.sending.at);
    return now - std::max(asked, answered);
  }

  void check_invariants() const;

 private:
  std::unordered_map<OpId, TargetOp> ops_;
  std::map<std::uint64_t, OpId> by_begin_;  // widened
  std::uint64_t align_ = block_size_min;
  std::uint32_t ops_max_ = 1;
  std::uint64_t bytes_max_ = 0;
  std::uint64_t bytes_ = 0;
  std::uint64_t buffer_bytes_ = 0;
  std::size_t debts_ = 0;
};

}  // namespace nbdferry::mirror
