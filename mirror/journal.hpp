// Journal: what a pivoted disk's target may not have on its medium yet, in memory of the edge's that
// outlives the process: by it no acknowledged write is lost when process and target die together.
//
// Slots of 4 KiB, each on its own: a write takes one for each block that it touches, zeroes take one.
// The memory is groups of a page with the slots' entries and the slots' pages behind it; it may grow at
// its end. Slots and not a ring: what a quarantine holds back does not stop the rest from being reused.
//
// What must hold, killed at any instruction: an entry counts from the store of its number on, when all
// else of it is there, and no longer from the store of a zero on. So what has been added is found, and of
// what was being added, or removed, some slots are, which is harmless: the guest has not been answered
// yet, or the target has it. Whoever removes several removes the oldest first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "mirror/payload.hpp"
#include "mirror/types.hpp"

namespace nbdferry::mirror {

class Journal {
 public:
  static constexpr std::uint64_t slot_bytes = block_size_min;
  using Slots = std::vector<std::uint32_t>;
  struct Record {
    ByteRange range;
    Command command = Command::write;  // or zero
    bool may_hole = true;
    Payload payload;  // write
    Slots slots;
  };

  // What it needs to hold so much; all zero at first.
  [[nodiscard]] static std::uint64_t bytes_for(std::uint64_t payload_bytes);
  [[nodiscard]] static std::uint64_t slots_for(Command command, ByteRange range);

  // Without memory it keeps nothing.
  Journal() = default;
  // `memory`: aligned to a page, living until this is given another; or the same and longer, which is
  // zero where it has grown. What is in it is kept, if it is of a disk of `size` bytes.
  void use(std::span<std::byte> memory, std::uint64_t size);

  [[nodiscard]] bool kept() const { return slots_ != 0; }
  [[nodiscard]] std::uint64_t slots() const { return slots_; }
  [[nodiscard]] std::uint64_t free_slots() const { return free_.size(); }

  // `data`: of a write, range.length() bytes. There have to be enough slots.
  [[nodiscard]] Slots add(Command command, ByteRange range, bool may_hole, const std::byte* data);
  void remove(const Slots& slots);
  // All that is in it, slot by slot, in the order in which it was added.
  [[nodiscard]] std::vector<Record> records() const;

 private:
  struct Entry {
    std::uint64_t number;  // of the add(), from 1; 0: free
    std::uint64_t begin;
    std::uint64_t length;
    std::uint64_t kind;
  };
  [[nodiscard]] std::byte* group_of(std::uint32_t slot) const;
  [[nodiscard]] Entry& entry(std::uint32_t slot) const;
  [[nodiscard]] std::byte* page(std::uint32_t slot) const;
  [[nodiscard]] static bool sound(const Entry& entry, std::uint64_t size);
  void put(std::uint32_t slot, Command command, ByteRange part, bool may_hole,
           const std::byte* data);

  std::byte* memory_ = nullptr;
  std::uint32_t slots_ = 0;
  std::vector<std::uint32_t> free_;  // the last is taken first
  std::uint64_t last_number_ = 0;
};

}  // namespace nbdferry::mirror
