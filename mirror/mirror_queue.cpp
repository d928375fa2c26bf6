#include "mirror/mirror_queue.hpp"

#include <algorithm>

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

MirrorQueue::Entries::const_iterator MirrorQueue::Epoch::first_overlap(ByteRange range) const {
  auto it = entries.upper_bound(range.begin);
  if (it != entries.begin()) {
    const auto before = std::prev(it);
    if (before->second.entry.range.end > range.begin) return before;
  }
  return it != entries.end() && it->first < range.end ? it : entries.end();
}

bool MirrorQueue::overlaps(ByteRange range) const {
  return std::any_of(epochs_.begin(), epochs_.end(),
                     [&](const Epoch& e) { return e.first_overlap(range) != e.entries.end(); });
}

void MirrorQueue::insert(Epoch& epoch, MirrorEntry entry, std::optional<OpId> parked_behind) {
  // Parts of larger payloads are copied out: no more memory is kept than is counted.
  entry.payload = entry.payload.compact();
  ++size_;
  bytes_ += entry.payload.size();
  storage_bytes_ += cost(entry);
  if (entry.debt) ++debts_;
  if (parked_behind) {
    epoch.parked.emplace(*parked_behind, entry.range.begin);
  } else {
    epoch.ready.insert(key_of(entry));
  }
  const std::uint64_t begin = entry.range.begin;
  epoch.entries.emplace(begin, Node{std::move(entry), parked_behind});
}

MirrorEntry MirrorQueue::remove(Epoch& epoch, Entries::iterator it) {
  MirrorEntry entry = std::move(it->second.entry);
  --size_;
  bytes_ -= entry.payload.size();
  storage_bytes_ -= cost(entry);
  if (entry.debt) --debts_;
  if (it->second.parked_behind) {
    const auto [first, last] = epoch.parked.equal_range(*it->second.parked_behind);
    for (auto p = first; p != last; ++p) {
      if (p->second == it->first) {
        epoch.parked.erase(p);
        break;
      }
    }
  } else {
    epoch.ready.erase(key_of(entry));
  }
  epoch.entries.erase(it);
  return entry;
}

MirrorQueue::Entries::iterator MirrorQueue::cut(Epoch& epoch, Entries::iterator it,
                                                ByteRange range) {
  const auto parked = it->second.parked_behind;
  const MirrorEntry old = remove(epoch, it);
  int pieces = -1;
  const ByteRange left{old.range.begin, std::min(old.range.end, range.begin)};
  const ByteRange right{std::max(old.range.begin, range.end), old.range.end};
  for (const ByteRange rest : {left, right}) {
    if (rest.empty()) continue;
    insert(epoch, part_of(old, rest), parked);
    ++pieces;
  }
  if (old.waiter && pieces != 0) pieces_changed_(*old.waiter, pieces);
  return epoch.entries.lower_bound(std::min(old.range.end, range.end));
}

bool MirrorQueue::push(MirrorEntry entry, std::uint64_t number) {
  NBDFERRY_ASSERT(!entry.range.empty(), "an empty mirrored write");
  Epoch& epoch = at(number);
  entry.position = next_position_++;
  entry.debt = !entry.waiter;
  bool superseded = false;
  for (auto it = epoch.first_overlap(entry.range);
       it != epoch.entries.end() && it->first < entry.range.end;) {
    const auto& old = it->second.entry;
    NBDFERRY_ASSERT(!old.waiter, "superseding a write that is not acknowledged");
    entry.position = std::min(entry.position, old.position);
    superseded_bytes_ += old.range.intersect(entry.range).length();
    superseded = true;
    entry.debt = true;  // until it is answered, the target lacks what was acknowledged before
    it = cut(epoch, epoch.entries.find(it->first), entry.range);
  }
  insert(epoch, std::move(entry), std::nullopt);
  return superseded;
}

void MirrorQueue::discard(ByteRange range) {
  for (auto& epoch : epochs_) {
    for (auto it = epoch.first_overlap(range);
         it != epoch.entries.end() && it->first < range.end;) {
      it = cut(epoch, epoch.entries.find(it->first), range);
    }
  }
  go_on();
}

const MirrorEntry* MirrorQueue::next() const {
  const Epoch& first = epochs_.front();
  return first.ready.empty() ? nullptr : &first.entries.at(first.ready.begin()->begin).entry;
}

MirrorEntry MirrorQueue::take_next() {
  Epoch& first = epochs_.front();
  ++first.sent;
  return remove(first, first.entries.find(first.ready.begin()->begin));
}

const MirrorEntry* MirrorQueue::ready_at(std::uint64_t begin) const {
  const Epoch& first = epochs_.front();
  const auto it = first.entries.find(begin);
  return it == first.entries.end() || it->second.parked_behind ? nullptr : &it->second.entry;
}

MirrorEntry MirrorQueue::take_with_last(std::uint64_t begin) {
  Epoch& first = epochs_.front();
  return remove(first, first.entries.find(begin));
}

void MirrorQueue::answered() {
  NBDFERRY_ASSERT(epochs_.front().sent > 0, "an answer to a mirrored write that was not sent");
  --epochs_.front().sent;
  go_on();
}

void MirrorQueue::park_next(OpId behind) {
  Epoch& first = epochs_.front();
  const std::uint64_t begin = first.ready.begin()->begin;
  first.ready.erase(first.ready.begin());
  first.entries.at(begin).parked_behind = behind;
  first.parked.emplace(behind, begin);
}

void MirrorQueue::unpark(OpId behind) {
  Epoch& epoch = epochs_.front();
  const auto [first, last] = epoch.parked.equal_range(behind);
  for (auto p = first; p != last; ++p) {
    Node& node = epoch.entries.at(p->second);
    node.parked_behind.reset();
    epoch.ready.insert(key_of(node.entry));
  }
  epoch.parked.erase(first, last);
}

MirrorQueue::Epoch& MirrorQueue::at(std::uint64_t epoch) {
  NBDFERRY_ASSERT(epoch >= first_epoch() && epoch <= open_epoch(), "an epoch that is over");
  return epochs_[epoch - first_epoch()];
}

void MirrorQueue::close_epoch() {
  if (epochs_.back().over() || NBDFERRY_MUTANT(epoch_never_closes)) return;
  const std::uint64_t next = open_epoch() + 1;
  epochs_.emplace_back().number = next;
}

void MirrorQueue::expected_came(std::uint64_t epoch) {
  --at(epoch).expected;
  go_on();
}

void MirrorQueue::go_on() {
  while (epochs_.size() > 1) {
    Epoch& first = epochs_.front();
    if (!first.over() &&
        !(NBDFERRY_MUTANT(epoch_does_not_wait) && first.entries.empty() && first.expected == 0))
      return;
    if (NBDFERRY_MUTANT(epoch_does_not_wait)) epochs_[1].sent += first.sent;
    epochs_.pop_front();
  }
}

std::vector<ByteRange> MirrorQueue::beyond(std::uint64_t keep) const {
  std::multimap<std::pair<std::uint64_t, std::uint64_t>, const MirrorEntry*> ordered;
  for (const auto& epoch : epochs_) {
    for (const auto& [begin, node] : epoch.entries) {
      if (!node.entry.waiter)
        ordered.emplace(std::pair{epoch.number, node.entry.position}, &node.entry);
    }
  }
  std::vector<ByteRange> out;
  std::uint64_t kept = 0;
  for (const auto& [age, entry] : ordered) {
    kept += entry->payload.size();
    if (kept > keep) out.push_back(entry->range);
  }
  return out;
}

void MirrorQueue::check_invariants() const {
  std::uint64_t bytes = 0;
  std::uint64_t storage = 0;
  std::size_t debts = 0;
  std::size_t size = 0;
  for (const auto& epoch : epochs_) {
    std::size_t ready = 0;
    std::uint64_t end = 0;
    for (const auto& [begin, node] : epoch.entries) {
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
        NBDFERRY_ASSERT(epoch.ready.contains(key_of(e)), "a ready entry that is not listed");
      }
    }
    NBDFERRY_ASSERT(
        ready == epoch.ready.size() && epoch.parked.size() + ready == epoch.entries.size(),
        "queue lists are wrong");
    NBDFERRY_ASSERT(&epoch == &epochs_.front() || (epoch.sent == 0 && epoch.parked.empty()),
                    "a later epoch began before an earlier one was over");
    size += epoch.entries.size();
  }
  NBDFERRY_ASSERT(storage == storage_bytes_, "more memory is kept than is counted");
  NBDFERRY_ASSERT(bytes == bytes_ && debts == debts_ && size == size_, "queue sums are wrong");
}

}  // namespace nbdferry::mirror
