// The core's one owner object: what happens to one export's disk is decided here and nowhere else.
//
// Three hops: proxy/ session parses a request -> Engine::apply(GuestRequest) decides -> the actions
// SubmitSource and SubmitTarget go to the local disk and to transport/.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "mirror/events.hpp"

namespace nbdferry::mirror {

// Fixed limits; the simulator makes them small so that they are reached.
struct Limits {
  std::uint64_t copy_bytes = 256 * 1024;  // one copy operation's data, multiple of 64 KiB
  std::uint64_t copy_window_bytes =
      8 * 1024 * 1024;  // copies between arming and the target's answer …
  std::uint64_t copy_window_max =
      40ULL * 1024 * 1024;                     // … beside what a long path has under way; with it
  std::uint64_t bulk_bytes_min = 1024 * 1024;  // under way that nobody waits for: at least so much
  std::uint64_t merge_bytes = 256 * 1024;  // adjacent mirrored writes become one of up to so much
  std::uint64_t heat_region_min = 1024 * 1024;    // what is hot or not as a whole
  std::uint64_t probe_bytes = 1ULL << 30;         // one copy operation that expects a hole
  std::uint64_t write_piece_bytes = 1024 * 1024;  // a mirrored write is cut into pieces
  std::uint64_t zero_piece_bytes = 32ULL * 1024 * 1024;
  std::uint64_t verify_bytes = 128 * 1024;           // compared at once, by reading both sides …
  std::uint64_t checksum_bytes = 256 * 1024;         // … or by checksums; multiple of 64 KiB
  std::uint64_t flush_bytes = 512ULL * 1024 * 1024;  // unflushed on the target: flush by then …
  Duration flush_period = std::chrono::seconds(5);   // … or after this time …
  Duration flush_period_level = std::chrono::milliseconds(500);  // … or this, with nothing stale
  std::uint64_t sync_keep_min = 256 * 1024;       // entering sync, so much stays queued at least
  Duration auto_dwell = std::chrono::seconds(2);  // mode auto: sync lasts at least so long
  std::uint32_t target_errors_max = 16;           // in a row, then the migration fails …
  Duration target_errors_time = std::chrono::seconds(1);  // … unless they began so lately
  std::size_t leaves_max = SIZE_MAX;  // mixed chunks; the map has its own bound too
};

struct EngineConfig {
  std::uint64_t size = 0;          // of the disk, bytes
  std::uint32_t source_align = 1;  // power of two: what overlaps on the source is widened to it
  std::uint32_t promised_block_min =
      1;  // what the guest was told; pivot needs a target that keeps it
  Serving serving = Serving::source;
  Limits limits;
};

struct Status {
  Phase phase = Phase::idle;
  Mode mode = Mode::async;         // in force
  Mode mode_wanted = Mode::async;  // asked for
  std::string mode_reason;         // why they differ, or why it changed last
  Serving serving = Serving::source;
  std::uint64_t size_bytes = 0;
  std::uint64_t stale_bytes = 0;
  std::uint64_t buffered_bytes = 0;  // mirrored, queued or unanswered
  std::uint64_t copying_bytes = 0;   // armed: between arming and the target's answer
  std::uint64_t copied_bytes = 0;    // by the copier: data sent and answered
  std::uint64_t zeroed_bytes = 0;    // by the copier: sent as zeroes or known to be zero
  std::uint64_t mirrored_bytes = 0;  // guest writes answered by the target
  std::uint64_t suspect_bytes = 0;
  Duration quarantine_left{0};  // until nothing is suspect, if no more is lost
  std::uint64_t unreadable_bytes = 0;
  bool resumed = false;             // this migration goes on where a process before this one was
  std::uint64_t resumed_bytes = 0;  // that the target held already
  std::uint64_t verified_bytes = 0;
  std::uint64_t mismatched_bytes = 0;
  bool verifying = false;
  bool in_sync = false;
  bool consistent = false;  // --consistency crash is in force: no debt suspends it
  bool holding = false;     // guest writes are held (sealed)
  std::uint64_t held_requests = 0;
  double bytes_per_second = 0;      // what the target has been answering lately
  double new_bytes_per_second = 0;  // what the guest has been adding for it
  Duration target_silent{0};        // so long it has not answered anything, though it was asked
  Duration pacing_delay{0};         // of each write of the guest's
  std::optional<Duration> deadline_left;
  double needed_bytes_per_second = 0;  // to be in sync by the deadline; 0 when it is over
  std::string last_error;
};

// How often the hard cases happened: for tests, which assert that they did.
struct Counters {
  std::uint64_t overflow_during_copy = 0;  // a full buffer made debt while blocks were armed
  std::uint64_t armed_with_writes_in_flight = 0;
  std::uint64_t superseded_by_trim = 0;
  std::uint64_t superseded = 0;
  std::uint64_t debt_while_prepared = 0;
  std::uint64_t sync_timeouts = 0;
  std::uint64_t read_backs = 0;
  std::uint64_t copies_discarded = 0;  // a block went stale while its copy was under way
  std::uint64_t suspects = 0;
  std::uint64_t flush_failures = 0;
  std::uint64_t replayed_writes = 0;
  std::uint64_t mode_changes = 0;  // by mode auto
  std::uint64_t paced_writes = 0;
  std::uint64_t merged = 0;  // mirrored writes that went with another one
  std::uint64_t hot_left_for_last = 0;
  std::uint64_t overwritten = 0;    // stale chunks that were mirrored whole, never copied
  std::uint64_t epochs_waited = 0;  // a mirrored write waited for an earlier epoch
  std::uint64_t distrusted = 0;     // resumed, and the target was not what it had been
};

class EngineState;

class Engine {
 public:
  explicit Engine(const EngineConfig& config);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Appends to `out`. `now` never goes back.
  void apply(Event&& event, Time now, Actions& out);

  [[nodiscard]] Status status() const;
  [[nodiscard]] const Counters& counters() const;

  // An operation for whose answer nobody waits: a copy's, a hint's, the verifier's. The edge may put
  // such an answer off for a little, so that the guest's requests are not behind a row of them.
  [[nodiscard]] static bool nobody_waits_for(OpId op);

  // … unless a guest's request waits for a copy of its blocks to end.
  [[nodiscard]] bool guest_waits_for_copy() const;

  // True while time matters to it (a migration exists, or the target serves).
  [[nodiscard]] bool wants_ticks() const;

  // Guest requests not yet answered, target and source operations not yet done: for a graceful
  // stop.
  [[nodiscard]] std::uint64_t open_requests() const;

  // Walks all of its structures and asserts that they agree. Linear in the disk: for tests.
  void check_invariants() const;

 private:
  std::unique_ptr<EngineState> state_;
};

}  // namespace nbdferry::mirror
