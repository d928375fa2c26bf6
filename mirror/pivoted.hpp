// Pivoted: the target serves the guest; the source is no longer the authority.
//
// What must hold: an acknowledged write is retained until a good flush of the target covers it, and
// replayed in order when the target comes back; no request, reads included, reaches a reconnected
// target before the replay is acknowledged. What was sent and unanswered at a loss may still land
// (rule 8): such ranges stay retained through the quarantine, are read from there, and are written
// again at its end. Requests wait for the target up to the reconnect delay, then fail with EIO.
//
// What is retained is in the journal before its write is answered, so that all of this goes for a process
// that is killed, too: the next one takes what is in the journal for retained, and what the state says was
// sent for unanswered. Without a journal what had been acknowledged and not flushed is the target's then,
// and lost if that restarts before it is flushed: if that can have happened the guest's next flush fails.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <optional>

#include "mirror/context.hpp"
#include "mirror/guest_ops.hpp"
#include "mirror/journal.hpp"
#include "mirror/resume_map.hpp"
#include "mirror/target_ops.hpp"

namespace nbdferry::mirror {

class Pivoted {
 public:
  Pivoted(Context& context, GuestOps& guests, ResumeMap& resume, Journal& journal,
          const MigrateOptions& options, const TargetInfo& info, const TargetWindow& window);
  // At the start of a process: the target is yet to be reached.
  Pivoted(Context& context, GuestOps& guests, ResumeMap& resume, Journal& journal,
          const ServeTarget& event);

  void submit(GuestOp& op);

  void target_up(const TargetUp& event);
  void target_window(const TargetWindow& event);
  void target_lost(const std::string& reason);
  // It will not be tried again by itself: ask for it.
  void target_closed();
  void target_refused(const std::string& reason);
  void path_found(const PathFound& event);
  void path_lost(const PathLost& event);
  void path_refused(const std::string& reason);
  void target_done(TargetDone&& event);
  void tick();
  void pump();

  void report(Status& status) const;

 private:
  struct Retained {
    ByteRange range;
    Command command = Command::write;
    Payload payload;
    bool may_hole = true;
    Journal::Slots slots;      // where it is in the journal
    std::uint64_t number = 0;  // of its last acknowledgement: which flush covers it
    bool replaying = false;    // to be written again …
    bool sent = false;         // … and that is under way
    bool repeat = false;       // once more when the replay under way has ended
    bool failed = false;       // it could not be written again
  };
  // A guest request on its way, in pieces that the target takes.
  struct Request {
    std::uint64_t sent_until = 0;  // the next piece begins here
    std::uint32_t in_flight = 0;
    bool again = false;  // a piece was lost: all of it once more
    IoError error = IoError::none;
    Buffer data;               // read
    bool wants_flush = false;  // FUA: written, and a flush is to follow
  };
  using Retainments = std::list<Retained>;
  struct Quarantine {
    ByteRange range;
    Time until{0};
  };

  [[nodiscard]] bool serving() const { return link_up_ && replays_left_ == 0; }
  [[nodiscard]] bool in_quarantine(ByteRange range) const;
  // May the target hold something else than what was written?
  [[nodiscard]] bool may_differ(ByteRange range) const {
    return failed_ != 0 || in_quarantine(range);
  }
  [[nodiscard]] bool try_submit(GuestOp& op);
  [[nodiscard]] bool try_flush(GuestOp& op);
  [[nodiscard]] bool may_retain(Command command, ByteRange piece) const;
  [[nodiscard]] bool try_pieces(GuestOp& op, Request& request);
  [[nodiscard]] std::uint64_t piece_bytes(Command command) const;
  void submit_piece(GuestOp& op, Request& request, ByteRange piece);
  void submit_flush(std::optional<OpId> guest);
  void complete(OpId guest, IoError error);
  // A write of `range` was answered, or can't land late any more.
  void settle(ByteRange range);
  void retain(const GuestOp& op, ByteRange piece);
  void keep(Retained&& r);
  void forget(const Retained& r);
  void write_journal(Retained& r);
  void release(std::uint64_t up_to);
  void overlay(ByteRange range, std::byte* data) const;
  [[nodiscard]] std::string check_target(const TargetInfo& info) const;
  [[nodiscard]] bool zeroes_as_data(const TargetOp& failed);
  void guest_done(const TargetOp& op, TargetDone&& event);
  void flush_done(const TargetOp& op, IoError error);
  void replay_done(const TargetOp& op, IoError error);
  void start_replay(bool all);
  void write_all_again();
  void seek_replay();
  void pump_replay();
  void fail_pending();

  Context& context_;
  GuestOps& guests_;
  ResumeMap& resume_;
  Journal& journal_;
  MigrateOptions options_;
  TargetInfo info_;
  TargetWindow window_;

  bool link_up_ = true;
  bool met_ = true;  // info_ says what the target is
  Time lost_at_{0};
  Time answered_at_{0};  // the target's last answer
  std::optional<Time> reopen_at_;
  std::string last_error_;
  TargetOps in_flight_;
  std::deque<OpId> pending_;  // guest requests with something to send, in order
  std::unordered_map<OpId, Request> requests_;
  Retainments retained_;                                 // in order of acknowledgement
  Retainments::iterator replay_next_ = retained_.end();  // the first to be replayed and not sent
  std::uint64_t retained_bytes_ = 0;
  std::uint64_t slots_reserved_ = 0;  // of the journal, for writes in flight
  std::uint64_t acknowledged_ = 0;    // number of the last retained write
  std::uint64_t replayed_ = 0;        // and of the last one that was replayed
  std::uint64_t flushed_up_to_ = 0;   // the last one that a good flush covers
  std::size_t replays_left_ = 0;
  std::size_t failed_ = 0;  // retained writes that could not be replayed: the next flush says so
  Time retry_at_{0};        // of what could not be replayed
  std::vector<Quarantine> quarantines_;
  std::unordered_map<OpId, std::uint64_t> flush_cuts_;       // flush -> what it covers
  std::unordered_map<OpId, Retainments::iterator> replays_;  // stays in place while it is replayed
  bool own_flush_ = false;
  // After a restart, without a journal: what had been acknowledged may not be flushed …
  bool flush_wanted_ = false;
  bool loss_unreported_ = false;  // … and that can't be made good: the guest's next flush says so
};

}  // namespace nbdferry::mirror
