// What goes into the core (events) and what comes out (actions). Nothing else crosses its border.
//
// The contract with the edges (proxy/ in production, test/sim/ in the simulator):
//  - apply() never suspends and is never re-entered: an edge that completes an action at once queues
//    the completion and applies it after the current call has returned.
//  - Every SubmitSource is answered by exactly one SourceDone, every SubmitTarget by exactly one
//    TargetDone, in any order and after any time. A target operation on a connection that was lost
//    is answered with IoError::lost; all of them are answered before TargetLost is applied.
//  - When connections are lost, or let go, TargetWindow with what is left ({0, 0} if nothing is)
//    comes before the first of their lost answers: what the core sends on account of these must
//    find room on living connections only. TargetLost, or TargetClosed, comes last.
//  - After TargetRefused nothing comes by itself: it is closed, or opened again.
//  - The core never has overlapping writes of the guest in flight on the source, nor any overlapping
//    operations in flight on the target (ranges widened to the sides' alignments).
//  - A target FLUSH is to be sent at once; it covers what was answered before its submission, on
//    every living path that wrote.
//  - A server that answers with IoError::shutdown is let go: its path is lost.
//  - Until UsePath only an operation that names a path (DiskOp::path) is sent there.
//  - Every GuestRequest is answered by exactly one Reply.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "mirror/payload.hpp"
#include "mirror/types.hpp"

namespace nbdferry::mirror {

// --- vocabulary ---

// `automatic` is asked for; in force is always one of the others.
enum class Mode : std::uint8_t { async, sync, automatic };

enum class Phase : std::uint8_t {
  idle,
  queued,
  connecting,
  copying,
  paused,
  in_sync,
  prepared,
  sealed,
  switching,
  switched,
  interrupted,
  failed,
  cancelled,
};

// Who answers the guest: the local disk, the remote one (after a pivot), or nobody (after a
// release).
enum class Serving : std::uint8_t { source, target, nobody };

// What the target holds while it is mirrored to: `crash`: at every moment what the guest's disk could
// have held after a power cut.
enum class Consistency : std::uint8_t { none, crash };

enum class SwitchKind : std::uint8_t { pivot, release };
enum class SwitchWhen : std::uint8_t { manual, pivot, release };

[[nodiscard]] std::string_view to_string(Mode m);
[[nodiscard]] std::string_view to_string(Phase p);

// What the target's server offers; learnt when it is opened, and again at each reconnect.
struct TargetInfo {
  std::uint64_t size = 0;
  std::uint32_t block_min = 1;                   // power of two, at most 64 KiB
  std::uint32_t payload_max = 32 * 1024 * 1024;  // longest read or write, bytes
  bool read_only = false;
  bool can_flush = false;
  bool can_fua = false;
  bool can_trim = false;
  bool can_zero = false;
  bool has_allocation = false;  // base:allocation was negotiated
  bool can_checksum = false;    // of up to Limits::checksum_bytes at once
  bool incoming = false;        // takes writes from this migration only
  bool fenced = false;          // nothing that older connections of ours hold will be written
  bool proven = false;          // it is the one that it was before our restart
};

struct MigrateOptions {
  Mode mode = Mode::automatic;
  SwitchWhen switch_when = SwitchWhen::manual;
  bool skip_unreadable = false;
  bool verify = false;        // no switchover before a verification found both sides alike
  bool trust_target = false;  // after a restart, though it can't prove that it is the same one
  Consistency consistency = Consistency::none;
  std::uint64_t buffer_bytes = 64ULL * 1024 * 1024;
  std::uint64_t bandwidth = 0;  // bytes a second to the target; 0: what it takes
  // Most that pacing delays a write's answer; on entering sync, most that a write waits for older
  // ones.
  Duration max_delay = std::chrono::milliseconds(50);
  Duration downtime_limit = std::chrono::milliseconds(300);
  Duration deadline{0};  // from the start: in sync by then, and no faster than needed; zero: none
  Duration sync_timeout = std::chrono::seconds(1);
  Duration prepare_timeout = std::chrono::seconds(60);
  Duration quarantine = std::chrono::seconds(60);
  Duration reconnect_delay =
      std::chrono::seconds(30);  // pivoted: how long I/O waits for the target
};

// One operation on a disk, source or target.
struct DiskOp {
  OpId id{};
  Command command = Command::read;
  ByteRange range;  // empty for flush
  Payload payload;  // write: exactly range.length() bytes
  bool fua = false;
  bool may_hole = true;    // zero: deallocation allowed
  bool fast_only = false;  // zero: fail with not_supported rather than write zeroes slowly
  bool as_data = false;    // zero, on the target: as a write of zeroes
  PathId path{};           // read, on the target: by this path; lost if that is there no more
};

// --- events ---

struct GuestRequest {
  RequestId id{};
  Command command = Command::read;
  ByteRange range;  // within the disk: the edge validates; not empty but for flush
  Payload payload;
  bool fua = false;
  bool no_hole = false;
  bool fast_zero = false;
};

// `changed` is for trim: false means "nothing happened, and that is fine" (rule 9).
struct SourceDone {
  OpId id{};
  IoError error = IoError::none;
  bool changed = true;
  Payload data;                 // read
  std::vector<Extent> extents;  // block_status: covers a prefix of the range, at least one byte
  std::uint64_t checksum = 0;   // checksum: of the whole range
};

struct TargetDone {
  OpId id{};
  IoError error = IoError::none;
  Payload data;
  std::vector<Extent> extents;
  std::uint64_t checksum = 0;
};

// The target can be used (again). The window says how much may be in flight on all connections.
struct TargetUp {
  TargetInfo info;
  std::uint32_t window_ops = 64;
  std::uint64_t window_bytes = 8ULL * 1024 * 1024;
};
// The window changed, because connections came or went.
struct TargetWindow {
  std::uint32_t window_ops = 64;
  std::uint64_t window_bytes = 8ULL * 1024 * 1024;
};
// Another path: does it lead to the same export? Answered by UsePath, RefusePath or LeavePath, while it is
// there: a loss of the target takes it back, and so does a read by it that is lost. Found again, it is another
// one.
struct PathFound {
  PathId path{};
  std::array<std::byte, 32> nonce{};  // random: nobody ever wrote it
  bool known = false;                 // it was in use before
};
// No connection of a path is left, while other paths live. Comes after the lost answers.
struct PathLost {
  std::string reason;
  bool unflushed = false;  // it wrote since the last good flush, and that may be gone
};
// A path is not used, nor tried again: why, and what to do about it.
struct PathRefused {
  std::string reason;
};
// No connection is left: the server may have restarted. The edge goes on trying by itself, until
// CloseTarget, and answers with TargetUp.
struct TargetLost {
  std::string reason;
};
// The target can't be used at all: unreachable at the first attempt, another export, too small, …
struct TargetRefused {
  std::string reason;
};
// The answer to CloseTarget; operations in flight were answered (lost) before it.
struct TargetClosed {};

struct RecordWritten {
  bool ok = false;
  std::string error;
};

// Time goes on; at least every 10 ms while Engine::wants_ticks().
struct Tick {};

// Operator commands, each answered by one CommandDone: at once when refused or when there is
// nothing to wait for; verify, prepare, seal, commit and switch when they have ended.
struct Start {
  CommandId command{};
  MigrateOptions options;
  // The state, in memory that outlives the process (ResumeMap::bytes_for(size) bytes; empty: none),
  // until another is given. All zero, or, if resumed, what an earlier migration to this target left.
  std::span<std::byte> state = {};
  bool resumed = false;
  bool incoming = false;  // before a restart the target took writes from this migration only
};
// At the start of a process: the state goes on being kept, for a migration that may come. What was sent
// may land for so long.
struct KeepState {
  std::span<std::byte> state;
  Duration quarantine = MigrateOptions{}.quarantine;
};
// Memory that outlives the process (Journal::bytes_for(…) bytes, aligned to a page), for what a pivoted
// disk's target may not have on its medium: before RecordWritten of a pivot, all zero; before ServeTarget,
// as an earlier process left it; and again, longer, when it has grown.
struct KeepJournal {
  std::span<std::byte> memory;
};
// At the start of a process whose disk has been pivoted: the target serves, as it did.
struct ServeTarget {
  MigrateOptions options;
  std::span<std::byte> state;
  bool journaled = false;  // since the pivot; else what was not flushed may be lost
  bool incoming = false;   // as the record says: the target took writes from us only
};
// The process is about to end: what is on its way to the target is waited for, and flushed; the state
// remembers the rest. Answered at once; when all is done, CloseTarget.
struct Suspend {
  CommandId command{};
};
struct Pause {
  CommandId command{};
};
struct Resume {
  CommandId command{};
};
struct Cancel {
  CommandId command{};
};
struct Verify {
  CommandId command{};
  bool acknowledge = false;  // nothing is compared: the differences found so far may be forgotten
};
struct Prepare {
  CommandId command{};
};
struct Seal {
  CommandId command{};
};
struct Commit {
  CommandId command{};
  SwitchKind kind = SwitchKind::pivot;
};
struct Switch {
  CommandId command{};
  SwitchKind kind = SwitchKind::pivot;
};  // all three
struct Abort {
  CommandId command{};
};
struct Unfence {
  CommandId command{};
};  // the record says owner again: serve the source
// What is there is changed, in a running migration.
struct Set {
  CommandId command{};
  std::optional<Mode> mode;
  std::optional<std::uint64_t> bandwidth;
  std::optional<std::uint64_t> buffer_bytes;
  std::optional<Duration> max_delay;
  std::optional<Duration> downtime_limit;
  std::optional<Duration> deadline;  // from now on; zero: none
};

using Event =
    std::variant<GuestRequest, SourceDone, TargetDone, TargetUp, TargetWindow, TargetLost,
                 TargetRefused, TargetClosed, PathFound, PathLost, PathRefused, RecordWritten, Tick,
                 Start, KeepState, KeepJournal, ServeTarget, Suspend, Pause, Resume, Cancel, Verify,
                 Prepare, Seal, Commit, Switch, Abort, Unfence, Set>;

// --- actions ---

struct SubmitSource {
  DiskOp op;
};
struct SubmitTarget {
  DiskOp op;
};

struct Reply {
  RequestId id{};
  IoError error = IoError::none;
  Payload data;
  std::vector<Extent> extents;
  std::uint64_t checksum = 0;
};

struct OpenTarget {};  // answered by TargetUp or TargetRefused
struct CloseTarget {
};  // answered by TargetClosed; lets go of every connection (rule 8: with a reset)

struct UsePath {
  PathId path{};
};
struct RefusePath {
  PathId path{};
  std::string reason;
};
// Not now: what is in flight on it is answered (lost) at once. It is found again later.
struct LeavePath {
  PathId path{};
};

// Make the ownership record say this, durably, in one synchronous write; answered by RecordWritten.
struct WriteRecord {
  SwitchKind kind = SwitchKind::pivot;
  bool incoming = false;  // the target takes writes from this migration only
};

// The migration has ended: after a restart it does not go on by itself.
struct Ended {};
// … and has let go of its target. If the state is worth keeping, because another one to this target could
// go on from it or has to beware of late writes, it goes on being kept.
struct LetGo {
  bool keep = false;
};

struct CommandDone {
  CommandId command{};
  bool ok = true;
  std::string message;  // the reason when not ok: what failed and why
};

// Something the operator should find in the log.
struct Notice {
  std::string text;
};

using Action = std::variant<SubmitSource, SubmitTarget, Reply, OpenTarget, CloseTarget, UsePath,
                            RefusePath, LeavePath, WriteRecord, Ended, LetGo, CommandDone, Notice>;
using Actions = std::vector<Action>;

}  // namespace nbdferry::mirror
