// MirrorQueue: guest writes on their way to the target, not sent yet (rule 6: a cache of the debt).
//
// What must hold: the ranges of its entries are disjoint, so that no order among them matters but
// the one of age; the bytes it holds are counted exactly; an entry is either ready (in order of
// age, those that a guest waits for first) or parked behind the one operation that it would
// overlap. Payloads are immutable: trimming an entry makes slices.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "mirror/payload.hpp"
#include "mirror/types.hpp"

namespace nbdferry::mirror {

struct MirrorEntry {
  ByteRange range;
  Command command = Command::write;  // write or zero
  Payload payload;                   // write: range.length() bytes
  bool may_hole = true;
  // The guest write that waits for this entry (sync); nothing waits once it is acknowledged.
  std::optional<OpId> waiter;
  // Stands for bytes that the guest was told are written: its own, or what it superseded.
  bool debt = false;
  std::uint64_t position = 0;  // age; a superseding write takes the oldest one it supersedes
};

class MirrorQueue {
 public:
  // Called when a waiter's entries change in number: +1 split, -1 dropped.
  using PiecesChanged = std::function<void(OpId waiter, int delta)>;
  explicit MirrorQueue(PiecesChanged pieces_changed) : pieces_changed_(std::move(pieces_changed)) {}

  [[nodiscard]] bool empty() const { return entries_.empty(); }
  [[nodiscard]] std::size_t size() const { return entries_.size(); }
  // Bytes of payload.
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
  // The memory that these take, exactly. Cutting an entry may round it up a little.
  [[nodiscard]] std::uint64_t storage_bytes() const { return storage_bytes_; }
  [[nodiscard]] std::size_t debts() const { return debts_; }
  [[nodiscard]] std::uint64_t superseded_bytes() const { return superseded_bytes_; }

  [[nodiscard]] bool overlaps(ByteRange range) const {
    return first_overlap(range) != entries_.end();
  }

  // What push() would add to storage_bytes(), before anything is superseded.
  [[nodiscard]] static std::uint64_t cost(const MirrorEntry& e) {
    return e.payload.compact_bytes();
  }

  // The source's result of this write is known, or nothing overlaps it. Supersedes what it covers
  // and trims what it overlaps; those entries must be acknowledged. Returns whether it did.
  bool push(MirrorEntry entry);

  // Removes all data within `range`.
  void discard(ByteRange range);

  // The next ready entry, in order; null when none is.
  [[nodiscard]] const MirrorEntry* next() const;
  MirrorEntry take_next();
  void park_next(OpId behind);
  void unpark(OpId behind);

  // The acknowledged entries, oldest first, without the first that add up to `keep` bytes.
  [[nodiscard]] std::vector<ByteRange> beyond(std::uint64_t keep) const;

  template <typename F>
  void for_each(F&& f) const {
    for (const auto& [begin, node] : entries_) f(node.entry);
  }

  void check_invariants() const;

 private:
  struct Node {
    MirrorEntry entry;
    std::optional<OpId> parked_behind;
  };
  using Entries = std::map<std::uint64_t, Node>;
  struct ReadyKey {
    bool acknowledged;  // entries that a guest waits for come first
    std::uint64_t position;
    std::uint64_t begin;
    auto operator<=>(const ReadyKey&) const = default;  // NOLINT(modernize-use-nullptr): its `0`
  };
  static ReadyKey key_of(const MirrorEntry& e) {
    return {!e.waiter.has_value(), e.position, e.range.begin};
  }

  [[nodiscard]] Entries::const_iterator first_overlap(ByteRange range) const;
  void insert(MirrorEntry entry, std::optional<OpId> parked_behind);
  MirrorEntry remove(Entries::iterator it);
  // Removes `range` from the entry at `it`, keeping what sticks out; returns the next iterator.
  Entries::iterator cut(Entries::iterator it, ByteRange range);

  PiecesChanged pieces_changed_;
  Entries entries_;
  std::set<ReadyKey> ready_;
  std::multimap<OpId, std::uint64_t> parked_;  // behind which operation -> entry's begin
  std::uint64_t bytes_ = 0;
  std::uint64_t storage_bytes_ = 0;
  std::size_t debts_ = 0;
  std::uint64_t next_position_ = 1;
  std::uint64_t superseded_bytes_ = 0;
};

}  // namespace nbdferry::mirror
