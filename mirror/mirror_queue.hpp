// MirrorQueue: guest writes on their way to the target, not sent yet (rule 6: a cache of the debt).
//
// Epochs (--consistency crash): close_epoch() is a barrier. What was pushed before it is sent and
// answered before anything that is pushed after it is offered, and is not superseded by it. Without
// barriers there is one epoch, for ever.
//
// What must hold: the ranges of an epoch's entries are disjoint, so that no order among them matters
// but the one of age; the bytes it holds are counted exactly; an entry is either ready (in order of
// age, those that a guest waits for first) or parked behind the one operation that it would
// overlap. Payloads are immutable: trimming an entry makes slices.
#pragma once

#include <cstdint>
#include <deque>
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

  [[nodiscard]] bool empty() const { return size_ == 0; }
  [[nodiscard]] std::size_t size() const { return size_; }
  // Bytes of payload.
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
  // The memory that these take, exactly. Cutting an entry may round it up a little.
  [[nodiscard]] std::uint64_t storage_bytes() const { return storage_bytes_; }
  [[nodiscard]] std::size_t debts() const { return debts_; }
  [[nodiscard]] std::uint64_t superseded_bytes() const { return superseded_bytes_; }

  [[nodiscard]] bool overlaps(ByteRange range) const;

  // What push() would add to storage_bytes(), before anything is superseded.
  [[nodiscard]] static std::uint64_t cost(const MirrorEntry& e) {
    return e.payload.compact_bytes();
  }

  // The source's result of this write is known, or nothing overlaps it. Supersedes what it covers
  // and trims what it overlaps, in its epoch; those entries must be acknowledged. Returns whether it
  // did.
  bool push(MirrorEntry entry, std::uint64_t epoch);
  bool push(MirrorEntry entry) { return push(std::move(entry), open_epoch()); }

  // Removes all data within `range`.
  void discard(ByteRange range);

  // The next ready entry, in order; null when none is.
  [[nodiscard]] const MirrorEntry* next() const;
  MirrorEntry take_next();
  // The ready entry that begins there, to go with the one that was taken last; null when none does.
  [[nodiscard]] const MirrorEntry* ready_at(std::uint64_t begin) const;
  MirrorEntry take_with_last(std::uint64_t begin);
  // The entry that was taken has been answered, well or not.
  void answered();
  void park_next(OpId behind);
  void unpark(OpId behind);

  // --- epochs ---
  [[nodiscard]] std::uint64_t open_epoch() const { return epochs_.back().number; }
  // The one whose entries are offered; all before it are with the target.
  [[nodiscard]] std::uint64_t first_epoch() const { return epochs_.front().number; }
  // From now on entries go to another one, unless the open one is as good as new.
  void close_epoch();
  // An entry of this epoch is still to come: it does not end before.
  void expect(std::uint64_t epoch) { ++at(epoch).expected; }
  void expected_came(std::uint64_t epoch);

  // The acknowledged entries, oldest first, without the first that add up to `keep` bytes.
  [[nodiscard]] std::vector<ByteRange> beyond(std::uint64_t keep) const;

  template <typename F>
  void for_each(F&& f) const {
    for (const auto& e : epochs_) {
      for (const auto& [begin, node] : e.entries) f(node.entry);
    }
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

  struct Epoch {
    std::uint64_t number = 0;
    Entries entries;
    std::set<ReadyKey> ready;
    std::multimap<OpId, std::uint64_t> parked;  // behind which operation -> entry's begin
    std::size_t sent = 0;                       // and not answered
    std::size_t expected = 0;

    [[nodiscard]] bool over() const { return entries.empty() && sent == 0 && expected == 0; }
    [[nodiscard]] Entries::const_iterator first_overlap(ByteRange range) const;
  };

  [[nodiscard]] Epoch& at(std::uint64_t epoch);
  void insert(Epoch& epoch, MirrorEntry entry, std::optional<OpId> parked_behind);
  MirrorEntry remove(Epoch& epoch, Entries::iterator it);
  // Removes `range` from the entry at `it`, keeping what sticks out; returns the next iterator.
  Entries::iterator cut(Epoch& epoch, Entries::iterator it, ByteRange range);
  void go_on();

  PiecesChanged pieces_changed_;
  std::deque<Epoch> epochs_{1};  // numbers in a row; the last is open
  std::size_t size_ = 0;
  std::uint64_t bytes_ = 0;
  std::uint64_t storage_bytes_ = 0;
  std::size_t debts_ = 0;
  std::uint64_t next_position_ = 1;
  std::uint64_t superseded_bytes_ = 0;
};

}  // namespace nbdferry::mirror
