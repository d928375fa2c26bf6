#include "mirror/journal.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "mirror/assert.hpp"

namespace nbdferry::mirror {

namespace {

constexpr std::uint64_t page_bytes = Journal::slot_bytes;
constexpr std::uint64_t entry_bytes = 32;
constexpr std::uint64_t group_slots = page_bytes / entry_bytes;
constexpr std::uint64_t group_bytes = (1 + group_slots) * page_bytes;

constexpr std::uint64_t kind_write = 1;
constexpr std::uint64_t kind_zero = 2;
constexpr std::uint64_t kind_zero_no_hole = 3;

// One store, where the program says it. A kill comes between two instructions, and what was stored
// before it stays: no more order than the compiler's is wanted.
void store(std::uint64_t& word, std::uint64_t value) {
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  *static_cast<volatile std::uint64_t*>(&word) = value;
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

std::uint64_t slots_in(std::uint64_t bytes) {
  const std::uint64_t rest = bytes % group_bytes / page_bytes;
  return bytes / group_bytes * group_slots + (rest == 0 ? 0 : rest - 1);
}

}  // namespace

std::uint64_t Journal::bytes_for(std::uint64_t payload_bytes) {
  const std::uint64_t slots = (payload_bytes + slot_bytes - 1) / slot_bytes;
  return (slots + group_slots - 1) / group_slots * group_bytes;
}

std::uint64_t Journal::slots_for(Command command, ByteRange range) {
  return command == Command::write ? range.widened(slot_bytes).length() / slot_bytes : 1;
}

std::byte* Journal::group_of(std::uint32_t slot) const {
  return memory_ + slot / group_slots * group_bytes;
}

Journal::Entry& Journal::entry(std::uint32_t slot) const {
  static_assert(sizeof(Entry) == entry_bytes);
  return reinterpret_cast<Entry*>(group_of(slot))[slot % group_slots];
}

std::byte* Journal::page(std::uint32_t slot) const {
  return group_of(slot) + (1 + slot % group_slots) * page_bytes;
}

bool Journal::sound(const Entry& e, std::uint64_t size) {
  const std::uint64_t most = e.kind == kind_write ? slot_bytes : size;
  return e.kind >= kind_write && e.kind <= kind_zero_no_hole && e.length != 0 && e.length <= most &&
         e.length <= size && e.begin <= size - e.length;
}

void Journal::use(std::span<std::byte> memory, std::uint64_t size) {
  if (memory.data() != memory_) *this = Journal();
  memory_ = memory.data();
  const std::uint32_t before = slots_;
  slots_ = static_cast<std::uint32_t>(slots_in(memory.size()));
  NBDFERRY_ASSERT(slots_ >= before, "the journal has shrunk");
  std::vector<std::uint32_t> more;
  for (std::uint32_t slot = slots_; slot-- > before;) {
    Entry& e = entry(slot);
    if (e.number != 0 && sound(e, size)) {
      last_number_ = std::max(last_number_, e.number);
    } else {
      if (e.number != 0) store(e.number, 0);
      more.push_back(slot);
    }
  }
  free_.insert(free_.begin(), more.begin(), more.end());
}

void Journal::put(std::uint32_t slot, Command command, ByteRange part, bool may_hole,
                  const std::byte* data) {
  Entry& e = entry(slot);
  e.begin = part.begin;
  e.length = part.length();
  e.kind = command == Command::write ? kind_write : may_hole ? kind_zero : kind_zero_no_hole;
  if (command == Command::write) std::memcpy(page(slot), data, part.length());
  store(e.number, last_number_);
}

Journal::Slots Journal::add(Command command, ByteRange range, bool may_hole,
                            const std::byte* data) {
  const std::uint64_t count = slots_for(command, range);
  NBDFERRY_ASSERT(count <= free_.size(), "the journal is full");
  Slots slots(free_.rbegin(), free_.rbegin() + static_cast<std::ptrdiff_t>(count));
  free_.resize(free_.size() - count);
  ++last_number_;
  std::uint64_t at = range.begin;
  for (const std::uint32_t slot : slots) {
    const std::uint64_t border = (at / slot_bytes + 1) * slot_bytes;
    const ByteRange part{at, command == Command::write ? std::min(border, range.end) : range.end};
    put(slot, command, part, may_hole, data == nullptr ? nullptr : data + (at - range.begin));
    at = part.end;
  }
  return slots;
}

void Journal::remove(const Slots& slots) {
  for (const std::uint32_t slot : slots) {
    store(entry(slot).number, 0);
    free_.push_back(slot);
  }
}

std::vector<Journal::Record> Journal::records() const {
  std::vector<std::uint32_t> used;
  for (std::uint32_t slot = 0; slot < slots_; ++slot) {
    if (entry(slot).number != 0) used.push_back(slot);
  }
  if (!NBDFERRY_MUTANT(journal_replayed_out_of_order)) {
    std::sort(used.begin(), used.end(), [&](std::uint32_t a, std::uint32_t b) {
      return std::pair(entry(a).number, entry(a).begin) <
             std::pair(entry(b).number, entry(b).begin);
    });
  }
  std::vector<Record> out;
  out.reserve(used.size());
  for (const std::uint32_t slot : used) {
    const Entry& e = entry(slot);
    const bool write = e.kind == kind_write;
    Record& r = out.emplace_back();
    r.range = {e.begin, e.begin + e.length};
    r.command = write ? Command::write : Command::zero;
    r.may_hole = e.kind != kind_zero_no_hole;
    if (write) r.payload = Payload::copy_of({page(slot), static_cast<std::size_t>(e.length)});
    r.slots = {slot};
  }
  return out;
}

}  // namespace nbdferry::mirror
