// Migration: life cycle, link, phases, modes.
#include "mirror/migration.hpp"

#include <limits>

namespace nbdferry::mirror {

namespace {

constexpr std::size_t leaves_base = 256 * 1024;  // about 14 MiB of leaves for any disk …
constexpr std::uint64_t chunks_per_leaf = 64;    // … and 14 MiB more per TiB
constexpr Duration close_wait = std::chrono::seconds(1);
constexpr Duration fallback_wait_max = std::chrono::minutes(1);
constexpr Duration silence_max = std::chrono::milliseconds(200);

}  // namespace

Migration::Migration(Context& context, GuestOps& guests, Suspects& suspects, ResumeMap& resume,
                     const Start& start)
    : context_(context),
      guests_(guests),
      suspects_(suspects),
      resume_(resume),
      inherited_until_(context.now + suspects.left(context.now)),
      options_(start.options),
      queue_([this](OpId waiter, int delta) {
        GuestOp* op = guests_.find(waiter);
        NBDFERRY_ASSERT(op != nullptr, "an entry outlived the guest write that waits for it");
        op->pieces = static_cast<std::uint32_t>(static_cast<int>(op->pieces) + delta);
        context_.settle.push_back(waiter);
      }),
      copier_(*this),
      verifier_(*this),
      switchover_(*this),
      proof_(*this),
      bulk_window_(context.config.limits.bulk_bytes_min),
      read_share_(context.config.limits.copy_bytes, context.config.limits.copy_window_bytes),
      start_command_(start.command),
      resumed_(start.resumed && resume.kept()),
      policy_(context.config.limits.auto_dwell),
      mode_(mode_to_be()),
      fallback_wait_(context.config.limits.auto_dwell) {
  // What an earlier migration left outlives this process, too.
  suspects_.for_each([&](ByteRange r) { resume_.send(r); });
  if (resumed_ && !NBDFERRY_MUTANT(resume_no_quarantine)) {
    for (const auto& r : resume_.sent()) suspects_.add(r, context.now + options_.quarantine);
  }
  bandwidth_.set_rate(options_.bandwidth);
  deadline_.set(options_.deadline, context.now);
  info_.incoming = start.incoming;
  context_.out->emplace_back(OpenTarget{});
}

// --- the link ---

std::string Migration::check_target(const TargetInfo& info) const {
  const std::uint64_t size = context_.config.size;
  if (info.read_only) return "the target is read-only";
  if (info.size < size) {
    return "the target is smaller: it has " + std::to_string(info.size) + " bytes, the disk has " +
           std::to_string(size);
  }
  if (size % info.block_min != 0) {
    return "the disk's size is not a multiple of the target's minimum block of " +
           std::to_string(info.block_min) + " bytes";
  }
  if (info_.incoming && !info.incoming) {
    return "the target no longer takes writes from this migration alone: it was promoted "
           "meanwhile, or is another one";
  }
  if (info.block_min > chunk_size) return "the target's minimum block is larger than 64 KiB";
  if (ever_up_ && info.block_min != info_.block_min) return "the target's minimum block changed";
  if (ever_up_ && info_.can_flush && !info.can_flush) return "the target no longer offers flush";
  return {};
}

void Migration::target_up(const TargetUp& event) {
  if (ended_) return;
  if (const std::string why = check_target(event.info); !why.empty()) {
    target_refused(why);
    return;
  }
  info_ = event.info;
  target_window({event.window_ops, event.window_bytes});
  in_flight_.set_alignment(std::max<std::uint64_t>(block_size_min, info_.block_min));
  link_up_ = true;
  bulk_window_.reset();
  flushed_at_ = context_.now;
  if (!ever_up_) {
    ever_up_ = true;
    sampled_ = true;
    const std::size_t leaves = leaves_base + context_.config.size / chunk_size / chunks_per_leaf;
    map_ = std::make_unique<BlockMap>(
        context_.config.size, std::min<std::size_t>(leaves, context_.config.limits.leaves_max));
    heat_ = std::make_unique<HeatMap>(context_.config.size, context_.config.limits.heat_region_min);
    if (resumed_) adopt();
    if (info_.fenced) lift_suspects();
    suspects_.for_each([&](ByteRange r) { map_->set_flag(r, ChunkFlag::suspect); });
    // Writes that came before this have spans that ignore the target's blocks: let them end first.
    start_barrier_ = static_cast<std::uint64_t>(context_.new_op(OpKind::hint));
    if (!info_.can_flush)
      context_.notice("the target offers no flush: its data is only as safe as its cache");
    if (start_command_) context_.done(*std::exchange(start_command_, std::nullopt), true);
  } else {
    if (info_.fenced || NBDFERRY_MUTANT(fence_is_assumed)) lift_suspects();
    sampled_ = info_.proven;  // else it might be another one, at the same place
    context_.notice("the target is back: going on with " + std::to_string(map_->stale_bytes()) +
                    " bytes to copy");
  }
  if (!sampled_) verifier_.sample(samples());
  copier_.poke();
}

void Migration::target_window(const TargetWindow& event) {
  window_ = event;
  in_flight_.set_window(event.window_ops, event.window_bytes);
}

void Migration::target_lost(const std::string& reason) {
  if (!link_up_) return;
  NBDFERRY_ASSERT(in_flight_.empty(), "the target was lost with operations unanswered");
  link_up_ = false;
  if (ended_) return;
  const std::string what = "the target was lost: " + reason;
  report_error(what);
  switchover_.give_up(what);
  verifier_.stop("the target was lost");
  proof_.forget();
  // No connection is left that is older than the loss: the server may have restarted (rule 7).
  mark_unflushed_stale("the target was lost");
  Ranges queued;
  queue_.for_each([&](const MirrorEntry& e) { queued.push_back(blocks_of(e.range)); });
  for (const auto& r : queued) mark_stale(r, "the target was lost");
  for (const auto& r : copier_.live()) mark_stale(r, "the target was lost");
}

// The others go on. Whether it led to a server of its own is not known (rule 7).
void Migration::path_lost(const PathLost& event) {
  if (!link_up_) return;
  if (!ended_) report_error("a path to the target was lost: " + event.reason);
  // After the end, too: the last flush says nothing of what it had.
  if (!event.unflushed || NBDFERRY_MUTANT(path_loss_keeps_unflushed)) return;
  proof_.restart();
  mark_unflushed_stale("a path to the target was lost");
  mark_writes_stale("a path to the target was lost");
}

// What is in flight may be in the server's cache by now, and be among what it gives up.
void Migration::mark_writes_stale(const char* why) {
  Ranges writes;
  in_flight_.for_each([&](const TargetOp& o) {
    if (is_write(o.command)) writes.push_back(blocks_of(o.range));
  });
  for (const auto& r : writes) mark_stale(r, why);
}

void Migration::mark_unflushed_stale(const char* why) {
  if (NBDFERRY_MUTANT(restart_keeps_unflushed)) return;
  if (info_.can_flush) {
    for (const auto& r : unflushed_.failed(*map_)) mark_stale(r, why);
    return;
  }
  // Never flushed: whatever was written may be gone. A walk of the map, eight chunks at a time where
  // they are alike: a list of them would have no bound, and they are to be copied again anyway.
  map_->for_each_flag_run({0, map_->size()}, ChunkFlag::written, [&](ByteRange run, bool written) {
    if (written) mark_stale(run, why);
  });
}

void Migration::target_refused(const std::string& reason) {
  // The record may be on its way to the disk: it is too late to fail.
  if (switchover_.decided()) {
    report_error("the target was refused during the commit: " + reason);
    if (!NBDFERRY_MUTANT(refusal_forgotten)) refused_ = reason;
    return;
  }
  end(Phase::failed, reason);
}

// --- the end ---

void Migration::end(Phase phase, const std::string& reason) {
  if (ended_) return;
  switchover_.give_up(reason.empty() ? "the migration has ended" : reason);
  verifier_.stop("the migration has ended");
  proof_.forget();
  ended_ = phase;
  ended_at_ = context_.now;
  if (!reason.empty()) {
    last_error_ = reason;
    context_.notice("migration " + std::string(to_string(phase)) + ": " + reason);
  }
  if (start_command_) {
    context_.done(*std::exchange(start_command_, std::nullopt), phase != Phase::failed, reason);
  }
  // What was not sent, and what is not known to be done, is stale: a last flush does not cover it.
  if (map_ && !NBDFERRY_MUTANT(end_forgets_queue)) {
    Ranges unsent = copier_.live();
    queue_.for_each([&](const MirrorEntry& e) { unsent.push_back(blocks_of(e.range)); });
    guests_.for_each(
        [&](GuestOp& op) { unsent.insert(unsent.end(), op.mirrored.begin(), op.mirrored.end()); });
    for (const auto& r : unsent) mark_stale(r, "the migration has ended");
  }
  queue_.discard({0, std::numeric_limits<std::uint64_t>::max()});
  end_guest_waits();
  if (!suspended_) context_.out->emplace_back(Ended{});
}

void Migration::target_closed() {
  closed_ = true;
  if (suspended_) return;
  const bool resumable = ended_ == Phase::failed && map_ && resume_.kept();
  const bool keep = resumable || (resume_.kept() && !suspects_.empty());
  if (!resumable) resume_.touch({0, context_.config.size});
  if (!keep) resume_ = ResumeMap();
  context_.out->emplace_back(LetGo{keep});
}

void Migration::end_guest_waits() {
  overwrites_ = 0;
  guests_.for_each([&](GuestOp& op) {
    op.overwrites = false;
    op.mirrored.clear();
    op.readbacks = 0;
    release_waiter(op);
  });
  read_backs_.clear();
}

void Migration::close_when_drained() {
  if (!ended_ || close_sent_) return;
  const bool patient = context_.now - ended_at_ < close_wait;
  if (!in_flight_.empty() && patient) return;
  // So that a restart need not send again what has been answered.
  if (suspended_ && patient && info_.can_flush && map_ && !unflushed_.clean() &&
      !last_flush_sent_) {
    last_flush_sent_ = flush_target().has_value();
    if (last_flush_sent_) return;
  }
  close_sent_ = true;
  context_.out->emplace_back(CloseTarget{});
}

// --- operator ---

void Migration::pause(CommandId command) {
  if (switchover_.state() != Switchover::State::none) {
    context_.done(command, false, "cannot pause: a switchover is under way (abort it first)");
    return;
  }
  paused_ = true;
  context_.done(command, true);
}

void Migration::resume(CommandId command) {
  paused_ = false;
  copier_.poke();
  context_.done(command, true);
}

void Migration::cancel(CommandId command) {
  if (switchover_.decided()) {
    context_.done(command, false, "cannot cancel: the switchover is decided");
    return;
  }
  end(Phase::cancelled, {});
  context_.done(command, true);
}

void Migration::suspend() {
  if (switchover_.decided()) return;
  suspended_ = true;
  end(Phase::cancelled, {});
}

void Migration::set(const Set& event) {
  if (event.bandwidth) bandwidth_.set_rate(options_.bandwidth = *event.bandwidth);
  if (event.buffer_bytes) options_.buffer_bytes = *event.buffer_bytes;
  if (event.max_delay) options_.max_delay = *event.max_delay;
  if (event.downtime_limit) options_.downtime_limit = *event.downtime_limit;
  if (event.deadline) deadline_.set(options_.deadline = *event.deadline, context_.now);
  if (event.mode) {
    options_.mode = *event.mode;
    fallback_ = false;
    policy_.entered(mode_, context_.now);  // auto goes on from what is
    if (switchover_.state() == Switchover::State::none) restore_mode();
  }
  context_.done(event.command, true);
}

// --- modes ---

void Migration::enter_mode(Mode mode, const std::string& reason) {
  if (mode != mode_) context_.notice("mode " + std::string(to_string(mode)) + ": " + reason);
  mode_reason_ = reason;
  if (mode == mode_) return;
  mode_ = mode;
  if (mode != Mode::sync || !map_ || NBDFERRY_MUTANT(sync_keeps_queue)) return;
  // No sync write waits behind the whole queue: what does not drain soon is the copier's.
  const double seconds = std::chrono::duration<double>(options_.max_delay).count();
  const auto keep = std::max(context_.config.limits.sync_keep_min,
                             static_cast<std::uint64_t>(rate_.bytes_per_second() * seconds));
  for (const auto& r : queue_.beyond(keep))
    mark_stale(blocks_of(r), "queued too long for sync mode");
}

void Migration::restore_mode() {
  if (fallback_) {
    enter_mode(Mode::async, "the target was too slow for sync mode; its debt has not drained");
  } else {
    enter_mode(mode_to_be(), options_.mode == Mode::automatic ? "as before" : "as asked");
  }
}

void Migration::expire_sync_waits() {
  std::vector<OpId> late;
  guests_.for_each([&](GuestOp& op) {
    if (!op.waits_for_target || op.replied || op.admission == 0) return;
    if (NBDFERRY_MUTANT(sync_never_times_out)) return;
    if (context_.now - op.admitted_at >= options_.sync_timeout) late.push_back(op.id);
  });
  for (const OpId id : late) {
    GuestOp& op = *guests_.find(id);
    ++context_.counters.sync_timeouts;
    const Ranges blocks = op.mirrored;
    for (const auto& r : blocks) mark_stale(r, "a sync write timed out");
    release_waiter(op);
    switchover_.give_up("the target did not answer a sync write in time");
    if (mode_ == Mode::sync) fall_back();
  }
}

void Migration::fall_back() {
  fallback_ = true;
  fallback_until_ = context_.now + fallback_wait_;
  fallback_wait_ = std::min(fallback_wait_ * 2, fallback_wait_max);
  policy_.entered(Mode::async, context_.now);
  enter_mode(Mode::async, "the target did not answer a sync write in time");
}

// When the debt has drained; or, since a guest that outruns the target would never let it, after a
// while, a longer one each time.
void Migration::leave_fallback() {
  if (!fallback_) return;
  const bool drained = no_debt();
  if (!drained && (context_.now < fallback_until_ || !target_answers())) return;
  if (drained) fallback_wait_ = context_.config.limits.auto_dwell;
  fallback_ = false;
  if (switchover_.state() == Switchover::State::none) {
    enter_mode(mode_to_be(), drained ? "the debt has drained" : "the target answers again");
  }
}

bool Migration::target_answers() const {
  return link_up_ && (in_flight_.empty() || context_.now - answered_at_ < silence_max);
}

// Which mode, and how much pacing.
void Migration::steer() {
  const bool free = mirroring() && switchover_.state() == Switchover::State::none;
  const bool overflowed = std::exchange(overflowed_, false);
  if (!free) {
    pacer_.stop();
    return;
  }
  if (options_.mode == Mode::automatic && !fallback_) {
    const bool caught_up = queue_.debts() == 0 && in_flight_.debts() == 0;
    const auto change =
        policy_.decide(context_.now, {buffer_used(), overflowed, target_answers(), caught_up});
    if (change) {
      ++context_.counters.mode_changes;
      enter_mode(change->mode, change->reason);
    }
  }
  if (mode_ == Mode::async) {
    pacer_.tick(context_.now, buffer_used(), options_.max_delay);
  } else {
    pacer_.stop();
  }
}

// --- time and phases ---

void Migration::expire_suspects() {
  if (suspects_.empty()) return;
  const auto over = suspects_.expire(context_.now);
  if (over.empty()) return;
  if (map_) {
    for (const auto& r : over) map_->clear_flag(r, ChunkFlag::suspect);
    suspects_.for_each([&](ByteRange r) { map_->set_flag(r, ChunkFlag::suspect); });
  }
  for (const auto& r : over) settle(r);
  copier_.poke();
}

void Migration::tick() {
  expire_suspects();
  if (!ended_) {
    // What a limit of ours lets through says nothing of what the target could take.
    const bool throttled_before = std::exchange(throttled_, false);
    rate_.tick(context_.now, (!queue_.empty() || copier_.active()) && !throttled_before);
    if (heat_) heat_->tick(context_.now);
    read_share_.tick(context_.now);
    deadline_share_.set_rate(
        static_cast<std::uint64_t>(deadline_.allowed(stale_bytes(), context_.now)));
    copy_rate_.tick(context_.now, copier_.active() && !throttled_before);
    new_debt_.tick(context_.now, true);
    expire_sync_waits();
    leave_fallback();
    steer();
    maybe_verify();
    verifier_.tick();
    switchover_.tick();
    copier_.poke();
  }
}

void Migration::try_to_start() {
  if (started_ || !link_up_ || verifier_.sampling()) return;
  bool older = false;
  guests_.for_each([&](GuestOp& op) {
    older = older || (is_write(op.command) && static_cast<std::uint64_t>(op.id) < start_barrier_);
  });
  if (older) return;
  started_ = true;
}

void Migration::pump() {
  if (!ended_) {
    bandwidth_.refill(context_.now);
    deadline_share_.refill(context_.now);
    try_to_start();
    if (mirroring() && !holds_writes() && context_.now >= retry_at_) copier_.start_copies();
    // Flushes first: writes would take each place in the window as it becomes free.
    maybe_flush();
    proof_.advance();
    switchover_.advance();
    dispatch();
    verifier_.finish_if_done();
    update_in_sync();
    update_consistent();
    switchover_.advance();
  }
  close_when_drained();
}

std::uint64_t Migration::stale_bytes() const {
  if (!map_) return context_.config.size;
  const std::uint64_t unreadable = options_.skip_unreadable ? copier_.unreadable_stale_bytes() : 0;
  return map_->stale_bytes() - unreadable;
}

std::uint64_t Migration::debt_bytes() const {
  if (!map_) return stale_bytes();
  return stale_bytes() + map_->armed_bytes() + queue_.bytes() + in_flight_.buffer_bytes();
}

bool Migration::no_debt() const {
  if (!map_ || stale_bytes() != 0 || map_->armed_bytes() != 0) return false;
  if (queue_.debts() != 0 || in_flight_.debts() != 0) return false;
  for (const auto& [id, rb] : read_backs_) {
    const GuestOp* op = guests_.find(rb.guest);
    // Answered, or about to be whatever the target does: pacing only puts it off.
    if (op != nullptr && (op->replied || !op->waits_for_target)) return false;
  }
  return true;
}

void Migration::update_in_sync() {
  if (!started_ || !link_up_ || paused_) {
    in_sync_ = false;
    return;
  }
  const std::uint64_t debt = debt_bytes();
  // Nothing is known of the rate in the first moments: then what may always be under way.
  const double rate = rate_.bytes_per_second();
  const double drain = rate == 0
                           ? static_cast<double>(context_.config.limits.bulk_bytes_min)
                           : rate * std::chrono::duration<double>(options_.downtime_limit).count();
  // A part of the downtime limit begins it, so that "in sync" does not mean that a fast path still has
  // much to carry; all of it ends it, so that the phase does not flutter.
  const double limit = in_sync_ ? drain : drain / in_sync_share;
  if (verifier_.sampling()) {
    in_sync_ = false;
    return;
  }
  const bool readable = options_.skip_unreadable || copier_.unreadable_bytes() == 0;
  in_sync_ = readable && suspects_.empty() && (no_debt() || static_cast<double>(debt) <= limit);
}

// Copies know nothing of epochs. So once all is level an epoch begins, and when what came before it
// is on the target, that holds a state that the guest's disk could have had.
void Migration::update_consistent() {
  if (options_.consistency != Consistency::crash) return;
  const bool level = mirroring() && map_->stale_bytes() == 0 && !unsure() &&
                     (overwrites_ == 0 || NBDFERRY_MUTANT(consistent_while_overwriting)) &&
                     (map_->armed_bytes() == 0 || NBDFERRY_MUTANT(consistent_while_copying));
  if (level && !level_) {
    if (!NBDFERRY_MUTANT(consistent_before_drained)) queue_.close_epoch();
    consistent_from_ = queue_.open_epoch();
  }
  level_ = level;
}

void Migration::barrier() {
  if (options_.consistency == Consistency::crash && level_) queue_.close_epoch();
}

Phase Migration::phase() const {
  using State = Switchover::State;
  if (ended_) return *ended_;
  switch (switchover_.state()) {
    case State::prepared:
      return Phase::prepared;
    case State::sealed:
      return Phase::sealed;
    case State::sealing:
    case State::committing:
      return Phase::switching;
    case State::committed:
      return Phase::switched;
    case State::none:
    case State::preparing:
      break;
  }
  if (!ever_up_) return Phase::connecting;
  if (!link_up_) return Phase::interrupted;
  if (paused_) return Phase::paused;
  return in_sync_ ? Phase::in_sync : Phase::copying;
}

void Migration::report(Status& s) const {
  s.phase = phase();
  s.mode = mode_;
  s.mode_wanted = options_.mode;
  s.mode_reason = mode_reason_;
  s.stale_bytes = map_ ? map_->stale_bytes() : context_.config.size;
  s.copying_bytes = map_ ? map_->armed_bytes() : 0;
  s.buffered_bytes = queue_.bytes() + in_flight_.buffer_bytes();
  s.copied_bytes = copied_bytes_;
  s.zeroed_bytes = zeroed_bytes_;
  s.mirrored_bytes = mirrored_bytes_;
  s.suspect_bytes = suspects_.bytes();
  s.quarantine_left = quarantine_left();
  s.unreadable_bytes = copier_.unreadable_bytes();
  s.resumed = resumed_;
  s.resumed_bytes = resumed_bytes_;
  s.verified_bytes = verifier_.verified_bytes();
  s.mismatched_bytes = verifier_.mismatched_bytes();
  s.verifying = verifier_.running();
  s.in_sync = in_sync_ && !ended_;
  s.consistent = level_ && !ended_ && queue_.first_epoch() >= consistent_from_;
  s.holding = holds_writes();
  s.bytes_per_second = rate_.bytes_per_second();
  s.new_bytes_per_second = new_debt_.bytes_per_second();
  s.target_silent = in_flight_.silence(context_.now, answered_at_);
  s.pacing_delay = pacing_delay();
  if (deadline_.given()) s.deadline_left = deadline_.left(context_.now);
  s.needed_bytes_per_second = deadline_.needed(s.stale_bytes + s.copying_bytes, context_.now);
  s.last_error = last_error_;
}

void Migration::check_invariants() const {
  queue_.check_invariants();
  in_flight_.check_invariants();
  if (!map_) return;
  map_->check_invariants();
  copier_.check_invariants();
  queue_.for_each([&](const MirrorEntry& e) {
    NBDFERRY_ASSERT(!map_->any(map_->covering(e.range), BlockState::stale),
                    "data is queued for a stale block");
  });
  NBDFERRY_ASSERT(map_->all(proof_.reserved(), BlockState::stale),
                  "the block of a path's proof is not stale");
  if (ended_) return;  // answers that come after the end no longer change the map
  suspects_.for_each([&](ByteRange r) {
    NBDFERRY_ASSERT(map_->all(map_->covering(r), BlockState::stale),
                    "a suspect block is not stale");
  });
}

}  // namespace nbdferry::mirror
