// Disk A. In lane l, file f (named l-f, with `.open` behind it while it grows) holds the records
// n = 1 + l + lanes * (f * file_records + i), i from 0. A full file is synced, renamed, and the one
// that is `files_kept` older removed: the file system creates, appends, renames and frees.
#include "guest_files.hpp"

#include <cerrno>
#include <cstring>
#include <system_error>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace guest {
namespace {

std::string file_name(std::uint64_t lane, std::uint64_t number, bool open) {
  return std::to_string(lane) + "-" + std::to_string(number) + (open ? ".open" : "");
}

// Records count from 1, places in the lanes from 0.
std::uint64_t lane_of(std::uint64_t record) { return (record - 1) % lanes; }
std::uint64_t place_of(std::uint64_t record) { return (record - 1) / lanes; }

void make_record(std::vector<std::byte>& bytes, std::uint64_t seed, std::uint64_t record) {
  bytes.resize(file_plan(seed, record).bytes);
  FileHeader header{.magic = FileHeader::magic_value,
                    .record = record,
                    .seed = seed,
                    .bytes = static_cast<std::uint32_t>(bytes.size()),
                    .crc = 0};
  std::memcpy(bytes.data(), &header, sizeof header);
  fill(std::span(bytes).subspan(sizeof header), choice(seed + 1, ~record));
  header.crc = crc32(bytes);
  std::memcpy(bytes.data(), &header, sizeof header);
}

}  // namespace

Files::Files(const Options& options) : seed_(options.seed) {
  open_.fill(-1);
  directory_ = ::open(options.a.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory_ < 0) throw std::system_error(errno, std::generic_category(), options.a);
}

Files::~Files() {
  for (const int fd : open_) {
    if (fd >= 0) ::close(fd);
  }
  if (directory_ >= 0) ::close(directory_);
}

bool Files::failed(const char* what, const std::string& name) const {
  complain("a: %s %s: %s", what, name.c_str(), std::strerror(errno));
  return false;
}

bool Files::write_next() {
  const auto record = next_++;
  const auto lane = lane_of(record);
  const auto number = place_of(record) / file_records;
  const auto place = place_of(record) % file_records;
  if (place == 0 && !begin_file(lane, number)) return false;
  if (!append(record, open_[lane])) return false;
  progress.acknowledged = record;
  if (place == file_records - 1 && !end_file(lane, number)) return false;
  if (file_plan(seed_, record).sync && !sync(record)) return false;
  // An earlier file, now and then: any that is closed and stays.
  const auto closed = std::min(number, files_kept - 1);
  if (record % 64 != 0 || closed == 0) return true;
  return check_file(lane, number - 1 - choice(seed_ + 3, record) % closed, false);
}

bool Files::begin_file(std::uint64_t lane, std::uint64_t number) {
  const auto name = file_name(lane, number, true);
  open_[lane] =
      ::openat(directory_, name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0644);
  return open_[lane] >= 0 || failed("create", name);
}

bool Files::end_file(std::uint64_t lane, std::uint64_t number) {
  const auto open_name = file_name(lane, number, true);
  const auto name = file_name(lane, number, false);
  // Without it, the next sync of the open files would not cover this one.
  if (::fsync(open_[lane]) != 0) return failed("fsync", open_name);
  ::close(std::exchange(open_[lane], -1));
  if (::renameat(directory_, open_name.c_str(), directory_, name.c_str()) != 0) {
    return failed("rename", open_name);
  }
  if (number < files_kept) return true;
  const auto old = file_name(lane, number - files_kept, false);
  return ::unlinkat(directory_, old.c_str(), 0) == 0 || failed("unlink", old);
}

bool Files::append(std::uint64_t record, int fd) {
  make_record(buffer_, seed_, record);
  const Timed timed(progress.writes);
  const auto done = ::write(fd, buffer_.data(), buffer_.size());
  if (done == static_cast<ssize_t>(buffer_.size())) return true;
  if (done >= 0) errno = ENOSPC;
  return failed("append of record", std::to_string(record));
}

bool Files::sync(std::uint64_t record) {
  const Timed timed(progress.syncs);
  for (const int fd : open_) {
    if (fd >= 0 && ::fsync(fd) != 0) return failed("fsync at record", std::to_string(record));
  }
  if (::fsync(directory_) != 0) return failed("fsync at record", std::to_string(record));
  progress.synced = record;
  return true;
}

bool Files::check_file(std::uint64_t lane, std::uint64_t number, bool open) {
  const auto name = file_name(lane, number, open);
  const int fd = ::openat(directory_, name.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return failed("open", name);
  // From the disk, not from the page cache.
  ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  bool good = true;
  std::vector<std::byte> found;
  for (std::uint64_t i = 0; good && i < file_records; ++i) {
    const auto record = 1 + lane + lanes * (number * file_records + i);
    if (record >= next_) break;
    make_record(buffer_, seed_, record);
    found.resize(buffer_.size());
    const auto done = ::read(fd, found.data(), found.size());
    if (done < 0) {
      good = failed("read", name);
    } else if (done != static_cast<ssize_t>(found.size()) || found != buffer_) {
      complain("a: %s: record %llu is not what was written", name.c_str(),
               static_cast<unsigned long long>(record));
      good = false;
    }
  }
  ::close(fd);
  return good;
}

bool Files::finish() {
  if (!sync(next_ - 1)) return false;
  for (std::uint64_t lane = 0; lane < lanes && lane + 1 < next_; ++lane) {
    const auto lane_records = (next_ - 1 - lane - 1) / lanes + 1;
    const auto files = (lane_records + file_records - 1) / file_records;
    const auto ended = lane_records / file_records;
    const auto first = ended > files_kept ? ended - files_kept : 0;
    for (auto number = first; number < files; ++number) {
      if (!check_file(lane, number, number >= ended)) return false;
    }
    if (open_[lane] >= 0) ::close(std::exchange(open_[lane], -1));
  }
  ::close(std::exchange(directory_, -1));  // so that it can be unmounted
  return true;
}

}  // namespace guest
