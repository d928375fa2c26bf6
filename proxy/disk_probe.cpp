#include "proxy/disk_probe.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string_view>
#include <thread>

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/vfs.h>

#include <fmt/format.h>

namespace nbdferry::proxy {

namespace {

constexpr std::uint32_t page_bytes = 4096;
constexpr std::size_t sniffed_bytes = 4096;
constexpr auto lock_pause = std::chrono::milliseconds(10);

[[noreturn]] void fail(const std::string& path, std::string_view why, std::string_view what_to_do) {
  throw std::runtime_error(fmt::format("disk '{}': {}: {}", path, why, what_to_do));
}

// --- creating
// -------------------------------------------------------------------------------------

// Does nothing to a disk that exists. What a guest keeps there is nobody else's business.
void create_if_absent(const std::string& path, std::uint64_t size) {
  if (size == 0 || size > disk_size_max) {
    fail(path, fmt::format("can't be created with {} bytes", size),
         fmt::format("choose a size from 1 to {} bytes", disk_size_max));
  }
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd) {
    if (errno == EEXIST) return;
    fail(path, fmt::format("can't be created: {}", std::strerror(errno)),
         "choose a directory that exists and may be written to");
  }
  int error = 0;
  if (::ftruncate(fd.get(), static_cast<off_t>(size)) != 0 || ::fsync(fd.get()) != 0) {
    error = errno;
  } else {
    error = sync_directory_of(path);
  }
  if (error != 0) {
    ::unlink(path.c_str());
    fail(path, fmt::format("can't be created with {} bytes: {}", size, std::strerror(error)),
         "choose a smaller size or another file system");
  }
}

// --- locking
// --------------------------------------------------------------------------------------

// QEMU marks what it does with an image by read locks on single bytes (its block/file-posix.c):
// 100 + n says "I do n", 200 + n says "nobody else may do n". We speak the same, so that QEMU
// refuses a disk that we serve and we refuse one that it runs from; `qemu-img -U` can still look at
// it.
constexpr off_t qemu_does = 100;
constexpr off_t qemu_forbids = 200;
constexpr off_t qemu_read = 0;
constexpr off_t qemu_write = 1;
constexpr off_t qemu_resize = 3;

struct flock one_byte(short type, off_t at) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = at;
  lock.l_len = 1;
  return lock;
}

// A file system without byte locks protects nobody: that is no reason to refuse.
bool is_conflict(int error) { return error == EAGAIN || error == EACCES; }

bool announce(int fd, off_t at) {
  auto lock = one_byte(F_RDLCK, at);
  return ::fcntl(fd, F_OFD_SETLK, &lock) == 0 || !is_conflict(errno);
}

bool somebody_has(int fd, off_t at) {
  auto lock = one_byte(F_WRLCK, at);
  return ::fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

bool announce_to_qemu(int fd, bool read_only) {
  // Look first: our own marks lie on this descriptor and don't count as somebody's.
  if (somebody_has(fd, qemu_does + qemu_write) || somebody_has(fd, qemu_forbids + qemu_read)) {
    return false;
  }
  if (!read_only && somebody_has(fd, qemu_forbids + qemu_write)) return false;
  bool ok = announce(fd, qemu_does + qemu_read) && announce(fd, qemu_forbids + qemu_write) &&
            announce(fd, qemu_forbids + qemu_resize);
  if (!read_only) ok = ok && announce(fd, qemu_does + qemu_write);
  return ok;
}

// True as soon as `attempt` is; tries for this long.
template <class Attempt>
bool waited(std::chrono::milliseconds longest, Attempt attempt) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + longest;
  while (!attempt()) {
    if (Clock::now() >= end) return false;
    std::this_thread::sleep_for(lock_pause);
  }
  return true;
}

void lock_disk(const LocalDiskOptions& options, int fd, bool block_device) {
  const int kind = options.read_only ? LOCK_SH : LOCK_EX;
  // Block devices were opened with O_EXCL; udev takes flock on them now and then.
  if (!block_device && !waited(options.lock_wait, [&] {
        return ::flock(fd, kind | LOCK_NB) == 0 || errno != EWOULDBLOCK;
      })) {
    fail(options.path, "locked: another nbdferry (or a program that locks it) has it open",
         "stop that one first");
  }
  if (!waited(options.lock_wait, [&] { return announce_to_qemu(fd, options.read_only); })) {
    fail(options.path, "locked: QEMU has it open", "stop that machine or qemu-nbd first");
  }
}

// --- opening
// --------------------------------------------------------------------------------------

UniqueFd open_disk(const LocalDiskOptions& options) {
  const std::string& path = options.path;
  struct stat st {};
  const bool block_device = ::stat(path.c_str(), &st) == 0 && S_ISBLK(st.st_mode);
  // O_EXCL on a block device (only there without O_CREAT): not while it is mounted or part of
  // another device, nor by a second nbdferry. O_NONBLOCK: a FIFO must not hang us.
  const int exclusive = block_device && !options.read_only ? O_EXCL : 0;
  const int flags = (options.read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK | exclusive;
  UniqueFd fd;
  int error = 0;
  (void)waited(options.lock_wait, [&] {
    fd = UniqueFd(::open(path.c_str(), flags));
    error = fd ? 0 : errno;
    return error != EBUSY;
  });
  if (!fd) {
    switch (error) {
      case ENOENT:
        fail(path, "no such file", "check the path, or make a new disk with --create SIZE");
      case EISDIR:
        fail(path, "is a directory", "name a raw image file or a block device");
      case EACCES:
      case EPERM:
        fail(path, std::strerror(error),
             options.read_only ? "run as a user who may read it"
                               : "run as a user who may read and write it, or use --read-only");
      case EROFS:
        fail(path, std::strerror(error), "use --read-only");
      case EBUSY:
        fail(path, "locked: the device is mounted, part of another device or served already",
             "unmount it or stop what uses it first");
      default:
        fail(path, std::strerror(error), "check the path");
    }
  }
  if (::fstat(fd.get(), &st) != 0) fail(path, std::strerror(errno), "check the path");
  if (S_ISDIR(st.st_mode)) fail(path, "is a directory", "name a raw image file or a block device");
  if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
    fail(path, "is neither a file nor a block device", "name a raw image file or a block device");
  }
  // io_uring would take the flag as "never wait".
  (void)::fcntl(fd.get(), F_SETFL, ::fcntl(fd.get(), F_GETFL) & ~O_NONBLOCK);
  return fd;
}

std::uint64_t disk_size(const std::string& path, int fd, const LocalDiskOptions& options) {
  struct stat st {};
  std::uint64_t size = 0;
  if (::fstat(fd, &st) != 0 || (S_ISBLK(st.st_mode) && ::ioctl(fd, BLKGETSIZE64, &size) != 0)) {
    fail(path, fmt::format("its size can't be read: {}", std::strerror(errno)), "check the disk");
  }
  if (S_ISREG(st.st_mode)) size = static_cast<std::uint64_t>(st.st_size);
  if (size == 0) {
    fail(path, "is empty",
         "give it a size first, e.g. with truncate -s SIZE, or name another disk");
  }
  if (size > disk_size_max) {
    fail(path, fmt::format("its {} bytes are too many", size),
         fmt::format("serve at most {} bytes", disk_size_max));
  }
  if (options.create_size && *options.create_size != size) {
    fail(path,
         fmt::format("exists with {} bytes, and --create asks for {}", size, *options.create_size),
         "leave --create out or name another disk");
  }
  return size;
}

// --- looking
// --------------------------------------------------------------------------------------

// Whether the device can make zeroes by itself. It has to be known beforehand: the kernel drops the
// range's dirty pages before it asks a device that then refuses.
bool device_makes_zeroes(dev_t device) {
  const auto base =
      std::filesystem::path(fmt::format("/sys/dev/block/{}:{}", major(device), minor(device)));
  for (const char* where : {"queue", "../queue"}) {  // a disk, a partition
    std::ifstream file(base / where / "write_zeroes_max_bytes");
    std::uint64_t bytes = 0;
    if (file >> bytes) return bytes > 0;
  }
  return false;
}

void look_at_block_device(ProbedDisk& disk) {
  struct stat st {};
  if (::fstat(disk.fd.get(), &st) != 0) return;
  int logical = 0;
  if (::ioctl(disk.fd.get(), BLKSSZGET, &logical) == 0 && logical > 0) {
    disk.logical_block = static_cast<std::uint32_t>(logical);
  }
  unsigned short spins = 0;
  disk.rotational = ::ioctl(disk.fd.get(), BLKROTATIONAL, &spins) == 0 && spins != 0;
  disk.can_punch = device_makes_zeroes(st.st_rdev);
  disk.writes_inline = true;
}

void look_at_file(ProbedDisk& disk) {
  struct statfs fs {};
  if (::fstatfs(disk.fd.get(), &fs) != 0) return;
  disk.in_memory = fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC;
  // Others (NFS, FUSE, …) may wait for a network in any call.
  constexpr std::array<long, 4> local = {EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC,
                                         F2FS_SUPER_MAGIC};
  disk.writes_inline = disk.in_memory || std::ranges::find(local, fs.f_type) != local.end();
}

void look_at_data(ProbedDisk& disk, const std::string& path) {
  std::array<unsigned char, sniffed_bytes> first{};
  const ssize_t n = ::pread(disk.fd.get(), first.data(), first.size(), 0);
  // An unreadable first sector is no reason to refuse the rest.
  if (n > 0) {
    if (const char* format = foreign_format({first.data(), static_cast<std::size_t>(n)})) {
      disk.note = fmt::format("disk '{}' looks like {}: it is served as the raw bytes that it is",
                              path, format);
    }
  }
  const iovec one{first.data(), 1};
  disk.reads_nowait =
      !disk.in_memory && (::preadv2(disk.fd.get(), &one, 1, 0, RWF_NOWAIT) >= 0 || errno == EAGAIN);
}

void open_direct(ProbedDisk& disk, const std::string& path, bool read_only) {
  // A second opening, not a duplicate: O_DIRECT belongs to the open file, and the first one stays
  // buffered. Through /proc it is the same file even if its name is gone.
  const std::string again = fmt::format("/proc/self/fd/{}", disk.fd.get());
  disk.direct_fd =
      UniqueFd(::open(again.c_str(), (read_only ? O_RDONLY : O_RDWR) | O_DIRECT | O_CLOEXEC));
  if (!disk.direct_fd) {
    fail(path, fmt::format("can't be opened for direct I/O: {}", std::strerror(errno)),
         "serve it without --direct");
  }
  // The locks of the first one end with the process; what is under way on this one may not.
  if (!read_only) (void)announce(disk.direct_fd.get(), qemu_does + qemu_write);
  disk.direct_align = disk.block_device ? disk.logical_block : page_bytes;
  // Readahead would build large folios around the unaligned requests, which direct ones then have
  // to throw away (see LocalDisk).
  (void)::posix_fadvise(disk.fd.get(), 0, 0, POSIX_FADV_RANDOM);
}

}  // namespace

ProbedDisk probe_disk(const LocalDiskOptions& options) {
  if (options.create_size && !options.read_only) {
    create_if_absent(options.path, *options.create_size);
  }
  ProbedDisk disk;
  disk.fd = open_disk(options);
  struct stat st {};
  disk.block_device = ::fstat(disk.fd.get(), &st) == 0 && S_ISBLK(st.st_mode);
  lock_disk(options, disk.fd.get(), disk.block_device);
  disk.size = disk_size(options.path, disk.fd.get(), options);
  if (disk.block_device) {
    look_at_block_device(disk);
  } else {
    look_at_file(disk);
  }
  look_at_data(disk, options.path);
  if (options.direct) open_direct(disk, options.path, options.read_only);
  return disk;
}

const char* foreign_format(std::span<const unsigned char> first_bytes) {
  struct Magic {
    std::size_t offset;
    std::string_view bytes;
    const char* name;
  };
  using namespace std::string_view_literals;
  static constexpr std::array<Magic, 9> magics = {{
      {0, "QFI\xfb\0\0\0\1"sv, "a qcow image"},
      {0, "QFI\xfb"sv, "a qcow2 image"},
      {0, "KDMV"sv, "a VMDK image"},
      {0, "# Disk DescriptorFile"sv, "a VMDK descriptor"},
      {0x40, "\x7f\x10\xda\xbe"sv, "a VDI image"},
      {0, "vhdxfile"sv, "a VHDX image"},
      {0, "conectix"sv, "a VHD image"},
      {0, "QED\0"sv, "a QED image"},
      {0, "LUKS\xba\xbe"sv, "a LUKS volume"},
  }};
  const std::string_view all(reinterpret_cast<const char*>(first_bytes.data()), first_bytes.size());
  for (const auto& m : magics) {
    if (all.size() >= m.offset + m.bytes.size() &&
        all.substr(m.offset, m.bytes.size()) == m.bytes) {
      return m.name;
    }
  }
  return nullptr;
}

int sync_directory_of(const std::string& path) {
  const auto parent = std::filesystem::path(path).parent_path();
  const UniqueFd directory(
      ::open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  return directory && ::fsync(directory.get()) == 0 ? 0 : errno;
}

IoError to_io_error(int error_number) {
  switch (error_number) {
    case 0:
      return IoError::none;
    case EPERM:
    case EACCES:
    case EROFS:
      return IoError::not_permitted;
    case ENOMEM:
      return IoError::no_memory;
    case EINVAL:
      return IoError::invalid;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return IoError::no_space;
    case EOVERFLOW:
      return IoError::overflow;
    default:
      return IoError::io;
  }
}

}  // namespace nbdferry::proxy
