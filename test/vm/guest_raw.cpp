// Disk B. The disk is opened with O_DIRECT, so that every record meets the block layer at once and as
// it is. A discard's outcome is looked at when it was made (zeroes, or nothing changed, sector by
// sector) and must stay what it was, like everything else.
#include "guest_raw.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <system_error>

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace guest {
namespace {

void make_sector(std::byte* bytes, std::uint64_t seed, std::uint64_t record, std::uint64_t slot,
                 std::size_t index) {
  Sector sector{};
  sector.magic = Sector::magic_value;
  sector.record = record;
  sector.seed = seed;
  sector.slot = static_cast<std::uint32_t>(slot);
  sector.index = static_cast<std::uint16_t>(index);
  sector.sectors = static_cast<std::uint16_t>(raw_plan(seed, record).sectors);
  fill(sector.payload, choice(seed ^ (index + 1), record));
  std::memcpy(bytes, &sector, sizeof sector);
  sector.crc = crc32({bytes, offsetof(Sector, crc)});
  std::memcpy(bytes, &sector, sizeof sector);
}

bool is_zero(const std::byte* bytes) {
  return std::all_of(bytes, bytes + sector_bytes, [](std::byte b) { return b == std::byte{0}; });
}

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace

RawDisk::RawDisk(const Options& options)
    : fd_(-1), is_device_(false), seed_(options.seed), buffer_(nullptr, std::free) {
  struct stat info {};
  if (::stat(options.b.c_str(), &info) != 0) fail(options.b);
  is_device_ = S_ISBLK(info.st_mode);
  // A file is for tests on the host, where the file system may not know O_DIRECT.
  fd_ = ::open(options.b.c_str(), O_RDWR | O_CLOEXEC | (is_device_ ? O_DIRECT : 0));
  if (fd_ < 0) fail(options.b);
  auto bytes = static_cast<std::uint64_t>(info.st_size);
  if (is_device_ && ::ioctl(fd_, BLKGETSIZE64, &bytes) != 0) fail(options.b);
  slots_ = bytes / slot_bytes;
  held_.resize(slots_ * slot_sectors, untouched);
  buffer_.reset(static_cast<std::byte*>(std::aligned_alloc(4096, slot_bytes)));
}

RawDisk::~RawDisk() {
  if (fd_ >= 0) ::close(fd_);
}

bool RawDisk::write_next() {
  const auto record = next_++;
  const auto plan = raw_plan(seed_, record);
  const auto slot = record * slot_step(slots_) % slots_;
  if (!(plan.discard ? discard(record, slot) : write(record, slot, plan.sectors))) return false;
  progress.acknowledged = record;
  if (plan.sync && !sync(record)) return false;
  // An earlier record, now and then; any slot, since all were written after a while.
  return record % 8 != 0 || check_slot(choice(seed_ + 2, record) % slots_);
}

bool RawDisk::write(std::uint64_t record, std::uint64_t slot, unsigned sectors) {
  for (unsigned i = 0; i < sectors; ++i) {
    make_sector(buffer_.get() + i * sector_bytes, seed_, record, slot, i);
  }
  const Timed timed(progress.writes);
  const auto bytes = sectors * sector_bytes;
  const auto done = ::pwrite(fd_, buffer_.get(), bytes, static_cast<off_t>(slot * slot_bytes));
  if (done != static_cast<ssize_t>(bytes)) {
    complain("b: write of record %llu: %s", static_cast<unsigned long long>(record),
             done < 0 ? std::strerror(errno) : "short");
    return false;
  }
  std::fill_n(held_.begin() + static_cast<std::ptrdiff_t>(slot * slot_sectors), sectors,
              static_cast<std::uint32_t>(record));
  return true;
}

bool RawDisk::discard(std::uint64_t record, std::uint64_t slot) {
  const std::array<std::uint64_t, 2> range{slot * slot_bytes, slot_bytes};
  const int result = is_device_
                         ? ::ioctl(fd_, BLKDISCARD, range.data())
                         : ::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                       static_cast<off_t>(range[0]), static_cast<off_t>(range[1]));
  if (result != 0) {
    complain("b: discard, record %llu: %s", static_cast<unsigned long long>(record),
             std::strerror(errno));
    return false;
  }
  if (!read_slot(slot)) return false;
  for (std::size_t i = 0; i < slot_sectors; ++i) {
    if (is_zero(buffer_.get() + i * sector_bytes)) held_[slot * slot_sectors + i] = zeroes;
  }
  return check_slot(slot);
}

bool RawDisk::sync(std::uint64_t record) {
  const Timed timed(progress.syncs);
  if (::fdatasync(fd_) != 0) {
    complain("b: fdatasync after record %llu: %s", static_cast<unsigned long long>(record),
             std::strerror(errno));
    return false;
  }
  progress.synced = record;
  return true;
}

bool RawDisk::read_slot(std::uint64_t slot) {
  const auto done = ::pread(fd_, buffer_.get(), slot_bytes, static_cast<off_t>(slot * slot_bytes));
  if (done == static_cast<ssize_t>(slot_bytes)) return true;
  complain("b: read of slot %llu: %s", static_cast<unsigned long long>(slot),
           done < 0 ? std::strerror(errno) : "short");
  return false;
}

bool RawDisk::sector_is(const std::byte* bytes, std::uint64_t slot, std::size_t index,
                        std::uint32_t held) const {
  if (held == untouched) return true;  // the host knows what was there, we don't
  if (held == zeroes) return is_zero(bytes);
  std::array<std::byte, sector_bytes> expected;
  make_sector(expected.data(), seed_, held, slot, index);
  return std::memcmp(bytes, expected.data(), sector_bytes) == 0;
}

bool RawDisk::check_slot(std::uint64_t slot) {
  if (!read_slot(slot)) return false;
  for (std::size_t i = 0; i < slot_sectors; ++i) {
    const auto held = held_[slot * slot_sectors + i];
    const auto* bytes = buffer_.get() + i * sector_bytes;
    if (sector_is(bytes, slot, i, held)) continue;
    Sector found;
    std::memcpy(&found, bytes, sizeof found);
    complain("b: slot %llu sector %zu: expected %s %u, found %s %llu",
             static_cast<unsigned long long>(slot), i, held == zeroes ? "zeroes" : "record", held,
             found.magic == Sector::magic_value ? "record" : "bytes",
             static_cast<unsigned long long>(found.record));
    return false;
  }
  return true;
}

bool RawDisk::finish() {
  if (!sync(next_ - 1)) return false;
  for (std::uint64_t slot = 0; slot < slots_; ++slot) {
    if (!check_slot(slot)) return false;
  }
  return true;
}

}  // namespace guest
