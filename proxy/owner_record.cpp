#include "proxy/owner_record.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#include <boost/crc.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>

#include "mirror/assert.hpp"
#include "proxy/disk_probe.hpp"
#include "proxy/tls_json.hpp"
#include "proxy/unique_fd.hpp"

namespace nbdferry::proxy {

namespace {

constexpr std::size_t slot_bytes = 4096;
constexpr std::string_view magic = "nbdferry-owner 1 ";  // the 1 is the format's version
constexpr std::size_t header_bytes = magic.size() + 16;  // "crc32c=xxxxxxxx\n"

constexpr std::array<Role, 4> all_roles = {Role::owner, Role::incoming, Role::retired,
                                           Role::pivoted};

[[noreturn]] void fail(const std::string& path, std::string_view why, std::string_view what_to_do) {
  throw std::runtime_error(fmt::format("ownership record '{}': {}: {}", path, why, what_to_do));
}

// --- a slot
// ---------------------------------------------------------------------------------------

std::string header_of(std::string_view body) {
  boost::crc_optimal<32, 0x1EDC6F41, 0xFFFFFFFF, 0xFFFFFFFF, true, true> crc;  // CRC-32C
  crc.process_bytes(body.data(), body.size());
  return fmt::format("{}crc32c={:08x}\n", magic, crc.checksum());
}

// The checksum covers the padding too: any flipped bit of the slot is found.
std::optional<std::string> encode(const Ownership& o) {
  const boost::json::object json{
      {"generation", o.generation},
      {"role", to_string(o.role)},
      {"uris", boost::json::array(o.uris.begin(), o.uris.end())},
      {"vias", boost::json::array(o.vias.begin(), o.vias.end())},
      {"tls", tls_to_json(o.tls)},
      {"peer", o.peer},
      {"migration", o.migration_id},
      {"incoming_peer", o.incoming_peer},
      {"disk", o.disk_id},
      {"device", o.device},
      {"inode", o.inode},
      {"size", o.size},
  };
  std::string body = boost::json::serialize(json) + '\n';
  if (body.size() > slot_bytes - header_bytes) return std::nullopt;
  body.resize(slot_bytes - header_bytes, ' ');
  body.back() = '\n';
  return header_of(body) + body;
}

// None: damaged. Throws what boost::json does for a sound slot with contents that we don't know.
std::optional<Ownership> decode(std::string_view slot) {
  if (slot.size() != slot_bytes) return std::nullopt;
  const auto body = slot.substr(header_bytes);
  if (slot.substr(0, header_bytes) != header_of(body)) return std::nullopt;
  const auto json = boost::json::parse(body).as_object();
  Ownership o;
  o.generation = json.at("generation").to_number<std::uint64_t>();
  const std::string_view role(json.at("role").as_string());
  const auto* known = std::ranges::find(all_roles, role, [](Role r) { return to_string(r); });
  if (known == all_roles.end()) throw std::invalid_argument("unknown role");
  o.role = *known;
  for (const auto& uri : json.at("uris").as_array()) o.uris.emplace_back(uri.as_string());
  if (const auto* list = json.if_contains("vias")) {
    for (const auto& via : list->as_array()) o.vias.emplace_back(via.as_string());
  }
  if (const auto* tls = json.if_contains("tls")) o.tls = tls_from_json(*tls);
  o.peer = json.at("peer").as_string();
  o.migration_id = json.at("migration").as_string();
  if (const auto* v = json.if_contains("incoming_peer")) o.incoming_peer = v->as_bool();
  o.disk_id = json.at("disk").as_string();
  o.device = json.at("device").to_number<std::uint64_t>();
  o.inode = json.at("inode").to_number<std::uint64_t>();
  o.size = json.at("size").to_number<std::uint64_t>();
  return o;
}

// Returns 0 or errno. A short write is a failed one: a slot is written whole or not at all.
int write_slot(int fd, unsigned index, const std::string& slot, int flags) {
  const iovec v{const_cast<char*>(slot.data()), slot.size()};
  const ssize_t n = ::pwritev2(fd, &v, 1, static_cast<off_t>(index * slot_bytes), flags);
  if (n < 0) return errno;
  return n == static_cast<ssize_t>(slot.size()) ? 0 : ENOSPC;
}

// In one step where the file system can, so that nothing that appears meanwhile is replaced.
bool rename_to_absent(const std::string& from, const std::string& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return true;
  if (errno != EINVAL && errno != ENOSYS) return false;
  struct stat st {};
  if (::lstat(to.c_str(), &st) == 0) {
    errno = EEXIST;
    return false;
  }
  return ::rename(from.c_str(), to.c_str()) == 0;
}

// --- the disk that it belongs to
// ------------------------------------------------------------------

void stamp(Ownership& o, const std::string& disk) {
  struct stat st {};
  if (::stat(disk.c_str(), &st) != 0) return;
  if (S_ISBLK(st.st_mode)) {
    o.device = st.st_rdev;  // its node under /dev is new with every boot
    return;
  }
  o.device = st.st_dev;
  o.inode = st.st_ino;
  o.size = static_cast<std::uint64_t>(st.st_size);
}

// A link, a device or a second name would let somebody have another file read or overwritten in the
// record's place; a record that a stranger has put into a shared folder would say whose the disk is.
void check_file(int fd, const std::string& path, const std::string& disk) {
  struct stat st {};
  if (::fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    fail(path, "is not a file", "move away what is there");
  }
  if (st.st_nlink > 1) {
    fail(path, "is a hard link: another name leads to it too",
         "make it a file of its own, by copying it");
  }
  struct stat owner {};
  const bool found = ::stat(disk.c_str(), &owner) == 0;
  if (st.st_uid != 0 && st.st_uid != ::geteuid() && !(found && st.st_uid == owner.st_uid)) {
    fail(path, fmt::format("belongs to a stranger (uid {})", st.st_uid),
         "if it is right, give it to root or to the user that runs nbdferry");
  }
}

// What a first record needs is there already, or a person should know now, not at the commit.
bool may_create(const std::string& path) {
  std::filesystem::path folder = std::filesystem::path(path).parent_path();
  if (folder.empty()) folder = ".";
  const auto has = [&](int what) {
    return ::faccessat(AT_FDCWD, folder.c_str(), what, AT_EACCESS) == 0;
  };
  while (!has(F_OK) && errno == ENOENT && folder.has_relative_path()) folder = folder.parent_path();
  return has(W_OK | X_OK);
}

// For who may not write where the record belongs.
std::string how_to_make_writable(const std::string& path) {
  const auto folder = std::filesystem::path(path).parent_path();
  std::error_code error;
  if (!folder.empty() && !std::filesystem::exists(folder, error)) {
    return fmt::format("make its folder, as root: install -d -o {} {}", ::geteuid(),
                       folder.string());
  }
  return fmt::format("let uid {} write to its folder", ::geteuid());
}

std::string random_id() {
  std::array<unsigned char, 16> bytes{};
  const auto n = ::getrandom(bytes.data(), bytes.size(), 0);
  NBDFERRY_ASSERT(n == static_cast<ssize_t>(bytes.size()), "getrandom");
  std::string id;
  for (const auto b : bytes) id += fmt::format("{:02x}", b);
  return id;
}

// One line of a sysfs file, fit for a file name; empty if there is none.
std::string sysfs_word(const std::filesystem::path& file) {
  std::ifstream in(file);
  std::string line;
  std::getline(in, line);
  const auto end = line.find_last_not_of(" \n\t");
  line.erase(end == std::string::npos ? 0 : end + 1);
  for (auto& c : line) {
    const bool plain = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    if (!plain && c != '.' && c != '-' && c != '_') c = '_';
  }
  return line;
}

}  // namespace

std::string_view to_string(Role role) {
  switch (role) {
    case Role::owner:
      return "owner";
    case Role::incoming:
      return "incoming";
    case Role::retired:
      return "retired";
    case Role::pivoted:
      return "pivoted";
  }
  return "unknown";
}

// --- reading
// --------------------------------------------------------------------------------------

OwnerRecord OwnerRecord::load(const std::string& path, const std::string& disk) {
  OwnerRecord record(path, disk);
  // No link: somebody else's file must not be taken for, or overwritten as, the record.
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!fd) {
    if (errno == ENOENT) {
      if (!may_create(path)) {
        record.note_ = fmt::format(
            "ownership record '{}': can't be created by this user, so no migration could be "
            "committed: {}",
            path, how_to_make_writable(path));
      }
      return record;
    }
    if (errno == ELOOP) fail(path, "is a symbolic link", "put the file itself there");
    fail(path, fmt::format("can't be read: {}", std::strerror(errno)),
         "run as a user who may read it");
  }
  check_file(fd.get(), path, disk);
  record.read_slots(fd.get());
  return record;
}

void OwnerRecord::read_slots(int fd) {
  // A second slot that an earlier process left in the page cache is made durable before either is
  // relied on.
  if (::fdatasync(fd) != 0) {
    fail(path_, fmt::format("can't be synced: {}", std::strerror(errno)), "check its disk");
  }
  // So may a first record's name be. Who may not read the folder has made no record in it.
  if (const int error = sync_directory_of(path_); error != 0 && error != EACCES) {
    fail(path_, fmt::format("its folder can't be synced: {}", std::strerror(error)),
         "check its disk");
  }
  std::array<std::optional<Ownership>, 2> slots;
  for (unsigned i = 0; i < 2; ++i) {
    std::string bytes(slot_bytes, '\0');
    const ssize_t n = ::pread(fd, bytes.data(), slot_bytes, static_cast<off_t>(i * slot_bytes));
    bytes.resize(n < 0 ? 0 : static_cast<std::size_t>(n));
    try {
      slots[i] = decode(bytes);
    } catch (const std::exception&) {
      fail(path_, "was written by another version of nbdferry", "use that version");
    }
  }
  if (!slots[0] && !slots[1]) {
    fail(path_, "is damaged: who owns the disk is unknown",
         "find out which host has its latest data; only if it is this one, remove the record");
  }
  durable_slot_ = !slots[0] || (slots[1] && slots[1]->generation > slots[0]->generation) ? 1 : 0;
  current_ = *slots[durable_slot_];
  Ownership now;
  stamp(now, disk_);
  if (!slots[0] || !slots[1]) {
    note_ =
        fmt::format("ownership record '{}': one of its two copies is damaged; the other says {}",
                    path_, to_string(current_.role));
  } else if (now.inode != current_.inode || now.size != current_.size) {
    note_ = fmt::format(
        "ownership record '{}': written for another file than '{}' (copied?); it says {}", path_,
        disk_, to_string(current_.role));
  }
}

// --- writing
// --------------------------------------------------------------------------------------

void OwnerRecord::write(Ownership next) {
  next.generation = current_.generation + 1;
  next.disk_id = current_.disk_id.empty() ? random_id() : current_.disk_id;
  stamp(next, disk_);
  const auto slot = encode(next);
  if (!slot) {
    fail(path_, fmt::format("is longer than {} bytes", slot_bytes), "use fewer or shorter URIs");
  }
  if (current_.generation == 0) {
    create(*slot);
    durable_slot_ = 0;
  } else {
    overwrite(*slot);
  }
  current_ = std::move(next);
}

// Appears under its name complete and durable, or not at all.
void OwnerRecord::create(const std::string& slot) const {
  const std::string temporary = path_ + ".new";
  const auto give_up = [&](std::string_view doing) {
    const int error = errno;
    ::unlink(temporary.c_str());
    fail(path_, fmt::format("{}: {}", doing, std::strerror(error)),
         error == EACCES || error == ENOENT ? how_to_make_writable(path_)
                                            : "make its folder writable, with 8 KiB free");
  };
  const auto folder = std::filesystem::path(path_).parent_path();
  std::error_code ignored;  // the open below tells
  if (!folder.empty() && std::filesystem::create_directories(folder, ignored)) {
    (void)sync_directory_of(folder);
  }
  ::unlink(temporary.c_str());  // a crash may have left one
  const UniqueFd fd(
      ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!fd) give_up("can't be created");
  for (unsigned i = 0; i < 2; ++i) {
    errno = write_slot(fd.get(), i, slot, 0);
    if (errno != 0) give_up("can't be written");
  }
  if (::fsync(fd.get()) != 0) give_up("can't be synced");
  if (!rename_to_absent(temporary, path_)) {
    give_up(errno == EEXIST ? "appeared meanwhile" : "can't be named");
  }
  if (const int error = sync_directory_of(path_); error != 0) {
    ::unlink(path_.c_str());
    fail(path_, fmt::format("its folder can't be synced: {}", std::strerror(error)),
         "check its disk; whether the record is there is unknown");
  }
}

void OwnerRecord::overwrite(const std::string& slot) {
  const UniqueFd fd(::open(path_.c_str(), O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!fd) {
    fail(path_, fmt::format("can't be opened for writing: {}", std::strerror(errno)),
         fmt::format("make it writable; it still says {}", to_string(current_.role)));
  }
  check_file(fd.get(), path_, disk_);
  const bool one_slot = NBDFERRY_MUTANT(record_one_slot);
  const int synchronous = NBDFERRY_MUTANT(record_not_synced) ? 0 : RWF_DSYNC;
  const unsigned target = one_slot ? durable_slot_ : 1 - durable_slot_;
  if (const int error = write_slot(fd.get(), target, slot, synchronous); error != 0) {
    // It may have reached the disk all the same, or reach it later: put the old record back.
    const bool undone = write_slot(fd.get(), target, *encode(current_), RWF_DSYNC) == 0;
    fail(path_, fmt::format("can't be written: {}", std::strerror(error)),
         undone ? fmt::format("check its disk; it still says {}", to_string(current_.role))
                : "check its disk; what it says now is unknown, look before the next start");
  }
  durable_slot_ = target;
  // Best effort, and no wait: the record is durable already.
  if (!one_slot) (void)write_slot(fd.get(), 1 - target, slot, 0);
}

// --- its place
// ------------------------------------------------------------------------------------

RecordPlace owner_record_place(const std::string& disk, const std::string& devices) {
  std::error_code error;
  // The same disk by another name has the same record.
  const auto real = std::filesystem::canonical(disk, error);
  struct stat st {};
  if (error || ::stat(real.c_str(), &st) != 0) {
    throw std::runtime_error(fmt::format("disk '{}': {}: check the path", disk,
                                         error ? error.message() : std::strerror(errno)));
  }
  if (!S_ISBLK(st.st_mode)) return {real.string() + ".owner", ""};
  const auto number = fmt::format("{}:{}", major(st.st_rdev), minor(st.st_rdev));
  if (const auto id = stable_device_id("/sys/dev/block/" + number)) {
    return {fmt::format("{}/{}.owner", devices, *id), ""};
  }
  const auto path = fmt::format("{}/device-{}.owner", devices, number);
  return {path,
          fmt::format("device '{}' has no serial number: its ownership record '{}' goes by its "
                      "device number, which may be another one after a reboot",
                      disk, path)};
}

std::optional<std::string> stable_device_id(const std::filesystem::path& sysfs) {
  struct Source {
    const char* file;
    const char* kind;
  };
  static constexpr std::array<Source, 6> sources = {{{"dm/uuid", "dm"},
                                                     {"md/uuid", "md"},
                                                     {"wwid", "wwid"},
                                                     {"device/wwid", "wwid"},
                                                     {"serial", "serial"},
                                                     {"device/serial", "serial"}}};
  for (const auto& source : sources) {
    const auto word = sysfs_word(sysfs / source.file);
    if (!word.empty()) return fmt::format("{}-{}", source.kind, word);
  }
  // A partition: its disk's name and its number.
  const auto number = sysfs_word(sysfs / "partition");
  if (number.empty()) return std::nullopt;
  std::error_code error;
  const auto real = std::filesystem::canonical(sysfs, error);
  if (error) return std::nullopt;
  const auto whole = stable_device_id(real.parent_path());
  if (!whole) return std::nullopt;
  return fmt::format("{}-part{}", *whole, number);
}

}  // namespace nbdferry::proxy
