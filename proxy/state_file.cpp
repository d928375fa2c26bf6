#include "proxy/state_file.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <stdexcept>
#include <string_view>
#include <utility>

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

#include <boost/crc.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>

#include "mirror/assert.hpp"

namespace nbdferry::proxy {

namespace {

constexpr std::size_t page_bytes = 4096;
constexpr std::size_t slot_bytes = page_bytes;
constexpr std::size_t heartbeat_at = 2 * slot_bytes;
constexpr std::size_t memory_at = heartbeat_at + page_bytes;

constexpr std::string_view magic = "nbdferry-state ";
constexpr std::string_view version = "1 ";
constexpr std::size_t line_bytes = magic.size() + version.size() + 16;  // "crc32c=xxxxxxxx\n"

// A write that was in flight at the heartbeat stamps the disk when the kernel gets to it, at the
// latest when the killed process's requests are waited for. Somebody else's write within this time
// would pass for it; but they would have to be that quick after a kill.
constexpr std::uint64_t in_flight_margin_ns = 1'000'000'000;

[[noreturn]] void fail(std::string_view what, const std::string& path, std::string_view why,
                       std::string_view what_to_do) {
  throw std::runtime_error(fmt::format("state {} '{}': {}: {}", what, path, why, what_to_do));
}

constexpr std::size_t file_bytes_for(std::size_t memory_bytes) {
  return memory_at + (memory_bytes + page_bytes - 1) / page_bytes * page_bytes;
}

// --- the header
// -----------------------------------------------------------------------------------

struct Header {
  std::uint64_t sequence = 0;
  std::string boot;
  SourceIdentity source;
  std::uint64_t memory_bytes = 0;
  SavedMigration migration;
};

std::string first_line_of(std::string_view body) {
  boost::crc_optimal<32, 0x1EDC6F41, 0xFFFFFFFF, 0xFFFFFFFF, true, true> crc;  // CRC-32C
  crc.process_bytes(body.data(), body.size());
  return fmt::format("{}{}crc32c={:08x}\n", magic, version, crc.checksum());
}

// None: too long. The checksum covers the padding too: any flipped bit of the slot is found.
std::optional<std::string> encode(const Header& h) {
  const boost::json::object json{
      {"sequence", h.sequence},
      {"boot", h.boot},
      {"source",
       {{"device", h.source.device},
        {"inode", h.source.inode},
        {"sequence", h.source.sequence},
        {"size", h.source.size},
        {"block_device", h.source.block_device}}},
      {"memory_bytes", h.memory_bytes},
      {"migration", h.migration.id},
      {"request", h.migration.request},
      {"running", h.migration.running},
      {"paused", h.migration.paused},
      {"incoming", h.migration.incoming},
      {"generation", h.migration.generation},
      {"pivot", h.migration.pivot},
  };
  std::string body = boost::json::serialize(json) + '\n';
  if (body.size() > slot_bytes - line_bytes) return std::nullopt;
  body.resize(slot_bytes - line_bytes, ' ');
  body.back() = '\n';
  return first_line_of(body) + body;
}

// None: damaged. Throws what boost::json does for a sound slot with contents that we don't know.
std::optional<Header> decode(std::string_view slot) {
  if (slot.size() != slot_bytes) return std::nullopt;
  const auto body = slot.substr(line_bytes);
  if (slot.substr(0, line_bytes) != first_line_of(body)) return std::nullopt;
  const auto json = boost::json::parse(body).as_object();
  const auto number = [](const boost::json::value& v) { return v.to_number<std::uint64_t>(); };
  Header h;
  h.sequence = number(json.at("sequence"));
  h.boot = json.at("boot").as_string();
  const auto& source = json.at("source").as_object();
  h.source.device = number(source.at("device"));
  h.source.inode = number(source.at("inode"));
  h.source.sequence = number(source.at("sequence"));
  h.source.size = number(source.at("size"));
  h.source.block_device = source.at("block_device").as_bool();
  h.memory_bytes = number(json.at("memory_bytes"));
  h.migration.id = json.at("migration").as_string();
  h.migration.request = json.at("request").as_object();
  h.migration.running = json.at("running").as_bool();
  h.migration.paused = json.at("paused").as_bool();
  h.migration.incoming = json.at("incoming").as_bool();
  h.migration.generation = number(json.at("generation"));
  if (const auto* pivot = json.if_contains("pivot")) h.migration.pivot = number(*pivot);
  return h;
}

bool is_of_another_version(std::string_view slot) {
  return slot.starts_with(magic) && !slot.substr(magic.size()).starts_with(version);
}

// The newest whole one of the slots in `front`; else why there is none.
std::optional<Header> newest_header(std::string_view front, std::string& why_not) {
  std::optional<Header> newest;
  for (const std::size_t at : {std::size_t{0}, slot_bytes}) {
    const auto slot = front.substr(std::min(at, front.size()), slot_bytes);
    try {
      auto header = decode(slot);
      if (header && (!newest || header->sequence > newest->sequence)) newest = std::move(header);
      if (is_of_another_version(slot)) why_not = "is of another version of nbdferry";
    } catch (const std::exception&) {
      why_not = "is of another version of nbdferry";
    }
  }
  if (newest) {
    why_not.clear();
  } else if (why_not.empty()) {
    why_not = front.size() < memory_at ? "is truncated" : "is damaged";
  }
  return newest;
}

// --- the heartbeat
// --------------------------------------------------------------------------------
// Time and flag in one word, so that one store writes both: were they two, a kill between them
// could pair the flag of one beat with the time of another one, and "nothing was in flight" with
// the earlier time would be a false alarm, with the later one trust in what isn't so.

struct Heartbeat {
  std::uint64_t time_ns = 0;  // CLOCK_REALTIME, since 1970: 63 bits last until 2262
  bool writes_in_flight = false;
};

constexpr std::uint64_t pack(Heartbeat h) { return h.time_ns << 1 | (h.writes_in_flight ? 1 : 0); }
constexpr Heartbeat unpack(std::uint64_t word) { return {word >> 1, (word & 1) != 0}; }

std::uint64_t nanoseconds(const timespec& t) {
  return static_cast<std::uint64_t>(t.tv_sec) * 1'000'000'000 +
         static_cast<std::uint64_t>(t.tv_nsec);
}

// Not CLOCK_REALTIME_COARSE, though most of the kernel's stamps are: since Linux 6.13 ("multigrain
// timestamps") a file that somebody has looked at (ls, du, our own find()) gets a fine stamp with
// the next write, and by it every file a later coarse one: later, by up to a tick or two, than the
// coarse clock reads after the write. Our own writes would look foreign. The fine clock is never
// before any stamp of the past; and with either clock a foreign write shows unless it follows the
// heartbeat within the same tick.
std::uint64_t now_ns() {
  timespec t{};
  ::clock_gettime(CLOCK_REALTIME, &t);
  return nanoseconds(t);
}

// --- the disk
// -------------------------------------------------------------------------------------

// Empty if it can't be read.
std::string first_word_of(const std::string& path) {
  std::string word;
  std::ifstream(path) >> word;
  return word;
}

std::uint64_t disk_sequence(dev_t device) {
  const auto base = fmt::format("/sys/dev/block/{}:{}/", major(device), minor(device));
  for (const char* where : {"diskseq", "../diskseq"}) {  // a disk, a partition
    const auto word = first_word_of(base + where);
    if (!word.empty()) return std::strtoull(word.c_str(), nullptr, 10);
  }
  return 0;
}

std::string name_of(const SourceIdentity& source) {
  const auto number = fmt::format("{}-{}", major(source.device), minor(source.device));
  return source.block_device ? fmt::format("block-{}.state", number)
                             : fmt::format("{}-{}.state", number, source.inode);
}

// Others may be stamped by another machine's clock (NFS, CIFS, FUSE, cluster file systems), which
// says nothing about before and after our heartbeat.
bool is_stamped_by_our_clock(const std::string& disk) {
  constexpr std::array<long, 9> ours = {
      EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC,       BTRFS_SUPER_MAGIC,    F2FS_SUPER_MAGIC, TMPFS_MAGIC,
      RAMFS_MAGIC,      OVERLAYFS_SUPER_MAGIC, 0x2fc12fc1 /* ZFS */, 0xca451a4e /* bcachefs */};
  struct statfs fs {};
  return ::statfs(disk.c_str(), &fs) == 0 && std::ranges::find(ours, fs.f_type) != ours.end();
}

// Empty: nobody else has written to the disk since the heartbeat, as far as can be known. A block
// device has no time of its last write (its node's mtime is no such thing): there it isn't, and
// whoever writes to one while no nbdferry serves it has to remove the state file.
std::string why_foreign(const std::string& disk, const SourceIdentity& source,
                        const Heartbeat& heartbeat) {
  // Also in the case of block devices: a clock that was set back is worth no trust.
  if (heartbeat.time_ns > now_ns()) return "is from the future: the clock was set back";
  if (source.block_device) return "";
  if (!is_stamped_by_our_clock(disk)) {
    return fmt::format("can't be relied on: the file system of '{}' may set times by another clock",
                       disk);
  }
  struct stat st {};
  if (::stat(disk.c_str(), &st) != 0) return std::strerror(errno);
  // ctime too: mtime can be set to any value, and tools that copy a file do so.
  const auto written = std::max(nanoseconds(st.st_mtim), nanoseconds(st.st_ctim));
  const auto margin = heartbeat.writes_in_flight ? in_flight_margin_ns : 0;
  if (written <= heartbeat.time_ns + margin) return "";
  return fmt::format("is out of date: '{}' was written since", disk);
}

// --- the directory
// --------------------------------------------------------------------------------

// Empty, or what is wrong. It must be in memory: only there is what was stored in a mapping kept,
// and nothing but that, without a word to a disk.
std::string why_unfit(int directory) {
  struct stat st {};
  struct statfs fs {};
  if (::fstat(directory, &st) != 0 || ::fstatfs(directory, &fs) != 0) return std::strerror(errno);
  if (st.st_uid != ::geteuid() && st.st_uid != 0) return "belongs to another user";
  // In a sticky one others can't replace what is ours.
  if ((st.st_mode & (S_IWGRP | S_IWOTH)) != 0 && (st.st_mode & S_ISVTX) == 0) {
    return "may be written to by others";
  }
  if (fs.f_type != TMPFS_MAGIC && fs.f_type != RAMFS_MAGIC) return "is not in memory (tmpfs)";
  return "";
}

struct OpenedDirectory {
  UniqueFd fd;
  std::string why_not;
};

OpenedDirectory make_directory(const std::string& path) {
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return {UniqueFd(), fmt::format("can't be made: {}", std::strerror(errno))};
  }
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return {UniqueFd(), std::strerror(errno)};
  auto why_not = why_unfit(fd.get());
  if (why_not.empty() && ::faccessat(fd.get(), ".", W_OK | X_OK, AT_EACCESS) != 0) {
    why_not = std::strerror(errno);
  }
  return {std::move(fd), std::move(why_not)};
}

// --- the file
// -------------------------------------------------------------------------------------

// Gives every page that is missing its place; the others stay as they are. Returns 0 or errno.
int allocate(int fd, std::size_t begin, std::size_t end) {
  int error = 0;
  do {
    error = ::posix_fallocate(fd, static_cast<off_t>(begin), static_cast<off_t>(end - begin));
  } while (error == EINTR);
  return error;
}

// Empty, or why it may be somebody else's doing.
std::string why_not_ours(const struct stat& st) {
  if (!S_ISREG(st.st_mode)) return "is not a regular file";
  if (st.st_uid != ::geteuid()) return "belongs to another user";
  if ((st.st_mode & 07777 & ~0600) != 0) return "may be opened by others (its mode is not 0600)";
  if (st.st_nlink != 1) return "has more than one name, or none (hard links)";
  return "";
}

std::string why_unopened(int error) {
  if (error == ELOOP) return "is a symbolic link";
  if (error == EISDIR) return "is not a regular file";
  return fmt::format("can't be read: {}", std::strerror(error));
}

// Whether another process has it mapped: one that serves the same disk, which only happens where
// the disk is read-only.
bool lock(int fd) { return ::flock(fd, LOCK_EX | LOCK_NB) == 0; }

std::string front_of(int fd) {
  std::string front(memory_at, '\0');
  const ssize_t n = ::pread(fd, front.data(), front.size(), 0);
  front.resize(n < 0 ? 0 : static_cast<std::size_t>(n));
  return front;
}

Heartbeat heartbeat_of(std::string_view front) {
  std::uint64_t word = 0;
  if (front.size() == memory_at) std::memcpy(&word, &front[heartbeat_at], sizeof word);
  return unpack(word);
}

std::string boot_id() { return first_word_of("/proc/sys/kernel/random/boot_id"); }

}  // namespace

SourceIdentity SourceIdentity::of(const std::string& disk, std::uint64_t size) {
  struct stat st {};
  if (::stat(disk.c_str(), &st) != 0) {
    throw std::runtime_error(
        fmt::format("disk '{}': {}: check the path", disk, std::strerror(errno)));
  }
  if (S_ISBLK(st.st_mode)) return {st.st_rdev, 0, disk_sequence(st.st_rdev), size, true};
  return {st.st_dev, st.st_ino, 0, size, false};
}

// --- writing
// --------------------------------------------------------------------------------------

void StateFile::Unmap::operator()(std::byte* at) const { ::munmap(at, bytes); }

StateFile::StateFile(std::string path, UniqueFd fd, std::size_t memory_bytes,
                     const SourceIdentity& source, std::string boot)
    : path_(std::move(path)),
      fd_(std::move(fd)),
      memory_bytes_(memory_bytes),
      source_(source),
      boot_(std::move(boot)) {
  // What the journal may come to is no more than addresses: only what the file has is touched.
  const auto bytes = file_bytes_for(memory_bytes) + journal_bytes_max;
  void* const at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  if (at == MAP_FAILED) {
    fail("file", path_, fmt::format("can't be mapped: {}", std::strerror(errno)),
         "give the process more address space");
  }
  map_ = {static_cast<std::byte*>(at), Unmap{bytes}};
}

std::span<std::byte> StateFile::memory() const { return {map_.get() + memory_at, memory_bytes_}; }

std::span<std::byte> StateFile::journal() const {
  return {map_.get() + file_bytes_for(memory_bytes_), journal_bytes_};
}

void StateFile::begin_journal(std::size_t bytes) {
  journal_bytes_ = 0;
  if (::ftruncate(fd_.get(), static_cast<off_t>(file_bytes_for(memory_bytes_))) != 0) {
    fail("file", path_, fmt::format("can't be cut: {}", std::strerror(errno)), "remove it");
  }
  allocate_journal(bytes);
}

void StateFile::grow_journal(std::size_t bytes) {
  if (bytes <= journal_bytes_) return;
  struct statfs fs {};
  if (::fstatfs(fd_.get(), &fs) != 0) fail("file", path_, std::strerror(errno), "check it");
  const auto more = (bytes - journal_bytes_) / static_cast<std::size_t>(fs.f_bsize);
  if (fs.f_bavail < more + fs.f_blocks / 2) {
    fail("file", path_, fmt::format("half of its file system would be in use at {} bytes", bytes),
         "make room");
  }
  allocate_journal(bytes);
}

void StateFile::allocate_journal(std::size_t bytes) {
  NBDFERRY_ASSERT(bytes <= journal_bytes_max, "a journal beyond its addresses");
  // From where it ends: what it has may be written to meanwhile.
  const auto front = file_bytes_for(memory_bytes_);
  if (const int error = allocate(fd_.get(), front + journal_bytes_, front + bytes); error != 0) {
    fail("file", path_, fmt::format("can't grow to {}: {}", front + bytes, std::strerror(error)),
         "make room in its file system");
  }
  journal_bytes_ = bytes;
}

void StateFile::beat(bool writes_in_flight) {
  auto* const word = reinterpret_cast<std::uint64_t*>(map_.get() + heartbeat_at);
  static_assert(std::atomic_ref<std::uint64_t>::is_always_lock_free);
  // Release: what was stored in the memory before is there when the heartbeat is.
  std::atomic_ref(*word).store(pack({now_ns(), writes_in_flight}), std::memory_order_release);
}

void StateFile::save(const SavedMigration& migration) {
  const auto slot = encode({sequence_ + 1, boot_, source_, memory_bytes_, migration});
  if (!slot) {
    fail("file", path_, fmt::format("the migration takes more than {} bytes", slot_bytes),
         "use shorter URIs");
  }
  ++sequence_;
  // One after the other: at any time one of them is whole. Both: later damage to one doesn't bring
  // back what was saved before.
  for (const std::size_t at : {std::size_t{0}, slot_bytes}) {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    std::memcpy(map_.get() + at, slot->data(), slot_bytes);
  }
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

void StateFile::remove() noexcept {
  struct stat ours {};
  struct stat there {};
  // Not another one that has taken its place meanwhile.
  if (::fstat(fd_.get(), &ours) == 0 && ::lstat(path_.c_str(), &there) == 0 &&
      ours.st_dev == there.st_dev && ours.st_ino == there.st_ino) {
    ::unlink(path_.c_str());
  }
}

StateFile StateFile::create(const std::string& directory, const std::string& disk,
                            std::uint64_t disk_bytes, std::size_t memory_bytes,
                            const SavedMigration& migration) {
  NBDFERRY_ASSERT(memory_bytes > 0, "a state file for no memory");
  const auto source = SourceIdentity::of(disk, disk_bytes);
  const auto name = name_of(source);
  const auto path = fmt::format("{}/{}", directory, name);
  const auto temporary = name + ".new";
  auto boot = boot_id();
  if (boot.empty()) fail("file", path, "this boot's id can't be read", "mount /proc");
  const auto opened = make_directory(directory);
  if (!opened.why_not.empty()) {
    fail("directory", directory, opened.why_not,
         "a restart will copy everything; give --state a directory of your own on a tmpfs, e.g. "
         "under /run or /dev/shm");
  }
  ::unlinkat(opened.fd.get(), temporary.c_str(), 0);  // a crash may have left one
  UniqueFd fd(::openat(opened.fd.get(), temporary.c_str(),
                       O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  const auto give_up = [&](std::string_view doing, int error) {
    if (error != EEXIST) ::unlinkat(opened.fd.get(), temporary.c_str(), 0);
    fail("file", path, fmt::format("{}: {}", doing, std::strerror(error)),
         fmt::format("a restart will copy everything; it takes {} bytes in a directory of your own",
                     file_bytes_for(memory_bytes)));
  };
  if (!fd) give_up("can't be created", errno);
  if (!lock(fd.get())) give_up("can't be locked", errno);
  if (const int error = allocate(fd.get(), 0, file_bytes_for(memory_bytes)); error != 0) {
    give_up("can't be written", error);
  }
  try {
    StateFile file(path, std::move(fd), memory_bytes, source, std::move(boot));
    file.save(migration);
    file.beat(true);  // what is in flight isn't known here
    if (::renameat(opened.fd.get(), temporary.c_str(), opened.fd.get(), name.c_str()) != 0) {
      give_up("can't be named", errno);
    }
    return file;
  } catch (...) {
    ::unlinkat(opened.fd.get(), temporary.c_str(), 0);
    throw;
  }
}

// --- reading
// --------------------------------------------------------------------------------------

FoundState StateFile::find(const std::string& directory, const std::string& disk,
                           std::uint64_t disk_bytes, std::size_t memory_bytes, bool serves) {
  const auto source = SourceIdentity::of(disk, disk_bytes);
  const auto name = name_of(source);
  const auto path = fmt::format("{}/{}", directory, name);
  FoundState found;
  const auto no = [&](std::string_view why) {
    found.why_not = fmt::format("state file '{}': {}", path, why);
    return std::move(found);
  };
  const UniqueFd opened(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!opened) return errno == ENOENT ? FoundState{} : no(why_unopened(errno));
  UniqueFd fd(::openat(opened.get(), name.c_str(),
                       O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
  if (!fd) return errno == ENOENT ? FoundState{} : no(why_unopened(errno));
  if (const auto why = why_unfit(opened.get()); !why.empty()) {
    return no(fmt::format("its directory {}", why));
  }
  struct stat st {};
  if (::fstat(fd.get(), &st) != 0) return no(why_unopened(errno));
  if (const auto why = why_not_ours(st); !why.empty()) return no(why);
  if (!lock(fd.get())) return no("is in use by another nbdferry");
  const auto front = front_of(fd.get());
  std::string why;
  auto header = newest_header(front, why);
  if (!header) return no(why);
  if (header->source != source) return no(fmt::format("is not that of '{}' (or its size)", disk));
  // Device numbers of another boot say nothing.
  const bool same_boot = header->boot == boot_id() && !header->boot.empty();
  if (same_boot || !source.block_device) found.migration = header->migration;

  if (!same_boot) return no("is of another boot");
  if (header->memory_bytes != memory_bytes) return no("has a map of another size");
  const auto bytes = static_cast<std::uint64_t>(st.st_size);
  const auto whole = file_bytes_for(memory_bytes);
  const auto longest = whole + (header->migration.pivot == 0 ? 0 : journal_bytes_max);
  if (bytes < whole || bytes > longest) return no("is truncated, or longer than it was");
  if (serves) why = why_foreign(disk, source, heartbeat_of(front));
  if (!why.empty()) return no(why);
  // It was allocated when it was made; a hole since then would be a SIGBUS on a full tmpfs.
  if (const int error = allocate(fd.get(), 0, bytes); error != 0) {
    return no(fmt::format("can't be written: {}", std::strerror(error)));
  }
  try {
    StateFile file(path, std::move(fd), memory_bytes, source, header->boot);
    file.sequence_ = header->sequence;
    file.journal_bytes_ = bytes - whole;
    found.file = std::move(file);
  } catch (const std::runtime_error& e) {
    found.why_not = e.what();
  }
  return found;
}

// --- the default place
// ----------------------------------------------------------------------------

StateDirectory default_state_directory(const std::string& system) {
  const char* const runtime = std::getenv("XDG_RUNTIME_DIR");
  std::string why_not;
  for (const auto& path :
       {system, runtime != nullptr && *runtime == '/' ? fmt::format("{}/nbdferry", runtime) : ""}) {
    if (path.empty()) continue;
    const auto opened = make_directory(path);
    if (opened.why_not.empty()) return {path, ""};
    why_not += fmt::format("{}'{}' {}", why_not.empty() ? "" : ", ", path, opened.why_not);
  }
  return {"", fmt::format("no directory for the state file ({}): a restart will copy everything; "
                          "give --state a directory on a tmpfs, e.g. under /run or /dev/shm",
                          why_not)};
}

}  // namespace nbdferry::proxy
