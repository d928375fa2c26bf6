#include "mirror/mirror_queue.hpp"

#include "mirror/assert.hpp"

namespace nbdferry::mirror {

namespace {

// The part of `e` that lies in `part`.
MirrorEntry part_of(const MirrorEntry& e, ByteRange part) {
  MirrorEntry out = e;
  out.range = part;
  if (e.command == Command::write) {
    out.payload = e.payload.slice(part.begin - e.range.begin, part.length());
  }
  return out;
}

}  // namespace

MirrorQueue::Entries::const_iterator MirrorQueue::first_overlap(ByteRange range) const {
  auto it = entries_.upper_bound(range.begin);
  if (it != entries_.begin()) {
    const auto before = std::prev(it);
    if (before->second.entry.range.end > range.begin) return before;
  }
  return it != entries_.end() && it->first < range.end ? it : entries_.end();
}

void MirrorQueue::insert(MirrorEntry entry, std::optional<OpId> parked_behind) {
  // Parts of larger payloads are copied out: no more memory is kept than is counted.
  entry.payload = entry.payload.compact();
  bytes_ += entry.payload.size();
  storage_bytes_ += cost(entry);
  if (entry.debt) ++debts_;
  if (parked_behind) {
    parked_.emplace(*parked_behind, entry.range.begin);
  } else {
    ready_.insert(key_of(entry));
  }
  const std::uint64_t begin = entry.range.begin;
  entries_.emplace(begin, Node{std::move(entry), parked_behind});
}

MirrorEntry MirrorQueue::remove(Entries::iterator it) {
  MirrorEntry entry = std::move(it->second.entry);
  bytes_ -= entry.payload.size();
  storage_bytes_ -= cost(entry);
  if (entry.debt) --debts_;
  if (it->second.parked_behind) {
    const auto [first, last] = parked_.equal_range(*it->second.parked_behind);
    for (auto p = first; p != last; ++p) {
      if (p->second == it->first) {
        parked_.erase(p);
        break;
      }
    }
  } else {
    ready_.erase(key_of(entry));
  }
  entries_.erase(it);
  return entry;
}

MirrorQueue::Entries::iterator MirrorQueue::cut(Entries::iterator it, ByteRange range) {
  const auto parked = it->second.parked_behind;
  const MirrorEntry old = remove(it);
  int pieces = -1;
  const ByteRange left{old.range.begin, std::min(old.range.end, range.begin)};
  const ByteRange right{std::max(old.range.begin, range.end), old.range.end};
  for (const ByteRange rest : {left, right}) {
    if (rest.empty()) continue;
    insert(part_of(old, rest), parked);
    ++pieces;
  }
  if (old.waiter && pieces != 0) pieces_changed_(*old.waiter, pieces);
  return entries_.lower_bound(std::min(old.range.end, range.end));
}

bool MirrorQueue::push(MirrorEntry entry) {
  NBDFERRY_ASSERT(!entry.range.empty(), "an empty mirrored write");
  entry.position = next_position_++;
  entry.debt = !entry.waiter;
  bool superseded = false;
  for (auto it = first_overlap(entry.range); it != entries_.end() && it->first < entry.range.end;) {
    const auto& old = it->second.entry;
    NBDFERRY_ASSERT(!old.waiter, "superseding a write that is not acknowledged");
    entry.position = std::min(entry.position, old.position);
    superseded_bytes_ += old.range.intersect(entry.range).length();
    superseded = true;
    entry.debt = true;  // until it is answered, the target lacks what was acknowledged before
    it = cut(entries_.find(it->first), entry.range);
  }
  insert(std::move(entry), std::nullopt);
  return superseded;
}

void MirrorQueue::discard(ByteRange range) {
  for (auto it = first_overlap(range); it != entries_.end() && it->first < range.end;) {
    it = cut(entries_.find(it->first), range);
  }
}

const MirrorEntry* MirrorQueue::next() const {
  return ready_.empty() ? nullptr : &entries_.at(ready_.begin()->begin).entry;
}

MirrorEntry MirrorQueue::take_next() { return remove(entries_.find(ready_.begin()->begin)); }

void MirrorQueue::park_next(OpId behind) {
  const std::uint64_t begin = ready_.begin()->begin;
  ready_.erase(ready_.begin());
  entries_.at(begin).parked_behind = behind;
  parked_.emplace(behind, begin);
}

void MirrorQueue::unpark(OpId behind) {
  const auto [first, last] = parked_.equal_range(behind);
  for (auto p = first; p != last; ++p) {
    Node& node = entries_.at(p->second);
    node.parked_behind.reset();
    ready_.insert(key_of(node.entry));
  }
  parked_.erase(first, last);
}

std::vector<ByteRange> MirrorQueue::beyond(std::uint64_t keep) const {
  std::multimap<std::uint64_t, const MirrorEntry*> ordered;
  for (const auto& [begin, node] : entries_) {
    if (!node.entry.waiter) ordered.emplace(node.entry.position, &node.entry);
  }
  std::vector<ByteRange> out;
  std::uint64_t kept = 0;
  for (const auto& [position, entry] : ordered) {
    kept += entry->payload.size();
    if (kept > keep) out.push_back(entry->range);
  }
  return out;
}

void MirrorQueue::check_invariants() const {
  std::uint64_t bytes = 0;
  std::uint64_t storage = 0;
  std::size_t debts = 0;
  std::size_t ready = 0;
  std::uint64_t end = 0;
  for (const auto& [begin, node] : entries_) {
    const auto& e = node.entry;
    NBDFERRY_ASSERT(begin == e.range.begin && begin >= end && !e.range.empty(), "queue overlaps");
    NBDFERRY_ASSERT(e.command != Command::write || e.payload.size() == e.range.length(),
                    "a payload of another length than its range");
    end = e.range.end;
    bytes += e.payload.size();
    storage += e.payload.storage_bytes();
    if (e.debt) ++debts;
    if (!node.parked_behind) {
      ++ready;
      NBDFERRY_ASSERT(ready_.contains(key_of(e)), "a ready entry that is not listed");
    }
  }
  NBDFERRY_ASSERT(storage == storage_bytes_, "more memory is kept than is counted");
  NBDFERRY_ASSERT(bytes == bytes_ && debts == debts_, "queue sums are wrong");
  NBDFERRY_ASSERT(ready == ready_.size() && parked_.size() + ready == entries_.size(),
                  "queue lists are wrong");
}

}  // namespace nbdferry::mirror
