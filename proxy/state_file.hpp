// The state file (DESIGN.md, "Restart and resume"): by it a migration survives kill -9 of this
// process. `<directory>/<name>.state`, one per disk, memory-mapped, in memory (tmpfs): what a
// process has stored there stays when it is killed, without any system call, and is gone with the
// boot.
//
// Two header slots of 4 KiB (readable with cat: a line with a checksum, then JSON), a page with the
// heartbeat, then the core's memory from a page boundary on; and, after a pivot, its journal behind that.
// What must hold:
//  - Killed at any instruction, the file is one that find() judges rightly: the slots are written
//    one after the other, the heartbeat is a single store, and a new file appears under its name
//    complete or not at all.
//  - Trusted is a file only if nothing is wrong with it: ours alone, whole, of this boot, of this
//    disk, and the disk not written by anybody else since the heartbeat. Any doubt: not trusted,
//    and a line that says why.
//  - All its pages exist from the start: a full tmpfs is an error of create(), never a SIGBUS. So do the
//    journal's, of begin_journal() and grow_journal().
//
// What the owner of a StateFile owes it: memory() marks what a write touches *before* the write is
// submitted, from the call of find() or create() on; whoever serves the disk without doing so
// calls no beat() and removes the file. A disk is locked (disk_probe) before its file is looked
// for, so that no write of a killed predecessor is still under way.
//
// create(), find() and the journal's calls block (they allocate): off the loop, or at start.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include <boost/json/object.hpp>

#include "proxy/unique_fd.hpp"

namespace nbdferry::proxy {

// Which disk it is, within one boot.
struct SourceIdentity {
  std::uint64_t device = 0;  // st_dev of a file, st_rdev of a block device
  std::uint64_t inode = 0;   // 0 for a block device: its node may be made anew
  // Of a block device: the kernel's number of this use of the device number (diskseq): another file
  // behind the same /dev/loop0 has another one. 0: not known (before Linux 5.15), or a file.
  std::uint64_t sequence = 0;
  std::uint64_t size = 0;  // bytes
  bool block_device = false;

  // Throws std::runtime_error when the disk isn't there.
  [[nodiscard]] static SourceIdentity of(const std::string& disk, std::uint64_t size);
  friend bool operator==(const SourceIdentity&, const SourceIdentity&) = default;
};

// What it takes to go on with a migration, or to start it over.
struct SavedMigration {
  boost::json::object request;   // migrate_to_json()
  std::string id;                // new_migration_id()
  bool running = true;           // goes on by itself after a restart
  bool paused = false;           // … and is paused then
  bool incoming = false;         // the target takes writes from it only
  std::uint64_t generation = 0;  // of the disk's ownership record when it began
  // … and from its pivot on: the journal holds what is not flushed while the record is of this very
  // generation. 0: not pivoted.
  std::uint64_t pivot = 0;
  friend bool operator==(const SavedMigration&, const SavedMigration&) = default;
};

struct FoundState;

class StateFile {
 public:
  // A file for `disk` in place of an older one, its memory zeroed, with a heartbeat of now. Makes
  // the directory (not its parents). Throws std::runtime_error, "state file|directory '…': why:
  // what to do", and then an older file stands as it was.
  [[nodiscard]] static StateFile create(const std::string& directory, const std::string& disk,
                                        std::uint64_t disk_bytes, std::size_t memory_bytes,
                                        const SavedMigration& migration);

  // What an earlier process left for `disk`. `serves`: the disk itself does, so that it matters who else
  // wrote to it. Changes nothing. Throws std::runtime_error only when the disk isn't there.
  [[nodiscard]] static FoundState find(const std::string& directory, const std::string& disk,
                                       std::uint64_t disk_bytes, std::size_t memory_bytes,
                                       bool serves = true);

  // Unmaps; the file stays for the next start. No one else finds it trusted while this one lives.
  ~StateFile() = default;
  StateFile(StateFile&&) noexcept = default;
  StateFile& operator=(StateFile&&) noexcept = default;
  StateFile(const StateFile&) = delete;
  StateFile& operator=(const StateFile&) = delete;

  // The core's, page-aligned, of the size that was asked for. It stays where it is when the
  // StateFile is moved.
  [[nodiscard]] std::span<std::byte> memory() const;

  // The core's, too: page-aligned, in place for as long as memory() is, none at first. begin: of so many
  // bytes, zeroed, in place of an earlier one. grow: to so many, zeroed where it has grown, and half of the
  // file system stays free. Both throw std::runtime_error, and then there is none, or it is as it was.
  // Nobody may call journal() meanwhile.
  static constexpr std::size_t journal_bytes_max = std::size_t{1} << 30;
  [[nodiscard]] std::span<std::byte> journal() const;
  void begin_journal(std::size_t bytes);
  void grow_journal(std::size_t bytes);

  // "All that was written to the disk up to now was ours": at the end of every turn of the loop
  // (25 ns, no system call). `writes_in_flight`: some write, trim or zeroing of ours is submitted
  // and not completed. A beat(true) before the first write of a turn spares the next start a false
  // alarm, should we be killed between that write and the end of the turn.
  void beat(bool writes_in_flight);

  // Replaces what is saved; killed within it, the file holds the old or the new one. Throws
  // std::runtime_error if it is too long (with the header 4 KiB), and then the old one stands.
  void save(const SavedMigration& migration);

  // The migration has ended: there is nothing to find. The memory can be used further.
  void remove() noexcept;

  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  struct Unmap {
    std::size_t bytes;
    void operator()(std::byte* at) const;
  };
  StateFile(std::string path, UniqueFd fd, std::size_t memory_bytes, const SourceIdentity& source,
            std::string boot);
  void allocate_journal(std::size_t bytes);

  std::string path_;
  UniqueFd fd_;  // carries the lock
  std::unique_ptr<std::byte, Unmap> map_;
  std::size_t memory_bytes_ = 0;
  std::size_t journal_bytes_ = 0;
  SourceIdentity source_;
  std::string boot_;
  std::uint64_t sequence_ = 0;  // of the header that was written last
};

struct FoundState {
  std::optional<StateFile> file;  // trusted
  // With the file; and without it where the file is sound and of this disk, only its memory can't
  // be relied on: the migration can start over.
  std::optional<SavedMigration> migration;
  std::string why_not;  // one line that names the file; empty: trusted, or there is none
};

struct StateDirectory {
  std::string path;     // empty: none
  std::string why_not;  // then: one line, with what to do
};

// `system` if we can have it, else $XDG_RUNTIME_DIR/nbdferry; made if absent.
[[nodiscard]] StateDirectory default_state_directory(const std::string& system = "/run/nbdferry");

}  // namespace nbdferry::proxy
