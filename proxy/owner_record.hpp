// The ownership record (DESIGN.md, rule 11): which host's copy of a disk is the one that counts.
// `DISK.owner` beside a file, `/var/lib/nbdferry/<stable id>.owner` for a block device.
//
// The file is two slots of 4 KiB, each a line with a checksum and then JSON, readable with cat.
// What must hold:
//  - A write is one synchronous write of one slot; whatever tears it, the other slot holds the
//  record
//    before it. So a crash leaves the old record or the new one, whole.
//  - After it the other slot is brought up too, unsynchronised, so that later damage to one slot
//    doesn't bring back an older role: a retired disk must not wake up as an owner.
//  - Nothing is guessed: an absent file means owner, generation 0; a damaged one is an error.
//  - Generations only grow.
//
// All calls block: off the loop, and one at a time.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "transport/tls.hpp"

namespace nbdferry::proxy {

enum class Role : std::uint8_t {
  owner,     // this host's copy counts
  incoming,  // being filled by a migration; nobody else may write
  retired,   // another host's copy counts: no I/O here
  pivoted,   // another host's copy counts, and we serve from it
};

[[nodiscard]] std::string_view to_string(Role role);

struct Ownership {
  Role role = Role::owner;
  std::vector<std::string> uris;  // pivoted, retired: where the disk is; incoming: empty
  std::vector<std::string> vias;  // local addresses for these, if any
  transport::TlsOptions tls;      // for these
  std::string peer;               // whom we gave it to or get it from, for a person
  std::string migration_id;
  bool incoming_peer = false;  // pivoted: the target took writes from us only

  // Set by OwnerRecord::write.
  std::uint64_t generation = 0;  // 0: never written
  std::string disk_id;           // random, from the first record on: stays when the file is copied
  std::uint64_t device = 0;  // of the disk's file when the record was written: a copy of disk and
  std::uint64_t inode = 0;   // record together shows by these
  std::uint64_t size = 0;
};

class OwnerRecord {
 public:
  // Reads the record at `path` of the disk at `disk`. Throws std::runtime_error: "what: why: what
  // to do" when there is one that can't be trusted.
  static OwnerRecord load(const std::string& path, const std::string& disk);

  [[nodiscard]] const Ownership& current() const { return current_; }
  [[nodiscard]] const std::string& path() const { return path_; }
  // One line that the operator should see (a damaged slot, a copied file), or empty.
  [[nodiscard]] const std::string& note() const { return note_; }

  // Durable when it returns; its generation is the current one's successor. Throws
  // std::runtime_error, and then the record stands as it was, or the text says that this is
  // unknown.
  void write(Ownership next);

  // Where the last durable write went: the other slot is the one that may be torn next.
  [[nodiscard]] unsigned durable_slot() const { return durable_slot_; }

 private:
  OwnerRecord(std::string path, std::string disk)
      : path_(std::move(path)), disk_(std::move(disk)) {}
  void read_slots(int fd);
  void create(const std::string& slot) const;
  void overwrite(const std::string& slot);

  std::string path_;
  std::string disk_;
  std::string note_;
  Ownership current_;
  unsigned durable_slot_ = 0;
};

struct RecordPlace {
  std::string path;
  std::string note;  // one line for the log, or empty
};

// Where the record of `disk` belongs. Throws std::runtime_error when the disk isn't there.
[[nodiscard]] RecordPlace owner_record_place(const std::string& disk,
                                             const std::string& devices = "/var/lib/nbdferry");

// A name for a block device that is the same after a reboot, from its folder in /sys; none if the
// device has no serial number of any kind.
[[nodiscard]] std::optional<std::string> stable_device_id(const std::filesystem::path& sysfs);

}  // namespace nbdferry::proxy
