#include "mirror/switchover.hpp"

#include "mirror/migration.hpp"

namespace nbdferry::mirror {

namespace {

constexpr Duration auto_retry = std::chrono::seconds(1);

std::string seconds_text(Duration d) {
  return std::to_string(std::chrono::ceil<std::chrono::seconds>(d).count()) + " s";
}

std::string milliseconds_text(Duration d) {
  return std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(d).count()) + " ms";
}

}  // namespace

// --- commands ---

std::string Switchover::obstacle() const {
  if (m_.ended()) return "no migration is running";
  if (m_.paused()) return "the migration is paused";
  if (!m_.link_up()) return "the target is not connected";
  if (m_.unreadable_bytes() != 0 && !m_.options().skip_unreadable) {
    return std::to_string(m_.unreadable_bytes()) +
           " bytes of the source can't be read (migrate with --skip-unreadable to leave them out)";
  }
  if (m_.has_suspects()) {
    return std::string("writes that ") +
           (m_.quarantine_inherited() ? "an earlier migration left unanswered"
                                      : "were lost with a connection") +
           " may still arrive: their quarantine lasts " + seconds_text(m_.quarantine_left()) +
           " more";
  }
  if (!m_.in_sync()) {
    return "not in sync yet: " + std::to_string(m_.debt_bytes()) + " bytes to go";
  }
  return m_.doubt();
}

// What was promised to the guest must hold on the target (DESIGN.md, "Pivoted").
std::string Switchover::pivot_obstacle(SwitchKind kind) const {
  if (kind != SwitchKind::pivot) return {};
  if (!m_.info().can_flush) {
    return "the target offers no flush, which the guest was promised (use release, or a target "
           "with flush)";
  }
  if (m_.info().block_min > m_.context().config.promised_block_min) {
    return "the target's minimum block is larger than what the guest was promised";
  }
  return {};
}

bool Switchover::busy(CommandId command) {
  if (!command_) return false;
  m_.context().done(command, false, "a switchover is under way: wait for it, or abort it");
  return true;
}

void Switchover::prepare(CommandId command) {
  if (busy(command)) return;
  if (state_ != State::none && state_ != State::preparing) {
    m_.context().done(command, true);
    return;
  }
  if (const std::string why = obstacle(); state_ == State::none && !why.empty()) {
    m_.context().done(command, false, "cannot prepare: " + why);
    return;
  }
  command_ = command;
  goal_ = Goal::prepare;
  if (state_ == State::none) start_prepare();
}

void Switchover::seal(CommandId command) {
  if (busy(command)) return;
  if (state_ == State::none || state_ == State::preparing) {
    m_.context().done(command, false, "cannot seal: not prepared (prepare first)");
    return;
  }
  if (state_ == State::sealed || decided()) {
    m_.context().done(command, true);
    return;
  }
  command_ = command;
  goal_ = Goal::seal;
  if (state_ == State::prepared) start_seal();
}

void Switchover::commit(CommandId command, SwitchKind kind) {
  if (busy(command)) return;
  if (state_ == State::committed) {
    m_.context().done(command, kind == kind_,
                      kind == kind_ ? "" : "already switched over the other way");
    return;
  }
  std::string why = pivot_obstacle(kind);
  if (state_ != State::sealed) why = "not sealed (seal first)";
  if (!why.empty()) {
    m_.context().done(command, false, "cannot commit: " + why);
    return;
  }
  command_ = command;
  goal_ = Goal::commit;
  kind_ = kind;
  start_commit();
}

void Switchover::all(CommandId command, SwitchKind kind) {
  if (busy(command)) return;
  if (state_ == State::committed) {
    commit(command, kind);
    return;
  }
  std::string why = state_ == State::none ? obstacle() : std::string();
  if (why.empty()) why = pivot_obstacle(kind);
  if (state_ == State::committing && kind != kind_) why = "it is being committed the other way";
  if (!why.empty()) {
    m_.context().done(command, false, "cannot switch: " + why);
    return;
  }
  command_ = command;
  goal_ = Goal::commit;
  kind_ = kind;
  switch (state_) {
    case State::none:
      start_prepare();
      break;
    case State::prepared:
      start_seal();
      break;
    case State::sealed:
      start_commit();
      break;
    default:
      break;  // it goes on by itself
  }
}

void Switchover::abort(CommandId command) {
  if (decided()) {
    m_.context().done(command, false, "cannot abort: the switchover is decided");
    return;
  }
  m_.switch_manually();  // else --switch would begin it anew
  if (state_ != State::none) leave("switchover aborted");
  m_.context().done(command, true);
}

// --- steps ---

void Switchover::start_prepare() {
  state_ = State::preparing;
  since_ = m_.context().now;
  flush_.reset();
}

void Switchover::start_seal() {
  m_.verifier().stop("a switchover began");  // what it found from now on would come too late
  state_ = State::sealing;
  hold_since_ = m_.context().now;
  flush_.reset();
}

void Switchover::start_commit() {
  state_ = State::committing;
  m_.context().out->emplace_back(WriteRecord{kind_, m_.info().incoming});
  if (NBDFERRY_MUTANT(commit_before_record)) reached(State::committed);
}

void Switchover::reached(State state) {
  state_ = state;
  flush_.reset();
  const bool goal_reached = (state == State::prepared && goal_ == Goal::prepare) ||
                            (state == State::sealed && goal_ == Goal::seal) ||
                            state == State::committed;
  if (state == State::prepared) since_ = m_.context().now;
  if (goal_reached) {
    answer(true, {});
  } else if (state == State::prepared) {
    start_seal();
  } else {
    start_commit();
  }
}

void Switchover::answer(bool ok, const std::string& message) {
  if (command_) m_.context().done(*std::exchange(command_, std::nullopt), ok, message);
  // Without a command it was --switch at the migration's start; prepared stays until asked on.
}

void Switchover::advance() {
  if (state_ == State::none) maybe_auto_switch();
  const bool no_flush = !m_.info().can_flush;
  const bool level = m_.no_debt();
  // A write that waits for the target waits for what was sent before it, too. So the last of the bulk goes
  // first, while the guest doesn't wait: what "in sync" leaves of it takes no longer than this.
  if (state_ == State::preparing &&
      (level ||
       m_.context().now - since_ >= m_.options().downtime_limit / Migration::in_sync_share)) {
    m_.enter_mode(Mode::sync, "switchover");
  }
  if (state_ == State::preparing && level && !m_.has_suspects()) {
    // Submitted after the bulk copy: it covers all that is not mirrored in lock-step.
    if (no_flush) {
      reached(State::prepared);
    } else if (!flush_) {
      flush_ = m_.flush_target();
    }
  }
  const bool drained = m_.guests().running() == 0 && m_.queue().empty() && m_.in_flight().empty();
  if (state_ == State::sealing && drained && !flush_) {
    if (no_flush || NBDFERRY_MUTANT(seal_without_flush)) {
      reached(State::sealed);
    } else {
      flush_ = m_.flush_target();
    }
  } else if (state_ == State::sealing && NBDFERRY_MUTANT(seal_without_drain)) {
    reached(State::sealed);
  }
}

void Switchover::flushed(OpId flush, bool good) {
  if (flush_ != flush) return;
  flush_.reset();
  if (!good) {
    give_up("the target could not be flushed");
    return;
  }
  if (state_ == State::preparing) {
    reached(State::prepared);
  } else if (state_ == State::sealing) {
    reached(State::sealed);
  }
}

void Switchover::record_written(const RecordWritten& event) {
  NBDFERRY_ASSERT(state_ == State::committing, "a record was written that nobody asked for");
  if (!event.ok) {
    state_ = State::sealed;
    give_up("the ownership record could not be written: " + event.error);
    // What was too late while the record might have been written is not too late now.
    if (const auto why = m_.refused()) m_.end(Phase::failed, *why);
    return;
  }
  reached(State::committed);
}

void Switchover::debt(const char* why) {
  if (state_ == State::none || decided()) return;
  if (state_ == State::preparing) {
    flush_.reset();  // not after the bulk copy any more
    return;
  }
  if (NBDFERRY_MUTANT(prepared_ignores_debt)) return;
  ++m_.context().counters.debt_while_prepared;
  give_up(std::string("debt arose: ") + why);
}

void Switchover::give_up(const std::string& why) {
  if (state_ == State::none || decided()) return;
  m_.report_error("switchover given up: " + why);
  leave("switchover given up: " + why);
}

void Switchover::leave(const std::string& answer_text) {
  state_ = State::none;  // the engine sees that writes are no longer held, and runs them
  flush_.reset();
  auto_again_at_ = m_.context().now + auto_retry;
  answer(false, answer_text);
  if (!m_.ended()) m_.restore_mode();
}

void Switchover::tick() {
  const Time now = m_.context().now;
  const MigrateOptions& o = m_.options();
  if (state_ == State::preparing && now - since_ >= o.downtime_limit) {
    give_up("the target did not get level within the downtime limit of " +
            milliseconds_text(o.downtime_limit));
  } else if (state_ == State::prepared && now - since_ >= o.prepare_timeout) {
    give_up("prepared for longer than " + milliseconds_text(o.prepare_timeout));
  } else if ((state_ == State::sealing || state_ == State::sealed) &&
             now - hold_since_ >= o.downtime_limit) {
    give_up("writes were held for longer than the downtime limit of " +
            milliseconds_text(o.downtime_limit));
  }
}

void Switchover::maybe_auto_switch() {
  const SwitchWhen when = m_.options().switch_when;
  if (when == SwitchWhen::manual || command_ || m_.context().now < auto_again_at_) return;
  const SwitchKind kind = when == SwitchWhen::pivot ? SwitchKind::pivot : SwitchKind::release;
  if (!m_.in_sync() || !obstacle().empty()) return;  // mostly the former, and it makes no text
  if (const std::string why = pivot_obstacle(kind); !why.empty()) {
    m_.end(Phase::failed, "cannot switch: " + why);
    return;
  }
  goal_ = Goal::commit;
  kind_ = kind;
  start_prepare();
}

}  // namespace nbdferry::mirror
