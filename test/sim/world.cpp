#include "test/sim/world.hpp"

#include <cstring>

#include "mirror/journal.hpp"
#include "mirror/resume_map.hpp"
#include "mirror/token_bucket.hpp"

namespace nbdferry::sim {

using namespace mirror;

World::World(std::uint64_t seed, Trace& trace)
    : prng_(seed),
      setup_(make_setup(prng_)),
      trace_(trace),
      source_(setup_, prng_),
      target_(setup_, prng_, cases_),
      guest_(setup_, source_.image),
      engine_(std::make_unique<Engine>(setup_.engine)) {
  trace_.line("size {} source_align {} promised {} window {}x({} ops, {} bytes)",
              setup_.engine.size, setup_.engine.source_align, setup_.engine.promised_block_min,
              setup_.connections, setup_.window_ops, setup_.window_bytes);
}

// --- moving it
// ------------------------------------------------------------------------------------

void World::apply(Event&& event) {
  ++event_;
  target_.set_event(event_);
  if (trace_.on()) trace_.line("{:>6} {:>9} us {}", event_, now_.count() / 1000, describe(event));
  actions_.clear();
  engine_->apply(std::move(event), now_, actions_);
  for (auto& action : actions_) {
    if (trace_.on()) trace_.line("{:>16} {}", "", describe(action));
    std::visit([this](auto& a) { act(a); }, action);
  }
  const Mode mode = status_.mode;
  check_status();
  check_sync_entry(mode);
  if (setup_.check_invariants) engine_->check_invariants();
}

void World::advance(Duration by) {
  const Time until = now_ + by;
  while (now_ < until) {
    now_ = std::min(until, next_tick_);
    target_.pass_time(now_);
    if (now_ < next_tick_) continue;
    next_tick_ = now_ + setup_.tick_period;
    if (!engine_->wants_ticks() && !setup_.tick_always) continue;
    apply(Tick{});
    check_times();
  }
}

void World::guest_request(GuestRequest&& request) {
  guest_.arrived(request, event_ + 1);
  apply(std::move(request));
}

void World::complete_source() {
  SourceDone done = source_.complete();
  if (done.error != IoError::none) {
    guest_.disk_failed(source_.last().command, source_.last().range, event_ + 1);
  }
  guest_.source_done(done.id, done.error, now_);
  apply(std::move(done));
}

void World::answer_target() {
  TargetDone done = target_.answer(now_);
  const bool leaves = done.error == IoError::shutdown;
  if (serving_ == Serving::target && done.error != IoError::none) {
    target_failed_ = true;
    if (done.error != IoError::lost && !leaves) {
      guest_.disk_failed(target_.last().command, target_.last().range, event_ + 1);
    }
  }
  apply(std::move(done));
  if (leaves && target_.up()) lose_target();
}

// One of its connections, and with it a path. What the guest is just reading is not asked for again.
void World::lose_path() {
  apply(target_.lose_connection());
  apply(target_.lose_path(serving_ == Serving::source || !target_.reading()));
  cases_.saw(Case::path_lost);
}

void World::come_up() {
  const bool first = status_.resumed && status_.phase == Phase::connecting;
  TargetUp up = target_.come_up();
  const bool proven = up.info.proven;
  apply(std::move(up));
  if (!first || proven || status_.resumed_bytes == 0) return;
  unproven_ = true;
  require(status_.verified_bytes == 0, "what was verified on another target, perhaps, counts");
}

// All of it, since this process met the target.
void World::verified(const std::string& text) {
  if (text.find("bytes compared, 0 differed") != std::string::npos &&
      text.find("never quiet") == std::string::npos) {
    unproven_ = false;
  }
}

void World::write_record(bool ok) {
  const SwitchKind kind = *record_;
  record_.reset();
  if (!ok) {
    cases_.saw(Case::record_failure);
    apply(RecordWritten{false, "the simulator's disk is full"});
    return;
  }
  // A target that can't flush may have been restarted since the commit began.
  if (setup_.target.can_flush) check_identical("when the record was written", true, false);
  if (kind == SwitchKind::pivot) keep_journal();
  switched_over(kind);
  apply(RecordWritten{true, {}});
}

void World::switched_over(SwitchKind kind) {
  if (kind == SwitchKind::pivot) {
    losses_before_ = target_.up() ? target_.losses() : UINT64_MAX;
    serving_ = Serving::target;
    cases_.saw(Case::pivoted);
    // What could not be read was left out knowingly: anything may be there.
    for (std::uint64_t u = 0; u < source_.image.units(); ++u) {
      if (excused(u)) guest_.oracle().undefined(source_.image.unit_range(u));
    }
  } else {
    serving_ = Serving::nobody;
    cases_.saw(Case::released);
  }
}

// After a pivot without a journal what was written again, or may have to be, is remembered by the process
// alone.
bool World::may_crash() const {
  return serving_ != Serving::target || !journal_.empty() ||
         (target_.up() && !target_.haunted() && !target_failed_ && status_.suspect_bytes == 0 &&
          target_.losses() == losses_before_);
}

void World::crash() {
  cases_.saw(Case::crashed);
  cases_.saw_if(status_.suspect_bytes != 0, Case::crashed_with_suspects);
  count_cases();
  commands_.clear();
  hold_since_.reset();
  prepared_since_.reset();
  if (record_ && prng_.chance(1, 2)) {
    switched_over(*record_);
  }
  record_.reset();
  cases_.saw_if(serving_ == Serving::target, Case::crashed_after_pivot);
  if (!next_state_.empty()) state_ = std::exchange(next_state_, {});
  if (serving_ == Serving::nobody) state_.clear();  // another host writes to the target now
  source_.crash();
  const bool pivoted = serving_ == Serving::target;
  target_.lose_client(now_, pivoted && journal_.empty(), pivoted && status_.buffered_bytes != 0);
  trace_.line("crash");
  limit_bandwidth(options_.bandwidth);
  EngineConfig config = setup_.engine;
  config.serving = serving_;
  engine_ = std::make_unique<Engine>(config);
  status_ = engine_->status();
  const std::span<std::byte> state = std::as_writable_bytes(std::span(state_));
  if (serving_ == Serving::target) {
    another_target_ = false;
    keep_journal();
    apply(ServeTarget{options_, state, !journal_.empty()});
  } else if (serving_ == Serving::source && running_ && !state_.empty()) {
    cases_.saw(Case::resumed);
    swapped_ = swapped_ || another_target_;
    command(Start{{}, options_, state, true});
  } else if (serving_ == Serving::source) {
    kept_ = !state_.empty();
    apply(KeepState{state, setup_.quarantine});
  }
  for (auto& request : guest_.ask_again()) apply(std::move(request));
}

void World::keep_journal() {
  if (journal_.empty()) return;
  apply(KeepJournal{std::as_writable_bytes(std::span(journal_)).first(journal_bytes_)});
}

void World::grow_journal() {
  const std::uint64_t most = setup_.journal_bytes_max - journal_bytes_;
  journal_bytes_ += std::min(most, prng_.between(1, 32) * Journal::slot_bytes);
  keep_journal();
}

void World::heal() {
  source_.heal();
  target_.heal();
}

CommandId World::start(const MigrateOptions& options, bool resumed) {
  const bool go_on = resumed && may_resume();
  if (go_on) {
    cases_.saw(Case::resumed);
    swapped_ = swapped_ || another_target_;
  } else {
    target_.met();
    unacknowledged_ = false;
    next_state_.assign(ResumeMap::bytes_for(setup_.engine.size) / sizeof(std::uint64_t), 0);
  }
  options_ = options;
  kept_ = false;
  running_ = true;
  buffer_bytes_ = options.buffer_bytes;
  max_delay_ = options.max_delay;
  limit_bandwidth(options.bandwidth);
  guest_.set_max_delay(options.max_delay);
  skip_unreadable_ = options.skip_unreadable;
  source_.forget_failed_reads();
  const auto state = std::as_writable_bytes(std::span(go_on ? state_ : next_state_));
  const CommandId id = command(Start{{}, options, state, go_on});
  if (status_.phase != Phase::queued && !next_state_.empty())
    state_ = std::exchange(next_state_, {});
  return id;
}

void World::act(LetGo& a) {
  kept_ = a.keep && next_state_.empty();
  if (!next_state_.empty()) {
    state_ = std::exchange(next_state_, {});
  } else if (!a.keep) {
    state_.clear();
  }
}

// --- actions
// --------------------------------------------------------------------------------------

void World::act(SubmitSource& a) {
  if (is_write(a.op.command)) {
    require(serving_ == Serving::source, "source: {}, which it does not own", describe(a.op));
    guest_.source_submitted(a.op, now_, event_);
  }
  cases_.saw_if(source_.submit(std::move(a.op)), Case::torn_read);
}

void World::limit_bandwidth(std::uint64_t rate) {
  bandwidth_ = rate;
  limited_since_ = now_;
  sent_since_ = 0;
}

void World::set(Set&& event) {
  const auto bandwidth = event.bandwidth;
  if (!bandwidth) {
    apply(std::move(event));
    return;
  }
  // What goes out on account of this very event may go by the old limit or the new one.
  const std::uint64_t before = std::exchange(bandwidth_, 0);
  apply(std::move(event));
  limit_bandwidth(last_command_ok_ ? *bandwidth : before);
}

void World::act(SubmitTarget& a) {
  if (bandwidth_ != 0 && serving_ == Serving::source && a.op.command == Command::write) {
    // One operation may overdraw it; and there is a little for bursts.
    const double seconds = std::chrono::duration<double>(now_ - limited_since_).count() +
                           TokenBucket::burst_seconds + 0.001;
    require(static_cast<double>(sent_since_) <= static_cast<double>(bandwidth_) * seconds,
            "{} bytes sent in {} s, at a limit of {} bytes/s", sent_since_, seconds, bandwidth_);
    sent_since_ += a.op.payload.size();
  }
  target_.submit(std::move(a.op));
}

void World::act(Reply& a) {
  GuestView::Authority authority{serving_, &source_.image, false, false, nullptr};
  if (serving_ == Serving::target) {
    authority.image = &target_.image;
    authority.target = &target_;
    authority.target_failed = target_failed_;
    authority.unreachable = !target_.up() && now_ - target_.down_since() >= setup_.reconnect_delay;
  }
  guest_.replied(a, authority, event_);
}

void World::act(UsePath& a) {
  using Other = TargetModel::OtherPath;
  const Other what = target_.decided(a.path);
  require(what != Other::unknown && what != Other::another,
          "a path is used that does not lead to the target");
  cases_.saw_if(what != Other::gone, Case::path_used);
}

void World::act(RefusePath& a) {
  using Other = TargetModel::OtherPath;
  const Other what = target_.decided(a.path);
  require(what != Other::unknown, "a path is refused that was not found");
  const bool unreadable = a.reason.find("can't be read") != std::string::npos;
  const bool may_fail = setup_.corruption || (setup_.target_errors && unreadable) ||
                        (serving_ == Serving::target && what != Other::known);
  require((what != Other::same && what != Other::known) || may_fail,
          "a path to the target is refused: {}", a.reason);
  cases_.saw_if(what == Other::another, Case::path_refused);
}

void World::act(LeavePath& a) { target_.leave(a.path); }

void World::act(WriteRecord& a) {
  require(!record_ && serving_ == Serving::source, "a record is written out of turn");
  require(
      a.kind != SwitchKind::pivot ||
          (setup_.target.can_flush && setup_.target.block_min <= setup_.engine.promised_block_min),
      "a pivot to a target that does not keep the promise to the guest");
  record_ = a.kind;
  require(!unacknowledged_, "a switchover, though a verification found a difference");
  require(!unproven_, "a switchover to a target that might be another one");
  if (a.kind == SwitchKind::pivot) {
    journal_.assign(setup_.journal_bytes_max / sizeof(std::uint64_t), 0);
    journal_bytes_ = setup_.journal_bytes;
  }
  check_identical("at the commit", setup_.target.can_flush, false);
}

void World::act(CommandDone& a) {
  const auto it = commands_.find(a.command);
  require(it != commands_.end(), "command {}: answered, but not open",
          static_cast<std::uint64_t>(a.command));
  const OpenCommand command = it->second;
  commands_.erase(it);
  last_command_ok_ = a.ok;
  last_message_ = a.message;
  verified(a.message);
  // Once the record is being written a repeated prepare is answered without a look at the target,
  // which may have been lost since.
  if (command.kind == Event(Prepare{}).index() && a.ok && serving_ == Serving::source && !record_) {
    prepared_since_.reset();
    check_identical("when prepared", false, true);
  } else if (command.kind == Event(Verify{}).index() && a.ok && a.message.empty()) {
    unacknowledged_ = false;
  } else if (command.kind == Event(Verify{}).index()) {
    const bool complete = a.message.find("compared") != std::string::npos &&
                          a.message.find("never quiet") == std::string::npos &&
                          a.message.find("can't be read") == std::string::npos &&
                          a.message.find("begun earlier") == std::string::npos;
    // What is found while the record is being written is found too late to be sent again.
    if (complete && !record_) target_.verified(command.event);
    cases_.saw_if(complete && !a.ok, Case::corruption_found);
  } else if (command.kind == Event(Unfence{}).index() && a.ok && serving_ == Serving::nobody) {
    serving_ = Serving::source;
    cases_.saw(Case::unfenced);
  }
}

// --- checks
// ---------------------------------------------------------------------------------------

void World::check_status() {
  status_ = engine_->status();
  const Status& s = status_;
  require(s.serving == serving_, "the core and the record disagree on who serves");
  guest_.after_event(s.mode == Mode::async && s.pacing_delay == Duration{0}, serving_);
  require(s.mismatched_bytes == 0 || setup_.corruption || swapped_, "verify: a false alarm");
  unproven_ = unproven_ && s.resumed_bytes != 0;
  unacknowledged_ = unacknowledged_ || s.mismatched_bytes > mismatched_;
  mismatched_ = s.mismatched_bytes;

  const bool level = s.phase == Phase::prepared || s.phase == Phase::sealed;
  require(!level || s.suspect_bytes == 0, "prepared with suspects");
  require(!level || s.stale_bytes == 0 || skip_unreadable_, "prepared with {} stale bytes",
          s.stale_bytes);
  if (serving_ == Serving::source) {
    const std::uint64_t block = std::max<std::uint64_t>(block_size_min, setup_.target.block_min);
    const std::uint64_t limit = buffer_bytes_ + guest_.open_write_bytes(block);
    require(s.buffered_bytes <= limit + target_.buffer_in_flight(), "{} bytes buffered, beyond {}",
            s.buffered_bytes, limit);
  }
  cases_.saw_if(s.held_requests != 0, Case::held_write);
  cases_.saw_if(s.unreadable_bytes != 0, Case::unreadable);
  cases_.saw_if(s.mode == Mode::sync && serving_ == Serving::source &&
                    guest_.waiting_for_target() > target_.window().window_ops,
                Case::sync_beyond_window);
  require(s.quarantine_left <= setup_.quarantine, "a quarantine that is longer than asked for");

  if (!s.holding || record_ || serving_ != Serving::source) {
    hold_since_.reset();
  } else if (!hold_since_) {
    hold_since_ = now_;
  }
  if (s.phase != Phase::prepared) {
    prepared_since_.reset();
  } else if (!prepared_since_) {
    prepared_since_ = now_;
  }
}

// No write waits behind the whole queue: what is left of it drains within the longest delay.
void World::check_sync_entry(Mode before) {
  const Status& s = status_;
  if (before == Mode::sync || s.mode != Mode::sync || serving_ != Serving::source) return;
  const std::uint64_t block = std::max<std::uint64_t>(block_size_min, setup_.target.block_min);
  const double seconds = std::chrono::duration<double>(max_delay_).count();
  const std::uint64_t keep = std::max(setup_.engine.limits.sync_keep_min,
                                      static_cast<std::uint64_t>(s.bytes_per_second * seconds));
  const std::uint64_t limit = keep + target_.buffer_in_flight() + guest_.open_write_bytes(block);
  require(s.buffered_bytes <= limit, "{} bytes are queued on entering sync, beyond {}",
          s.buffered_bytes, limit);
}

// Rule 10's limits, and rule 1's. Checked after a tick; the slack is a tick or two.
void World::check_times() {
  const Duration slack = 2 * setup_.tick_period;
  require(!hold_since_ || now_ - *hold_since_ <= setup_.downtime_limit + slack,
          "writes are held for longer than the downtime limit");
  require(!prepared_since_ || now_ - *prepared_since_ <= setup_.prepare_timeout + slack,
          "prepared for longer than the timeout");
  for (const auto& [id, c] : commands_) {
    Duration limit = Duration::max();
    if (c.kind == Event(Prepare{}).index() || c.kind == Event(Seal{}).index()) {
      limit = setup_.downtime_limit + slack;
    } else if (c.kind == Event(Switch{}).index() && !record_) {
      limit = 2 * setup_.downtime_limit + slack;
    }
    require(record_.has_value() || now_ - c.at <= limit, "command {} takes too long",
            static_cast<std::uint64_t>(id));
  }
  if (serving_ == Serving::source) guest_.check_delays(now_);
}

bool World::excused(std::uint64_t unit) const {
  return target_.corrupt(unit) || (skip_unreadable_ && source_.read_failed(unit));
}

void World::check_identical(const char* when, bool durable, bool but_open) {
  const DiskImage& source = source_.image;
  for (const bool medium : {false, true}) {
    if (medium && !durable) break;
    const std::byte* target = medium ? target_.image.durable() : target_.image.current();
    if (std::memcmp(source.current(), target, source.size()) == 0) continue;
    for (std::uint64_t u = 0; u < source.units(); ++u) {
      const ByteRange r = source.unit_range(u);
      const bool same = std::memcmp(source.current() + r.begin, target + r.begin, r.length()) == 0;
      if (!same && skip_unreadable_ && source_.read_failed(u) && !target_.corrupt(u)) {
        cases_.saw(Case::unreadable_left_out);
      }
      if (same || excused(u)) continue;
      bool is_open = false;
      for (const auto& q : guest_.open()) {
        is_open = is_open || (but_open && is_write(q.command) && q.range.overlaps(r));
      }
      require(is_open, "{}: source and target differ{} at byte {}", when,
              medium ? " on the medium" : "", r.begin);
    }
  }
}

void World::check_authority(const char* when) {
  const ByteRange all{0, setup_.engine.size};
  const bool target = serving_ == Serving::target;
  const DiskImage& image = target ? target_.image : source_.image;
  const auto wrong = guest_.oracle().wrong(all, image.current(), event_ + 1);
  require(!wrong, "{}: the disk that serves holds a wrong byte {}", when, wrong.value_or(0));
}

void World::check_medium(const char* when) {
  const ByteRange all{0, setup_.engine.size};
  const auto wrong = guest_.oracle().wrong(all, target_.image.durable(), event_ + 1);
  require(!wrong, "{}: the target's medium holds a wrong byte {}", when, wrong.value_or(0));
}

void World::check_consistent() {
  if (!status_.consistent || serving_ != Serving::source || !target_.up() || setup_.corruption)
    return;
  // On a disk that can't be read nothing tells another target from the one before a restart.
  if (skip_unreadable_ && target_.replaced()) return;
  cases_.saw_if(status_.buffered_bytes != 0, Case::consistent_with_backlog);
  const auto wrong = guest_.oracle().impossible_after_cut(target_.image.current());
  require(!wrong, "the target holds what no power cut could leave, at byte {}", wrong.value_or(0));
}

void World::check_quiet() {
  require(guest_.open().empty(), "guest requests are left unanswered");
  require(!source_.busy(), "source operations are left");
  require(engine_->open_requests() == 0, "the core believes that {} requests are open",
          engine_->open_requests());
  engine_->check_invariants();
}

void World::count_cases() {
  const Counters& c = engine_->counters();
  cases_.saw_if(c.overflow_during_copy != 0, Case::overflow_during_copy);
  cases_.saw_if(c.armed_with_writes_in_flight != 0, Case::armed_with_writes_in_flight);
  cases_.saw_if(c.superseded != 0, Case::superseded);
  cases_.saw_if(c.superseded_by_trim != 0, Case::superseded_by_trim);
  cases_.saw_if(c.debt_while_prepared != 0, Case::debt_while_prepared);
  cases_.saw_if(c.sync_timeouts != 0, Case::sync_timeout);
  cases_.saw_if(c.read_backs != 0, Case::read_back);
  cases_.saw_if(c.copies_discarded != 0, Case::copy_discarded);
  cases_.saw_if(c.flush_failures != 0, Case::flush_failure);
  cases_.saw_if(c.replayed_writes != 0, Case::replayed_write);
  cases_.saw_if(c.mode_changes != 0, Case::mode_changed);
  cases_.saw_if(c.paced_writes != 0, Case::paced_write);
  cases_.saw_if(c.epochs_waited != 0, Case::epoch_waited);
  cases_.saw_if(c.merged != 0, Case::merged);
  cases_.saw_if(c.hot_left_for_last != 0, Case::hot_left_for_last);
  cases_.saw_if(c.overwritten != 0, Case::overwritten);
  cases_.saw_if(c.distrusted != 0, Case::distrusted);
  cases_.saw_if(source_.mended(), Case::unreadable_mended);
}

}  // namespace nbdferry::sim
