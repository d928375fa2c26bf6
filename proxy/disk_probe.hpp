// Opening a disk: what it is, how large, whether somebody else has it, and by which way its data is
// best reached. Decided once, here, by looking at the file; proxy/local_disk acts on it.
//
// What must hold: nothing is changed on a disk that exists; whoever else serves it, or QEMU that
// has it open for writing, makes the opening fail (and the other way round, for as long as it is
// open).
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "mirror/types.hpp"
#include "proxy/unique_fd.hpp"

namespace nbdferry::proxy {

// More would be a map of gigabytes in the core.
inline constexpr std::uint64_t disk_size_max = 1ULL << 50;

struct LocalDiskOptions {
  std::string path;
  bool read_only = false;
  bool direct = false;  // O_DIRECT for what is aligned
  std::optional<std::uint64_t> create_size =
      std::nullopt;  // absent file: make a sparse one of this size
  // For who holds the disk to let go of it. What a killed process had given to io_uring goes on after its
  // end, and holds the locks until it is done: a few ms, where the disk is healthy.
  std::chrono::milliseconds lock_wait = std::chrono::seconds(1);
};

struct ProbedDisk {
  UniqueFd fd;         // buffered; carries the locks
  UniqueFd direct_fd;  // with --direct only; marked, too: its writes may outlive fd
  std::uint64_t size = 0;
  std::uint32_t direct_align = 0;   // of offset, length and memory, bytes; 0: not direct
  std::uint32_t logical_block = 1;  // block device: what zeroing must be aligned to
  bool block_device = false;
  bool rotational = false;
  bool in_memory = false;      // tmpfs: no I/O ever waits for a device
  bool reads_nowait = false;   // RWF_NOWAIT answers reads from the page cache
  bool writes_inline = false;  // a local file system: buffered writes seldom wait
  bool can_punch = true;       // may be worth trying
  std::string note;            // one line for the log, or empty
};

// Throws std::runtime_error: "what failed: why: what to do".
[[nodiscard]] ProbedDisk probe_disk(const LocalDiskOptions& options);

// The name of the image format that a disk begins with, or null: "qcow2", "VMDK", …
[[nodiscard]] const char* foreign_format(std::span<const unsigned char> first_bytes);

// A new name is durable only when its directory is. Returns 0 or errno.
[[nodiscard]] int sync_directory_of(const std::string& path);

// The one mapping from the kernel's errors to ours.
[[nodiscard]] IoError to_io_error(int error_number);

}  // namespace nbdferry::proxy
