// The load on disk B: records written raw into slots, one at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "guest_record.hpp"
#include "guest_report.hpp"

namespace guest {

class RawDisk {
 public:
  /// Throws std::system_error when the disk can't be opened.
  explicit RawDisk(const Options& options);
  RawDisk(const RawDisk&) = delete;
  RawDisk& operator=(const RawDisk&) = delete;
  ~RawDisk();

  /// The next record, and its sync where its plan has one. False after an error, which it has said.
  bool write_next();
  /// Everything synced, everything read back.
  bool finish();

  Progress progress;
  std::uint64_t bytes() const { return slots_ * slot_bytes; }

 private:
  // What a sector holds, other than a record's number.
  static constexpr std::uint32_t untouched = 0;
  static constexpr std::uint32_t zeroes = 0xffffffff;

  bool write(std::uint64_t record, std::uint64_t slot, unsigned sectors);
  bool discard(std::uint64_t record, std::uint64_t slot);
  bool sync(std::uint64_t record);
  bool read_slot(std::uint64_t slot);
  bool check_slot(std::uint64_t slot);
  bool sector_is(const std::byte* bytes, std::uint64_t slot, std::size_t index,
                 std::uint32_t held) const;

  int fd_;
  bool is_device_;
  std::uint64_t seed_;
  std::uint64_t slots_ = 0;
  std::uint64_t next_ = 1;
  std::vector<std::uint32_t> held_;  // per sector: the record it holds, or one of the above
  std::unique_ptr<std::byte[], void (*)(void*)> buffer_;  // aligned for O_DIRECT
};

}  // namespace guest
