#include "proxy/local_disk.hpp"

#include <algorithm>
#include <cerrno>
#include <utility>

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/uio.h>
#include <unistd.h>

#include "mirror/assert.hpp"
#include "proxy/checksum.hpp"

namespace nbdferry::proxy {

namespace {

constexpr unsigned ring_depth = 256;
// Longer writes hold up the loop for nothing: a worker copies them as fast. (Reads are different:
// what the page cache holds, the ring would copy within its submission, too.)
constexpr std::uint64_t inline_write_bytes_max = 256ULL * 1024;
constexpr std::uint64_t zero_piece_bytes = 1024ULL * 1024;
constexpr std::size_t extents_max = 1024;  // per answer
constexpr std::uint64_t in_memory_step = 64ULL * 1024;
constexpr std::uint32_t page_bytes = 4096;

constexpr auto slow_write = std::chrono::milliseconds(2);
constexpr auto very_slow_write = std::chrono::milliseconds(50);
constexpr unsigned quick_between_slow = 64;  // fewer quick ones between two slow ones: it is bad
constexpr auto pause_min = std::chrono::milliseconds(20);
constexpr auto pause_max = std::chrono::seconds(10);

constexpr int punch_mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
constexpr int zero_mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;

bool is_unsupported(int result) {
  return result == -EOPNOTSUPP || result == -ENOSYS || result == -ENOTTY;
}

bool reads(Command c) { return c == Command::read || c == Command::checksum; }

void answer_read(Command command, Buffer&& data, mirror::SourceDone& done) {
  if (command == Command::read) {
    done.data = std::move(data).freeze();
  } else {
    done.checksum = checksum_of(data.bytes());
  }
}

// Where the data that begins at `at` ends, or -errno. tmpfs walks page by page to the next hole, with a
// lock that a write to the file waits for (10 ms for each GiB): there it is asked in small steps, and a
// hole begins at a step.
off_t end_of_data(int fd, std::uint64_t at, std::uint64_t end, bool in_memory) {
  if (!in_memory) {
    const off_t hole = ::lseek(fd, static_cast<off_t>(at), SEEK_HOLE);
    return hole < 0 ? -errno : hole;
  }
  do {
    at = at / in_memory_step * in_memory_step + in_memory_step;
  } while (at < end && ::lseek(fd, static_cast<off_t>(at), SEEK_DATA) == static_cast<off_t>(at));
  return static_cast<off_t>(at);
}

// Data and holes from range.begin on, at most extents_max of them. Runs on the helper thread; the
// file's own offset is used by nothing else. Returns 0 or -errno.
int map_extents(int fd, ByteRange range, bool in_memory, std::vector<Extent>& extents) {
  auto at = range.begin;
  const auto clamp = [&range](off_t found) {
    return std::min(static_cast<std::uint64_t>(found), range.end);
  };
  while (at < range.end && extents.size() + 2 <= extents_max) {
    const off_t data = ::lseek(fd, static_cast<off_t>(at), SEEK_DATA);
    if (data < 0 && errno != ENXIO) return -errno;
    const auto hole_end = data < 0 ? range.end : clamp(data);  // ENXIO: no data until the end
    if (hole_end > at) extents.push_back({hole_end - at, true, true});
    at = hole_end;
    if (at >= range.end) break;
    const off_t hole = end_of_data(fd, at, range.end, in_memory);
    if (hole < 0) return static_cast<int>(hole);
    // Another writer may have moved things between the calls: still make progress.
    const auto data_end = clamp(hole) > at ? clamp(hole) : range.end;
    extents.push_back({data_end - at, false, false});
    at = data_end;
  }
  return 0;
}

}  // namespace

// --- inline or not
// --------------------------------------------------------------------------------

void InlineGate::ran(Clock::time_point begin, Clock::time_point end) {
  if (end - begin < slow_write) {
    ++quick_in_a_row_;
    return;
  }
  const bool alone = std::exchange(quick_in_a_row_, 0) >= quick_between_slow;
  if (alone && end - begin < very_slow_write) return;
  const bool quiet_before = begin - closed_until_ > 2 * pause_;
  pause_ =
      quiet_before ? Clock::duration(pause_min) : std::min<Clock::duration>(2 * pause_, pause_max);
  closed_until_ = end + pause_;
}

// --- operations
// -----------------------------------------------------------------------------------

// Where an operation is; each step ends with one answer of the ring.
enum class LocalDisk::Step : std::uint8_t {
  transfer,     // read or write, continued until complete
  write_back,   // block device: dirty pages, which a punch would drop even if it is refused
  punch,        // TRIM and ZERO: deallocate
  zero_range,   // ZERO: without deallocation
  zero_pieces,  // ZERO: the slow way
  sync,         // FLUSH, and the end of a TRIM or ZERO with FUA
  advise,       // CACHE: its outcome doesn't matter
  map,          // BLOCK_STATUS
};

struct LocalDisk::Pending {
  std::uint64_t slot = 0;  // in pool_: the ring's token
  mirror::DiskOp op;
  Step step{};
  RingRequest request;         // the step's, to be repeated when interrupted
  Buffer buffer;               // read and checksum: filled by the kernel
  std::uint64_t progress = 0;  // bytes of the range that are read, written or zeroed
  bool changed = true;
  std::vector<Extent> extents;
};

std::unique_ptr<LocalDisk> LocalDisk::open(boost::asio::io_context& io,
                                           const LocalDiskOptions& options, DoneHandler on_done) {
  return std::make_unique<LocalDisk>(io, probe_disk(options), options.read_only,
                                     std::move(on_done));
}

LocalDisk::LocalDisk(boost::asio::io_context& io, ProbedDisk disk, bool read_only,
                     DoneHandler on_done, bool allow_io_uring)
    : disk_(std::move(disk)),
      read_only_(read_only),
      on_done_(std::move(on_done)),
      ring_(
          io, ring_depth,
          [this](std::uint64_t token, int result) { advance(*pool_[token], result); },
          allow_io_uring) {}

LocalDisk::~LocalDisk() = default;

std::uint32_t LocalDisk::align() const {
  return disk_.direct_fd ? std::max(page_bytes, disk_.direct_align) : 1;
}

bool LocalDisk::is_direct(std::uint64_t offset, std::uint64_t length) const {
  return disk_.direct_fd && (offset | length) % disk_.direct_align == 0;
}

bool LocalDisk::submit(mirror::DiskOp&& op, mirror::SourceDone& done) {
  NBDFERRY_ASSERT(op.range.begin <= op.range.end && op.range.end <= disk_.size,
                  "operation outside of the disk");
  done = {};
  done.id = op.id;
  if (answer_at_once(op, done)) return true;
  Buffer buffer;
  std::uint64_t progress = 0;
  if (reads(op.command)) {
    buffer = Buffer(op.range.length());
    if (read_inline(op, buffer, progress, done)) return true;
  } else if (op.command == Command::write) {
    NBDFERRY_ASSERT(op.payload.size() == op.range.length(), "payload of another length");
    if (write_inline(op, progress, done)) return true;
  }
  Pending& p = take(std::move(op));
  p.buffer = std::move(buffer);
  p.progress = progress;
  begin(p);
  return false;
}

// What needs no system call.
bool LocalDisk::answer_at_once(const mirror::DiskOp& op, mirror::SourceDone& done) const {
  if (read_only_ && is_write(op.command)) {
    done.error = IoError::not_permitted;
    return true;
  }
  switch (op.command) {
    case Command::trim:
      done.changed = zeroing_step(op).has_value();
      return !done.changed;
    case Command::zero:
      if (zeroing_step(op)) return false;
      done.error = IoError::not_supported;
      return true;
    case Command::flush:
      return read_only_ || disk_.in_memory;
    case Command::cache:
      return disk_.in_memory || disk_.direct_fd;
    case Command::block_status:
      if (disk_.block_device) done.extents.push_back({op.range.length(), false, false});
      return disk_.block_device;
    case Command::read:
    case Command::write:
    case Command::checksum:
      return false;
  }
  return false;
}

bool LocalDisk::read_inline(const mirror::DiskOp& op, Buffer& buffer, std::uint64_t& progress,
                            mirror::SourceDone& done) const {
  const auto length = op.range.length();
  if (disk_.direct_fd) return false;
  if (!disk_.in_memory && !disk_.reads_nowait) return false;
  const iovec v{buffer.data(), length};
  const ssize_t n = ::preadv2(disk_.fd.get(), &v, 1, static_cast<off_t>(op.range.begin),
                              disk_.in_memory ? 0 : RWF_NOWAIT);
  if (n < 0 && errno != EAGAIN) {
    done.error = to_io_error(errno);
    return true;
  }
  progress = n < 0 ? 0 : static_cast<std::uint64_t>(n);
  if (progress < length) return false;
  answer_read(op.command, std::move(buffer), done);
  return true;
}

bool LocalDisk::write_inline(const mirror::DiskOp& op, std::uint64_t& progress,
                             mirror::SourceDone& done) {
  const auto length = op.range.length();
  if (disk_.direct_fd || !disk_.writes_inline || length > inline_write_bytes_max) return false;
  if (op.fua && !disk_.in_memory) return false;
  const iovec v{const_cast<std::byte*>(op.payload.data()), length};
  const auto offset = static_cast<off_t>(op.range.begin);
  ssize_t n = -1;
  if (writes_nowait_ && !disk_.in_memory) {
    n = ::pwritev2(disk_.fd.get(), &v, 1, offset, RWF_NOWAIT);
    writes_nowait_ = n >= 0 || errno != EOPNOTSUPP;
  }
  if (!writes_nowait_ || disk_.in_memory) {
    const auto begin = InlineGate::Clock::now();
    if (!gate_.is_open(begin)) return false;
    n = ::pwritev(disk_.fd.get(), &v, 1, offset);
    const int error = errno;
    gate_.ran(begin, InlineGate::Clock::now());
    errno = error;
  }
  if (n < 0 && errno != EAGAIN) {
    done.error = to_io_error(errno);
    return true;
  }
  progress = n < 0 ? 0 : static_cast<std::uint64_t>(n);
  return progress == length;
}

std::optional<LocalDisk::Step> LocalDisk::zeroing_step(const mirror::DiskOp& op) const {
  const bool trim = op.command == Command::trim;
  // A file can be zeroed anywhere, a device in whole blocks; and where a refusal must leave no
  // trace, in whole pages, because the kernel has zeroed a page's part in its cache by then.
  const auto unit = !disk_.block_device    ? 1
                    : trim || op.fast_only ? std::max(page_bytes, disk_.logical_block)
                                           : disk_.logical_block;
  const bool whole_blocks = op.range == op.range.widened(unit);
  if (disk_.can_punch && whole_blocks && (trim || op.may_hole)) {
    return disk_.block_device ? Step::write_back : Step::punch;
  }
  if (trim) return std::nullopt;
  // A device that can't make zeroes gets them written by the kernel: right, but not fast.
  if (can_zero_range_ && whole_blocks && !(op.fast_only && disk_.block_device)) {
    return Step::zero_range;
  }
  if (op.fast_only) return std::nullopt;
  return Step::zero_pieces;
}

// --- on the ring
// ----------------------------------------------------------------------------------

LocalDisk::Pending& LocalDisk::take(mirror::DiskOp&& op) {
  if (free_.empty()) {
    pool_.push_back(std::make_unique<Pending>());
    pool_.back()->slot = pool_.size() - 1;
    free_.push_back(pool_.back().get());
  }
  Pending& p = *free_.back();
  free_.pop_back();
  ++in_flight_;
  if (is_write(op.command)) ++writes_in_flight_;
  p.op = std::move(op);
  return p;
}

void LocalDisk::begin(Pending& p) {
  switch (p.op.command) {
    case Command::read:
    case Command::checksum:
      start(p, Step::transfer);
      break;
    case Command::write:
      // Direct I/O wants aligned memory, which slices of larger payloads need not have.
      if (is_direct(p.op.range.begin, p.op.range.length()) &&
          reinterpret_cast<std::uintptr_t>(p.op.payload.data()) % disk_.direct_align != 0) {
        p.op.payload = Payload::copy_of(p.op.payload.bytes());
      }
      start(p, Step::transfer);
      break;
    case Command::trim:
    case Command::zero:
      start(p, *zeroing_step(p.op));
      break;
    case Command::flush:
      start(p, Step::sync);
      break;
    case Command::cache:
      start(p, Step::advise);
      break;
    case Command::block_status:
      start_map(p);
      break;
  }
}

void LocalDisk::start(Pending& p, Step step) {
  using Kind = RingRequest::Kind;
  p.step = step;
  const auto& range = p.op.range;
  p.request = {Kind::sync, disk_.fd.get(), 0, range.begin, range.length(), nullptr, nullptr};
  switch (step) {
    case Step::transfer: {
      const auto left = range.length() - p.progress;
      if (reads(p.op.command)) {
        start_transfer(p, p.buffer.data() + p.progress, nullptr, left);
      } else {
        start_transfer(p, nullptr, p.op.payload.data() + p.progress, left);
      }
      return;
    }
    case Step::zero_pieces:
      if (zeroes_.empty()) zeroes_ = Payload::zeroes(zero_piece_bytes);
      start_transfer(p, nullptr, zeroes_.data(),
                     std::min(zero_piece_bytes, range.length() - p.progress));
      return;
    case Step::write_back:
      p.request.kind = Kind::sync_range;
      break;
    case Step::punch:
    case Step::zero_range:
      p.request.kind = Kind::fallocate;
      p.request.flags = step == Step::punch ? punch_mode : zero_mode;
      break;
    case Step::advise:
      p.request.kind = Kind::will_need;
      break;
    case Step::sync:
    case Step::map:
      break;
  }
  ring_.start(p.request, p.slot);
}

// Reads into `memory` or writes `data`, whichever is given.
void LocalDisk::start_transfer(Pending& p, std::byte* memory, const std::byte* data,
                               std::uint64_t length) {
  RingRequest& r = p.request;
  r.kind = memory != nullptr ? RingRequest::Kind::read : RingRequest::Kind::write;
  r.offset = p.op.range.begin + p.progress;
  r.length = length;
  r.memory = memory;
  r.data = data;
  if (is_direct(r.offset, r.length)) r.fd = disk_.direct_fd.get();
  if (p.op.fua && p.step == Step::transfer) r.flags = RWF_DSYNC;
  ring_.start(r, p.slot);
}

void LocalDisk::start_map(Pending& p) {
  p.step = Step::map;
  ring_.run([fd = disk_.fd.get(), range = p.op.range, in_memory = disk_.in_memory,
             &extents = p.extents] { return map_extents(fd, range, in_memory, extents); },
            p.slot);
}

// One step has ended.
void LocalDisk::advance(Pending& p, int result) {
  if ((result == -EINTR || result == -EAGAIN) && p.step != Step::map) {
    ring_.start(p.request, p.slot);
    return;
  }
  switch (p.step) {
    case Step::transfer:
    case Step::zero_pieces:
      transferred(p, result);
      return;
    case Step::write_back:
      if (result < 0) return finish(p, to_io_error(-result));
      start(p, Step::punch);
      return;
    case Step::punch:
    case Step::zero_range:
      if (is_unsupported(result)) return refused(p);
      if (result < 0 || !p.op.fua) return finish(p, to_io_error(-result));
      start(p, Step::sync);
      return;
    case Step::sync:
      finish(p, to_io_error(-result));
      return;
    case Step::advise:
      finish(p, IoError::none);
      return;
    case Step::map:
      mapped(p, result);
      return;
  }
}

void LocalDisk::transferred(Pending& p, int result) {
  // Nothing read or written: the file has been cut short behind our back.
  if (result <= 0) return finish(p, result == 0 ? IoError::io : to_io_error(-result));
  p.progress += static_cast<std::uint64_t>(result);
  if (p.progress < p.op.range.length()) return start(p, p.step);
  if (p.op.fua && p.op.command == Command::zero) return start(p, Step::sync);
  finish(p, IoError::none);
}

// The file system or device has no such call; it said so before it changed anything.
void LocalDisk::refused(Pending& p) {
  (p.step == Step::punch ? disk_.can_punch : can_zero_range_) = false;
  if (const auto step = zeroing_step(p.op)) return start(p, *step);
  p.changed = false;
  finish(p, p.op.command == Command::trim ? IoError::none : IoError::not_supported);
}

void LocalDisk::mapped(Pending& p, int result) {
  // What was found before an error is a valid prefix. A file system without SEEK_HOLE has no holes.
  if (p.extents.empty() && (result == -EINVAL || is_unsupported(result))) {
    p.extents.push_back({p.op.range.length(), false, false});
  }
  finish(p, p.extents.empty() ? to_io_error(-result) : IoError::none);
}

void LocalDisk::finish(Pending& p, IoError error) {
  mirror::SourceDone done;
  done.id = p.op.id;
  done.error = error;
  done.changed = p.changed;
  if (reads(p.op.command) && error == IoError::none) {
    answer_read(p.op.command, std::move(p.buffer), done);
  }
  done.extents = std::exchange(p.extents, {});
  if (is_write(p.op.command)) --writes_in_flight_;
  // The slot is free before the answer, which may submit the next operation.
  p.op = {};
  p.buffer = Buffer();
  p.progress = 0;
  p.changed = true;
  free_.push_back(&p);
  --in_flight_;
  on_done_(std::move(done));
}

}  // namespace nbdferry::proxy
