// Migration: one move of the disk, from `migrate` to its end. Owns everything that is known of the
// target: the map, the queue of mirrored writes, what is in flight, what is unflushed, the copier,
// the verifier and the switchover. The guest's requests stay with the engine.
//
// The one operation on which all rules lean is mark_stale(): a block that becomes stale loses its
// unsent data, its copy under way and its claim on writes in progress, all at once (rule 6).
//
// Files: migration.cpp (life cycle, phases), migration_guest.cpp (guest writes: classify, mirror),
// migration_target.cpp (what goes to the target, and its answers), migration_trust.cpp (what it is
// believed to hold), copier, verifier, switchover, path_proof.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>

#include "mirror/block_map.hpp"
#include "mirror/bulk_window.hpp"
#include "mirror/context.hpp"
#include "mirror/copier.hpp"
#include "mirror/deadline.hpp"
#include "mirror/flush_tracker.hpp"
#include "mirror/guest_ops.hpp"
#include "mirror/heat_map.hpp"
#include "mirror/mirror_queue.hpp"
#include "mirror/mode_policy.hpp"
#include "mirror/pacer.hpp"
#include "mirror/path_proof.hpp"
#include "mirror/rate_meter.hpp"
#include "mirror/read_share.hpp"
#include "mirror/resume_map.hpp"
#include "mirror/suspects.hpp"
#include "mirror/switchover.hpp"
#include "mirror/target_ops.hpp"
#include "mirror/token_bucket.hpp"
#include "mirror/verifier.hpp"

namespace nbdferry::mirror {

class Migration {
 public:
  Migration(Context& context, GuestOps& guests, Suspects& suspects, ResumeMap& resume,
            const Start& start);

  // --- events ---
  void target_up(const TargetUp& event);
  void target_window(const TargetWindow& event);
  void target_lost(const std::string& reason);
  void target_refused(const std::string& reason);
  void target_closed();
  void path_found(const PathFound& event) {
    if (!ended_) proof_.found(event);
  }
  void path_lost(const PathLost& event);
  void path_refused(const std::string& reason) {
    if (!ended_) report_error(reason);
  }
  void source_done(SourceDone&& event);  // kinds readback, copy, hint, verify
  void target_done(TargetDone&& event);
  void tick();
  // After each event: starts whatever can be started now.
  void pump();

  // --- the guest's writes ---
  // At admission: decides which blocks the target needs it for, and marks the others (rule 2). In
  // sync mode the target's part goes out beside the source's.
  void classify(GuestOp& op);
  // The source has answered; the engine replies when nothing is waited for any more.
  void source_answered(GuestOp& op, IoError error, bool changed);
  void source_progress() {
    if (map_ && !ended_) copier_.source_progress();
  }
  // The local disk answered a guest's read or write.
  void guest_waited(Duration took) {
    read_share_.guest_waited(took);
    guest_at_ = context_.now;
  }
  // A flush or a FUA write has been answered: what comes later must not be on the target before it.
  void barrier();
  // What the ranges of running guest writes are widened to.
  [[nodiscard]] std::uint64_t order_alignment() const { return map_ ? info_.block_min : 1; }
  [[nodiscard]] bool holds_writes() const { return switchover_.holds_writes(); }

  // --- operator ---
  void pause(CommandId command);
  void resume(CommandId command);
  void cancel(CommandId command);
  void suspend();
  void verify(const Verify& event);
  void set(const Set& event);
  [[nodiscard]] Switchover& switchover() { return switchover_; }
  [[nodiscard]] Verifier& verifier() { return verifier_; }
  [[nodiscard]] PathProof& proof() { return proof_; }

  // --- state ---
  [[nodiscard]] Phase phase() const;
  [[nodiscard]] bool ended() const { return ended_.has_value(); }
  [[nodiscard]] bool closed() const { return closed_; }
  // What takes this part of the downtime limit may be left when it gets in sync.
  static constexpr int in_sync_share = 10;
  [[nodiscard]] bool in_sync() const { return in_sync_; }
  // A write that the guest waits for is parked until a copy ends.
  [[nodiscard]] bool guest_waits_for_copy() const { return copier_.hurries(); }
  [[nodiscard]] bool link_up() const { return link_up_; }
  [[nodiscard]] bool paused() const { return paused_; }
  [[nodiscard]] Duration pacing_delay() const { return ended_ ? Duration{0} : pacer_.delay(); }
  // Why the target was refused since the switchover was decided, if it was.
  [[nodiscard]] const std::optional<std::string>& refused() const { return refused_; }
  // Why the target's content is not to be relied upon, though nothing is owed to it; or empty.
  [[nodiscard]] std::string doubt() const;
  [[nodiscard]] const TargetInfo& info() const { return info_; }
  // Not one that says it can and fails.
  [[nodiscard]] bool can_zero() const { return info_.can_zero && !zeroes_fail_; }
  [[nodiscard]] const TargetWindow& window() const { return window_; }
  [[nodiscard]] const MigrateOptions& options() const { return options_; }
  void report(Status& status) const;
  void check_invariants() const;

  // --- for its parts (copier, verifier, switchover) ---
  [[nodiscard]] Context& context() { return context_; }
  [[nodiscard]] BlockMap& map() { return *map_; }
  [[nodiscard]] GuestOps& guests() { return guests_; }
  [[nodiscard]] MirrorQueue& queue() { return queue_; }
  [[nodiscard]] TargetOps& in_flight() { return in_flight_; }
  // Whole target blocks that cover `range`; never smaller than the map's.
  [[nodiscard]] ByteRange blocks_of(ByteRange range) const;
  [[nodiscard]] std::uint64_t block_size() const {
    return std::max<std::uint64_t>(block_size_min, info_.block_min);
  }
  // The target does not hold these blocks (any more). `why` ends a prepared switchover.
  void mark_stale(ByteRange blocks, const char* why);
  // Stale bytes that stand between us and the end: without what can't be read and may be skipped.
  [[nodiscard]] std::uint64_t stale_bytes() const;
  // These, and what is on its way to the target.
  [[nodiscard]] std::uint64_t debt_bytes() const;
  // Stale or acknowledged and not answered by the target (DESIGN.md, "debt"): is there none at all?
  [[nodiscard]] bool no_debt() const;
  [[nodiscard]] bool has_suspects() const { return !suspects_.empty(); }
  [[nodiscard]] Duration quarantine_left() const { return suspects_.left(context_.now); }
  [[nodiscard]] bool quarantine_inherited() const {
    return !suspects_.empty() && context_.now < inherited_until_;
  }
  [[nodiscard]] std::uint64_t unreadable_bytes() const { return copier_.unreadable_bytes(); }
  [[nodiscard]] bool unreadable(ByteRange range) const { return copier_.unreadable(range); }
  void enter_mode(Mode mode, const std::string& reason);
  // After a switchover was given up: the mode as it would be without.
  void restore_mode();
  // Submits a flush of the target now if none is under way; its id, or nullopt.
  std::optional<OpId> flush_target();
  void end(Phase phase, const std::string& reason);
  void switch_manually() { options_.switch_when = SwitchWhen::manual; }
  // May something be written that nobody asked for?
  [[nodiscard]] bool may_prove() const {
    return mirroring() && switchover_.state() == Switchover::State::none;
  }
  // A proof's write or read of one block.
  [[nodiscard]] bool has_room_for_proof() const {
    return in_flight_.has_room(block_size()) && bandwidth_.may_send() && context_.now >= retry_at_;
  }
  OpId send_proof(DiskOp op);
  void poke_copier() { copier_.poke(); }
  // For the log and the status.
  void report_error(const std::string& what) {
    last_error_ = what;
    context_.notice(what);
  }
  [[nodiscard]] std::uint64_t piece_bytes(Command command) const;
  [[nodiscard]] const HeatMap& heat() const { return *heat_; }
  // How much the copier may have armed at once: what the paths carry soon. A guest's write to an armed
  // block waits for its copy.
  [[nodiscard]] std::uint64_t read_ahead() const;
  // How long a copy of data is. Reading and sending it keeps the guest's requests waiting: while there
  // are any it is shorter.
  [[nodiscard]] std::uint64_t copy_bytes() const;
  // What the copier may have the local disk read at once.
  [[nodiscard]] std::uint64_t read_share() const { return read_share_.bytes(); }
  // Does the target's block status tell what it holds? Not when a flush has failed: what that gave
  // up reads as it was written, no later flush brings it to the disk, and a restart undoes it.
  // Nor after a resume: what was written before that is forgotten.
  [[nodiscard]] bool knows_zeroes() const {
    return info_.has_allocation && !flush_failed_ &&
           (!resumed_ || NBDFERRY_MUTANT(zeroes_known_after_resume));
  }
  // A sample of what it should hold is not there: nothing that it was believed to hold counts.
  void distrust(std::uint64_t at);
  void sample_was_good() { sampled_ = true; }
  void found_difference(std::uint64_t bytes);
  void verified_up_to(std::uint64_t mark);
  void verification_ended(bool good);
  // The target's block status says that it is zero here, where the source is, too.
  void trust_zeroes(ByteRange range);
  void count_copied(std::uint64_t sent, std::uint64_t zeroed) {
    copied_bytes_ += sent;
    zeroed_bytes_ += zeroed;
  }

 private:
  struct ReadBack {
    OpId guest{};
    ByteRange range;
  };

  void adopt();
  void adopt_verification();
  // Resumed, and no reason yet to believe that the target still is what it was.
  [[nodiscard]] bool unsure() const { return unproven_ && !verified_ && !options_.trust_target; }
  void lift_suspects();
  [[nodiscard]] Ranges samples() const;
  void settle(ByteRange range);
  void trust_flushed(ByteRange run);
  void trust_idle(ByteRange chunks);
  void maybe_verify();
  [[nodiscard]] bool mirroring() const { return started_ && link_up_ && !paused_ && !ended_; }
  [[nodiscard]] std::string check_target(const TargetInfo& info) const;
  void try_to_start();
  void end_guest_waits();
  void mark_unflushed_stale(const char* why);
  void mark_writes_stale(const char* why);
  void expire_suspects();
  void expire_sync_waits();
  void fall_back();
  void leave_fallback();
  [[nodiscard]] bool target_answers() const;
  // The memory that mirrored writes take until they are answered; and as a part of what they may.
  [[nodiscard]] std::uint64_t buffer_held() const {
    return queue_.storage_bytes() + in_flight_.buffer_bytes();
  }
  [[nodiscard]] double buffer_used() const {
    return static_cast<double>(buffer_held()) / static_cast<double>(options_.buffer_bytes);
  }
  [[nodiscard]] Mode mode_to_be() const {
    return options_.mode == Mode::automatic ? policy_.mode() : options_.mode;
  }
  void steer();
  void update_in_sync();
  void update_consistent();
  void close_when_drained();

  void overwrite_stale(GuestOp& op);
  void enqueue(GuestOp& op, bool early);
  void enqueue_part(GuestOp& op, ByteRange part);
  [[nodiscard]] bool full(const MirrorEntry& entry) const;
  void push_piece(GuestOp& op, MirrorEntry entry);
  void read_back(GuestOp& op, ByteRange block);
  void read_back_done(SourceDone&& event);
  void release_waiter(GuestOp& op);
  [[nodiscard]] bool can_queue_early(const GuestOp& op) const;

  void dispatch();
  [[nodiscard]] bool has_room_for_bulk(std::uint64_t bytes);
  // Does it carry its bytes to the target? Zeroes do, to one that cannot make them itself.
  [[nodiscard]] bool sends_data(Command command) const {
    return command == Command::write || (command == Command::zero && !can_zero());
  }
  [[nodiscard]] std::uint64_t bytes_sent(Command command, ByteRange range) const {
    return sends_data(command) ? range.length() : 0;
  }
  bool dispatch_mirrored();
  [[nodiscard]] bool can_merge(const MirrorEntry& first, const MirrorEntry& next);
  void merge_adjacent(MirrorEntry& entry);
  // Zeroes that were cut for a target that makes them itself, and are to go as data now.
  [[nodiscard]] bool too_long(Command command, ByteRange range) const {
    return sends_data(command) && range.length() > piece_bytes(command);
  }
  // Whose turn it is decides how much room it needs.
  enum class Turn : std::uint8_t { waited_for, its_share, rest };
  bool dispatch_copy(Turn turn);
  bool dispatch_verify();
  void maybe_flush();
  void mirrored_done(const TargetOp& op, IoError error);
  void flush_done(const TargetOp& op, IoError error);
  void target_failed(const TargetOp& op, IoError error);
  void zero_failed(IoError error);

  Context& context_;
  GuestOps& guests_;
  Suspects& suspects_;
  ResumeMap& resume_;
  const Time inherited_until_;  // suspects that were there before
  MigrateOptions options_;
  TargetInfo info_;
  TargetWindow window_;

  std::unique_ptr<BlockMap> map_;  // from the first TargetUp
  std::unique_ptr<HeatMap> heat_;  // as the map
  MirrorQueue queue_;
  TargetOps in_flight_;
  FlushTracker unflushed_;
  Copier copier_;
  Verifier verifier_;
  Switchover switchover_;
  PathProof proof_;
  std::unordered_map<OpId, ReadBack> read_backs_;
  RateMeter rate_;
  RateMeter copy_rate_;  // the copier's part of it
  RateMeter new_debt_;   // what the guest adds
  BulkWindow bulk_window_;
  TokenBucket bandwidth_;
  TokenBucket deadline_share_;  // of the copier
  Deadline deadline_;
  ReadShare read_share_;
  Time guest_at_{0};  // its last request

  std::optional<CommandId> start_command_;
  std::uint64_t start_barrier_ = 0;  // guest writes that arrived up to this op end before it starts
  bool link_up_ = false;
  bool ever_up_ = false;
  bool started_ = false;
  const bool resumed_;
  bool sampled_ = false;   // resumed: a sample of the target is as it should be
  bool unproven_ = false;  // resumed, and nothing but the sample says that it is the same target
  std::uint64_t resumed_bytes_ = 0;
  bool verified_ = false;
  std::uint64_t differing_bytes_ = 0;  // found by verifications, not acknowledged by the operator
  Time verify_at_{0};                  // by ourselves, the next time
  bool suspended_ = false;
  bool last_flush_sent_ = false;
  std::optional<std::string> refused_;
  bool paused_ = false;
  bool in_sync_ = false;
  bool level_ = false;  // nothing is stale or armed, and the link is up: epochs mean something
  std::uint64_t consistent_from_ = 0;  // once level: the epoch before which all must be there
  std::optional<Phase> ended_;
  bool closed_ = false;
  bool close_sent_ = false;
  Time ended_at_{0};

  ModePolicy policy_;
  Pacer pacer_;
  bool overflowed_ = false;  // since the policy was asked last
  Time answered_at_{0};      // the target's last answer
  Mode mode_;
  bool fallback_ = false;  // async for now, because a sync write timed out
  Duration fallback_wait_;
  Time fallback_until_{0};
  std::string mode_reason_ = "as asked";
  std::string last_error_;

  std::optional<OpId> flush_op_;
  bool flush_failed_ = false;  // ever, in this migration
  Time flushed_at_{0};
  struct Errors {
    std::uint32_t in_row = 0;
    Time since{0};  // the first of the row
  };
  Errors errors_;
  Errors flush_errors_;
  std::uint32_t zero_errors_in_row_ = 0;
  bool zeroes_fail_ = false;  // they go as data
  Time retry_at_{0};
  bool throttled_ = false;         // lately: a limit of ours held something back
  std::size_t overwrites_ = 0;     // guest writes on their way that stand for stale blocks, too
  std::uint64_t copy_credit_ = 0;  // bytes that the copier may send before mirrored writes

  std::uint64_t copied_bytes_ = 0;
  std::uint64_t zeroed_bytes_ = 0;
  std::uint64_t mirrored_bytes_ = 0;
};

}  // namespace nbdferry::mirror
