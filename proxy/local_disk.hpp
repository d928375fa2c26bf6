// LocalDisk: the source, a raw file or block device, as the core's disk.
//
// Two ways to the data. Inline: one system call on the loop, for what the page cache answers at
// once (a third of the ring's cost, see FAST-PATH). The ring: for everything that may wait.
// proxy/disk_probe chooses which may be tried; the kernel's EAGAIN and a watch on slow writes
// decide each time.
//
// What must hold:
//  - Each operation is answered exactly once: by submit() itself, or by on_done from the loop.
//  - Rule 9: after TRIM and ZERO the range reads as zeroes, or nothing changed and the answer says
//  so.
//  - A FLUSH covers every operation that was answered before its submission; FUA covers its own.
//  - The caller keeps overlapping operations apart, widened to align().
//
// With --direct, requests aligned to the device's blocks bypass the page cache. Others go through
// it, by a second opening of the same file: Linux keeps the two coherent (a direct request first
// writes back and drops the pages that it touches) as long as they don't overlap in time within a
// page, which is why align() is 4096 then. Such mixed traffic is correct, not fast; and where the
// page cache uses folios larger than a page, a direct write beside a buffered one in the same folio
// may fall back to the page cache, too.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <boost/asio/io_context.hpp>

#include "mirror/events.hpp"
#include "proxy/disk_probe.hpp"
#include "proxy/ring.hpp"

namespace nbdferry::proxy {

// Says whether a write may run on the loop. The kernel can't promise not to wait (journal, dirty
// throttling, read-modify-write). One slow write may be nothing but a busy processor; two close
// together, or a very slow one, send writes to the ring for a while, each time for twice as long as
// long as it stays bad.
class InlineGate {
 public:
  using Clock = std::chrono::steady_clock;
  [[nodiscard]] bool is_open(Clock::time_point now) const { return now >= closed_until_; }
  void ran(Clock::time_point begin, Clock::time_point end);

 private:
  Clock::time_point closed_until_{};
  Clock::duration pause_{};
  unsigned quick_in_a_row_ = 0;
};

class LocalDisk {
 public:
  using DoneHandler = std::function<void(mirror::SourceDone&&)>;

  // Throws std::runtime_error: "what failed: why: what to do".
  static std::unique_ptr<LocalDisk> open(boost::asio::io_context& io,
                                         const LocalDiskOptions& options, DoneHandler on_done);
  LocalDisk(boost::asio::io_context& io, ProbedDisk disk, bool read_only, DoneHandler on_done,
            bool allow_io_uring = true);
  // Waits for what is in the kernel; operations still open are not answered.
  ~LocalDisk();
  LocalDisk(const LocalDisk&) = delete;
  LocalDisk& operator=(const LocalDisk&) = delete;

  [[nodiscard]] std::uint64_t size() const { return disk_.size; }
  [[nodiscard]] std::uint32_t align() const;  // overlap is judged on ranges widened to it
  [[nodiscard]] bool read_only() const { return read_only_; }
  [[nodiscard]] bool rotational() const { return disk_.rotational; }
  [[nodiscard]] const std::string& note() const { return disk_.note; }  // for the log, or empty

  // True: `done` is the answer. False: on_done brings it later, never from inside this call.
  // The range lies within the disk; writes to a read-only disk answer not_permitted.
  [[nodiscard]] bool submit(mirror::DiskOp&& op, mirror::SourceDone& done);

  [[nodiscard]] unsigned in_flight() const { return in_flight_; }
  [[nodiscard]] unsigned writes_in_flight() const { return writes_in_flight_; }

 private:
  enum class Step : std::uint8_t;
  struct Pending;

  // The answer if it can be given at once; else `progress` bytes are done and the ring goes on.
  bool read_inline(const mirror::DiskOp& op, Buffer& buffer, std::uint64_t& progress,
                   mirror::SourceDone& done) const;
  bool write_inline(const mirror::DiskOp& op, std::uint64_t& progress, mirror::SourceDone& done);
  bool answer_at_once(const mirror::DiskOp& op, mirror::SourceDone& done) const;

  // The next way to make zeroes that nothing speaks against; none: the operation can't be done so.
  [[nodiscard]] std::optional<Step> zeroing_step(const mirror::DiskOp& op) const;

  Pending& take(mirror::DiskOp&& op);
  void begin(Pending& p);
  void start(Pending& p, Step step);
  void start_transfer(Pending& p, std::byte* memory, const std::byte* data, std::uint64_t length);
  void start_map(Pending& p);
  void advance(Pending& p, int result);
  void transferred(Pending& p, int result);
  void refused(Pending& p);
  void mapped(Pending& p, int result);
  void finish(Pending& p, IoError error);
  [[nodiscard]] bool is_direct(std::uint64_t offset, std::uint64_t length) const;

  ProbedDisk disk_;
  bool read_only_;
  DoneHandler on_done_;
  bool writes_nowait_ = true;   // until the file system says that it can't
  bool can_zero_range_ = true;  // likewise
  InlineGate gate_;
  Payload zeroes_;  // made when first needed
  unsigned in_flight_ = 0;
  unsigned writes_in_flight_ = 0;
  std::vector<std::unique_ptr<Pending>> pool_;  // all that were ever needed at once
  std::vector<Pending*> free_;
  Ring ring_;  // last: destroyed first, while what it reads and fills still lives
};

}  // namespace nbdferry::proxy
