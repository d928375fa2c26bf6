// Engine: takes events, keeps the guest's requests, and asks the migration (or, after a pivot,
// Pivoted) what becomes of them.
#include "mirror/engine.hpp"

#include <deque>
#include <map>
#include <optional>
#include <variant>

#include "mirror/context.hpp"
#include "mirror/guest_ops.hpp"
#include "mirror/journal.hpp"
#include "mirror/migration.hpp"
#include "mirror/pivoted.hpp"
#include "mirror/resume_map.hpp"
#include "mirror/suspects.hpp"

namespace nbdferry::mirror {

std::string_view to_string(Mode m) {
  switch (m) {
    case Mode::async:
      return "async";
    case Mode::sync:
      return "sync";
    case Mode::automatic:
      return "auto";
  }
  return "unknown";
}

std::string_view to_string(Phase p) {
  switch (p) {
    case Phase::idle:
      return "idle";
    case Phase::queued:
      return "queued";
    case Phase::connecting:
      return "connecting";
    case Phase::copying:
      return "copying";
    case Phase::paused:
      return "paused";
    case Phase::in_sync:
      return "in_sync";
    case Phase::prepared:
      return "prepared";
    case Phase::sealed:
      return "sealed";
    case Phase::switching:
      return "switching";
    case Phase::switched:
      return "switched";
    case Phase::interrupted:
      return "interrupted";
    case Phase::failed:
      return "failed";
    case Phase::cancelled:
      return "cancelled";
  }
  return "unknown";
}

class EngineState {
 public:
  explicit EngineState(const EngineConfig& config) : serving_(config.serving) {
    context_.config = config;
  }

  void apply(Event&& event, Time now, Actions& out) {
    NBDFERRY_ASSERT(now >= context_.now, "time went back");
    context_.now = now;
    context_.out = &out;
    std::visit([this](auto&& e) { on(std::forward<decltype(e)>(e)); }, std::move(event));
    after_event();
    context_.out = nullptr;
  }

  [[nodiscard]] Status status() const;
  [[nodiscard]] const Counters& counters() const { return context_.counters; }
  [[nodiscard]] bool wants_ticks() const {
    return pivoted_ || !suspects_.empty() || (migration_ && !migration_->closed());
  }
  [[nodiscard]] bool guest_waits_for_copy() const {
    return migration_ && migration_->guest_waits_for_copy();
  }
  [[nodiscard]] std::uint64_t open_requests() const { return guests_.size(); }
  void check_invariants() const {
    guests_.check_invariants();
    if (migration_ && !migration_->closed()) migration_->check_invariants();
  }

 private:
  // --- guest and disks ---
  void on(GuestRequest&& request);
  void on(SourceDone&& event);
  void on(TargetDone&& event) {
    if (pivoted_) {
      pivoted_->target_done(std::move(event));
    } else {
      migration_->target_done(std::move(event));
    }
  }
  // --- the link: to whoever has the target ---
  template <typename F>
  void tell(F&& what) {
    if (pivoted_) {
      what(*pivoted_);
    } else if (migration_) {
      what(*migration_);
    }
  }
  void on(TargetUp&& event) {
    tell([&](auto& owner) { owner.target_up(event); });
  }
  void on(TargetWindow&& event) {
    tell([&](auto& owner) { owner.target_window(event); });
  }
  void on(TargetLost&& event) {
    tell([&](auto& owner) { owner.target_lost(event.reason); });
  }
  void on(TargetRefused&& event) {
    tell([&](auto& owner) { owner.target_refused(event.reason); });
  }
  void on(TargetClosed&&) {
    tell([](auto& owner) { owner.target_closed(); });
    if (orphan_state_) keep(*std::exchange(orphan_state_, std::nullopt));
    if (queued_start_) start(*std::exchange(queued_start_, std::nullopt));
  }
  void on(PathFound&& event) {
    tell([&](auto& owner) { owner.path_found(event); });
  }
  void on(PathLost&& event) {
    tell([&](auto& owner) { owner.path_lost(event); });
  }
  void on(PathRefused&& event) {
    tell([&](auto& owner) { owner.path_refused(event.reason); });
  }
  void on(RecordWritten&& event);
  void on(Tick&&);

  // --- operator ---
  void on(Start&& event);
  void on(KeepState&& e) {
    keep(e.state);
    for (const auto& r : resume_.sent()) suspects_.add(r, context_.now + e.quarantine);
  }
  void on(KeepJournal&& e) { journal_.use(e.memory, context_.config.size); }
  void on(ServeTarget&& e) {
    keep(e.state);
    pivoted_ = std::make_unique<Pivoted>(context_, guests_, resume_, journal_, e);
  }
  void on(Suspend&& e);
  void on(Pause&& e) {
    with_migration(e.command, [&] { migration_->pause(e.command); });
  }
  void on(Resume&& e) {
    with_migration(e.command, [&] { migration_->resume(e.command); });
  }
  void on(Cancel&& e);
  void on(Verify&& e) {
    with_migration(e.command, [&] { migration_->verify(e); });
  }
  void on(Set&& e) {
    with_migration(e.command, [&] { migration_->set(e); });
  }
  void on(Prepare&& e) {
    with_switchover(e.command, [&](Switchover& s) { s.prepare(e.command); });
  }
  void on(Seal&& e) {
    with_switchover(e.command, [&](Switchover& s) { s.seal(e.command); });
  }
  void on(Commit&& e) {
    if (done_before(e.command, e.kind)) return;
    with_switchover(e.command, [&](Switchover& s) { s.commit(e.command, e.kind); });
  }
  void on(Switch&& e) {
    if (done_before(e.command, e.kind)) return;
    with_switchover(e.command, [&](Switchover& s) { s.all(e.command, e.kind); });
  }
  void on(Abort&& e) {
    with_switchover(e.command, [&](Switchover& s) { s.abort(e.command); });
  }
  void on(Unfence&& e);

  template <typename F>
  void with_migration(CommandId command, F&& f) {
    if (!migration_ || migration_->ended() || pivoted_) {
      context_.done(command, false, "no migration is running");
    } else {
      f();
    }
  }
  // After the end, too: repeating what has been done is no error.
  template <typename F>
  void with_switchover(CommandId command, F&& f) {
    if (!migration_ || (migration_->ended() && serving_ == Serving::source)) {
      context_.done(command, false, "no migration is running");
    } else {
      f(migration_->switchover());
    }
  }

  void keep_beside(std::span<std::byte> state) {
    if (state.empty() || resume_.is_in(state)) return;
    ResumeMap next(state, context_.config.size);
    for (const auto& r : resume_.sent()) next.send(r);
  }
  // It was done by a process before this one: repeating it is no error.
  bool done_before(CommandId command, SwitchKind kind) {
    const Serving serving = kind == SwitchKind::pivot ? Serving::target : Serving::nobody;
    if (migration_ || serving_ != serving) return false;
    context_.done(command, true);
    return true;
  }
  void start(const Start& event);
  void keep(std::span<std::byte> state) {
    resume_ = state.empty() ? ResumeMap() : ResumeMap(state, context_.config.size);
  }
  void after_event();
  void run(GuestOp& op);
  void run_write(GuestOp& op);
  void submit_to_source(GuestOp& op);
  void settle(OpId id);
  [[nodiscard]] bool paced(GuestOp& op);
  void release_paced();
  void reply(GuestOp& op);
  void switched_over();
  [[nodiscard]] bool holding() const {
    return migration_ && migration_->holds_writes() && serving_ == Serving::source;
  }

  Context context_;
  Serving serving_;
  GuestOps guests_;
  Suspects suspects_;
  ResumeMap resume_;
  Journal journal_;                  // of a pivoted disk
  std::multimap<Time, OpId> paced_;  // writes whose answer is held back, by when it is due
  std::deque<OpId> held_;            // writes that wait for the switchover's outcome, in order
  std::unique_ptr<Migration> migration_;
  std::unique_ptr<Pivoted> pivoted_;
  std::optional<Start> queued_start_;
  // Of one that was cancelled while it was queued: the edge has put it in the place of the earlier one.
  std::optional<std::span<std::byte>> orphan_state_;
};

// --- the guest's requests ---

void EngineState::on(GuestRequest&& request) {
  const OpId id = context_.new_op(OpKind::guest);
  std::uint64_t align = context_.config.source_align;
  if (migration_ && !migration_->ended()) align = std::max(align, migration_->order_alignment());
  GuestOp& op = guests_.add(id, std::move(request), align);
  if (GuestOps::runnable(op)) run(op);
}

void EngineState::run(GuestOp& op) {
  const bool pivoted = serving_ == Serving::target;
  if (serving_ == Serving::nobody || (pivoted && op.command == Command::checksum)) {
    op.source_done = true;
    op.result = pivoted ? IoError::not_supported : IoError::shutdown;
    context_.settle.push_back(op.id);
  } else if (is_write(op.command)) {
    run_write(op);
  } else if (pivoted) {
    pivoted_->submit(op);
  } else {
    submit_to_source(op);
  }
}

void EngineState::run_write(GuestOp& op) {
  if (holding() && !NBDFERRY_MUTANT(seal_does_not_hold)) {
    held_.push_back(op.id);
    return;
  }
  guests_.admit(op, context_.now);
  if (serving_ == Serving::target) {
    pivoted_->submit(op);
    return;
  }
  // Rule 2: once, here, after any wait.
  resume_.touch(op.range);
  if (migration_ && !NBDFERRY_MUTANT(classify_never)) migration_->classify(op);
  submit_to_source(op);
}

void EngineState::submit_to_source(GuestOp& op) {
  op.submitted_at = context_.now;
  DiskOp disk;
  disk.id = op.id;
  disk.command = op.command;
  disk.range = op.range;
  disk.payload = op.payload;
  disk.fua = op.fua;
  disk.may_hole = !op.no_hole;
  disk.fast_only = op.fast_zero;
  context_.submit_source(std::move(disk));
}

void EngineState::on(SourceDone&& event) {
  if (Context::kind_of(event.id) != OpKind::guest) {
    if (migration_) migration_->source_done(std::move(event));
    return;
  }
  GuestOp* op = guests_.find(event.id);
  NBDFERRY_ASSERT(op != nullptr && !op->source_done, "an answer to no guest request");
  op->source_done = true;
  op->result = event.error;
  op->data = std::move(event.data);
  op->extents = std::move(event.extents);
  op->checksum = event.checksum;
  const bool io = op->command == Command::read || op->command == Command::write;
  if (io && migration_) migration_->guest_waited(context_.now - op->submitted_at);
  if (is_write(op->command) && migration_) {
    migration_->source_answered(*op, event.error, event.changed);
    migration_->source_progress();
  }
  context_.settle.push_back(op->id);
}

// Replies when nothing is waited for, and forgets the request when nothing of it is under way.
void EngineState::settle(OpId id) {
  GuestOp* op = guests_.find(id);
  if (op == nullptr || !op->source_done) return;
  const bool waits = op->waits_for_target && (op->pieces != 0 || op->readbacks != 0);
  if (!waits && !op->replied && !paced(*op)) reply(*op);
  if (!op->replied || op->pieces != 0 || op->readbacks != 0) return;
  for (const OpId next : guests_.remove(id)) run(*guests_.find(next));
}

// The answer of a write is due so long after its admission, at the earliest.
bool EngineState::paced(GuestOp& op) {
  if (!is_write(op.command) || op.result != IoError::none || !migration_) return false;
  if (op.reply_at == Time{0}) {
    const int factor = NBDFERRY_MUTANT(pacing_without_cap) ? 100 : 1;
    op.reply_at = op.submitted_at + factor * migration_->pacing_delay();
    if (op.reply_at > context_.now) {
      ++context_.counters.paced_writes;
      paced_.emplace(op.reply_at, op.id);
    }
  }
  return op.reply_at > context_.now;
}

// Those that are due, or all when pacing is over.
void EngineState::release_paced() {
  const bool over = !migration_ || migration_->pacing_delay() == Duration{0};
  while (!paced_.empty() && (over || paced_.begin()->first <= context_.now)) {
    const OpId id = paced_.begin()->second;
    paced_.erase(paced_.begin());
    guests_.find(id)->reply_at = context_.now;
    context_.settle.push_back(id);
  }
}

void EngineState::reply(GuestOp& op) {
  op.replied = true;
  const bool flushed = op.command == Command::flush || (op.fua && is_write(op.command));
  if (flushed && op.result == IoError::none && migration_) migration_->barrier();
  Reply r;
  r.id = op.request;
  r.error = op.result;
  r.data = std::move(op.data);
  r.extents = std::move(op.extents);
  r.checksum = op.checksum;
  context_.out->emplace_back(std::move(r));
}

// --- after each event ---

void EngineState::after_event() {
  do {
    if (!paced_.empty()) release_paced();
    for (std::size_t i = 0; i < context_.settle.size(); ++i) settle(context_.settle[i]);
    context_.settle.clear();
    if (migration_ && serving_ == Serving::source && !migration_->ended() &&
        migration_->switchover().state() == Switchover::State::committed) {
      switched_over();
    }
    if (!holding() && !held_.empty()) {
      const std::deque<OpId> held = std::exchange(held_, {});
      for (const OpId id : held) run(*guests_.find(id));
    }
    if (pivoted_) {
      pivoted_->pump();
    } else if (migration_) {
      migration_->pump();
    }
  } while (!context_.settle.empty() || (!holding() && !held_.empty()));
}

void EngineState::switched_over() {
  const bool pivot = migration_->switchover().kind() == SwitchKind::pivot;
  if (pivot) {
    serving_ = Serving::target;
    TargetInfo info = migration_->info();
    info.can_zero = migration_->can_zero();
    pivoted_ = std::make_unique<Pivoted>(context_, guests_, resume_, journal_,
                                         migration_->options(), info, migration_->window());
    if (!migration_->link_up()) pivoted_->target_lost("during the commit");
    if (const auto& why = migration_->refused()) pivoted_->target_refused(*why);
    for (const auto& path : migration_->proof().waiting()) pivoted_->path_found(path);
    migration_->verifier().stop("switched over");
    context_.notice("switched over: the target serves from now on");
  } else {
    serving_ = Serving::nobody;
    context_.notice("switched over: released, this disk is fenced");
    migration_->end(Phase::switched, {});
  }
}

void EngineState::on(RecordWritten&& event) { migration_->switchover().record_written(event); }

void EngineState::on(Tick&&) {
  if (pivoted_) {
    pivoted_->tick();
  } else if (migration_ && !migration_->closed()) {
    migration_->tick();
  } else {
    for (const auto& r : suspects_.expire(context_.now)) {
      resume_.settle_but(r, [&](ByteRange chunk) { return suspects_.any(chunk); });
    }
  }
}

// --- operator ---

void EngineState::on(Start&& event) {
  std::string why;
  if (serving_ == Serving::target) {
    why = "the disk has been pivoted: its target serves";
  } else if (serving_ == Serving::nobody) {
    why = "the disk is fenced: another host owns it (unfence it first if that is wrong)";
  } else if (queued_start_ || (migration_ && !migration_->ended())) {
    why = "a migration is running (cancel it first)";
  }
  if (!why.empty()) {
    context_.done(event.command, false, "cannot migrate: " + why);
    return;
  }
  if (migration_ && !migration_->closed()) {
    // What the earlier one has sent may land late in this one's time.
    keep_beside(event.state);
    orphan_state_.reset();
    queued_start_ = std::move(event);  // the earlier one's connections are being let go
    return;
  }
  start(event);
}

void EngineState::start(const Start& event) {
  keep_beside(event.state);
  keep(event.state);
  migration_ = std::make_unique<Migration>(context_, guests_, suspects_, resume_, event);
}

void EngineState::on(Cancel&& e) {
  if (queued_start_) {
    context_.done(queued_start_->command, false, "cancelled");
    orphan_state_ = queued_start_->state;
    context_.out->emplace_back(Ended{});
    queued_start_.reset();
    context_.done(e.command, true);
    return;
  }
  with_migration(e.command, [&] { migration_->cancel(e.command); });
}

void EngineState::on(Suspend&& e) {
  if (migration_ && !migration_->ended() && !pivoted_) migration_->suspend();
  context_.done(e.command, true);
}

void EngineState::on(Unfence&& e) {
  if (serving_ == Serving::target) {
    context_.done(e.command, false, "cannot unfence: the target serves");
    return;
  }
  serving_ = Serving::source;
  context_.done(e.command, true);
}

Status EngineState::status() const {
  Status s;
  s.serving = serving_;
  s.size_bytes = context_.config.size;
  if (migration_) migration_->report(s);
  if (pivoted_) pivoted_->report(s);
  if (queued_start_) s.phase = Phase::queued;
  s.held_requests = held_.size();
  return s;
}

// --- the border ---

Engine::Engine(const EngineConfig& config) : state_(std::make_unique<EngineState>(config)) {}
Engine::~Engine() = default;
void Engine::apply(Event&& event, Time now, Actions& out) {
  state_->apply(std::move(event), now, out);
}
Status Engine::status() const { return state_->status(); }
const Counters& Engine::counters() const { return state_->counters(); }
bool Engine::nobody_waits_for(OpId op) {
  const OpKind kind = Context::kind_of(op);
  return kind == OpKind::copy || kind == OpKind::hint || kind == OpKind::verify;
}
bool Engine::guest_waits_for_copy() const { return state_->guest_waits_for_copy(); }
bool Engine::wants_ticks() const { return state_->wants_ticks(); }
std::uint64_t Engine::open_requests() const { return state_->open_requests(); }
void Engine::check_invariants() const { state_->check_invariants(); }

}  // namespace nbdferry::mirror
