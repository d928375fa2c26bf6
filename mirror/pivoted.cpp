#include "mirror/pivoted.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "mirror/assert.hpp"
#include "mirror/ranges.hpp"

namespace nbdferry::mirror {

namespace {

constexpr Duration replay_retry = std::chrono::milliseconds(200);
constexpr Duration reopen_pause = std::chrono::seconds(1);
// Of a retained write beside its data, so that zeroes are bounded, too.
constexpr std::uint64_t retained_overhead = 128;

}  // namespace

Pivoted::Pivoted(Context& context, GuestOps& guests, ResumeMap& resume, Journal& journal,
                 const MigrateOptions& options, const TargetInfo& info, const TargetWindow& window)
    : context_(context),
      guests_(guests),
      resume_(resume),
      journal_(journal),
      options_(options),
      info_(info),
      window_(window) {
  in_flight_.set_window(window.window_ops, window.window_bytes);
  in_flight_.set_alignment(std::max<std::uint64_t>(block_size_min, info.block_min));
}

Pivoted::Pivoted(Context& context, GuestOps& guests, ResumeMap& resume, Journal& journal,
                 const ServeTarget& event)
    : context_(context),
      guests_(guests),
      resume_(resume),
      journal_(journal),
      options_(event.options),
      link_up_(false),
      met_(false),
      lost_at_(context.now),
      flush_wanted_(!event.journaled) {
  info_.incoming = event.incoming;
  for (auto& r : journal.records()) {
    if (NBDFERRY_MUTANT(journal_ignored)) break;
    keep({r.range, r.command, std::move(r.payload), r.may_hole, std::move(r.slots)});
  }
  if (!NBDFERRY_MUTANT(pivot_restart_no_quarantine)) {
    for (const auto& r : resume.sent()) {
      quarantines_.push_back({r, context.now + options_.quarantine});
    }
  }
  context_.out->emplace_back(OpenTarget{});
}

void Pivoted::settle(ByteRange range) {
  resume_.settle_but(
      range, [&](ByteRange chunk) { return in_flight_.writes_in(chunk) || in_quarantine(chunk); });
}

// --- requests ---

void Pivoted::submit(GuestOp& op) {
  if (!link_up_ && context_.now - lost_at_ >= options_.reconnect_delay) {
    complete(op.id, IoError::io);
    return;
  }
  Request request;
  request.sent_until = op.range.begin;
  if (op.command == Command::read) request.data = Buffer(op.range.length());
  requests_.emplace(op.id, std::move(request));
  pending_.push_back(op.id);
}

void Pivoted::complete(OpId guest, IoError error) {
  GuestOp* op = guests_.find(guest);
  NBDFERRY_ASSERT(op != nullptr, "an answer to a guest request that is gone");
  requests_.erase(guest);
  op->source_done = true;
  op->result = error;
  context_.settle.push_back(guest);
}

bool Pivoted::in_quarantine(ByteRange range) const {
  return std::any_of(quarantines_.begin(), quarantines_.end(),
                     [&](const Quarantine& q) { return q.range.overlaps(range); });
}

std::uint64_t Pivoted::piece_bytes(Command command) const {
  if (command == Command::block_status) return std::numeric_limits<std::uint32_t>::max() & ~4095U;
  const Limits& limits = context_.config.limits;
  const std::uint64_t align = std::max<std::uint64_t>(block_size_min, info_.block_min);
  // Zeroes, too, so that they can go as data if need be.
  std::uint64_t most = info_.payload_max;
  if (command == Command::trim || command == Command::zero) {
    most = std::min(most, limits.zero_piece_bytes);
  }
  // So that the journal has room for some.
  if (command == Command::write && journal_.kept()) {
    most = std::min(most, journal_.slots() / 4 * Journal::slot_bytes);
  }
  return std::max(align, most / align * align);
}

// True when all of it has been sent: it no longer is pending.
bool Pivoted::try_submit(GuestOp& op) {
  Request& request = requests_.at(op.id);
  if (op.command == Command::flush || request.wants_flush) return try_flush(op);
  if (op.command == Command::cache) {
    complete(op.id, IoError::none);
    return true;
  }
  if (op.command == Command::zero && op.fast_zero) {
    complete(op.id, IoError::not_supported);
    return true;
  }
  if (op.command == Command::block_status && !info_.has_allocation) {
    op.extents = {Extent{op.range.length(), false, false}};
    complete(op.id, IoError::none);
    return true;
  }
  return try_pieces(op, request);
}

bool Pivoted::try_flush(GuestOp& op) {
  if (failed_ != 0) {
    // What the guest believes to be written could not be: this is where it must learn it.
    complete(op.id, IoError::io);
    start_replay(true);
    return true;
  }
  if (std::exchange(loss_unreported_, false)) {
    complete(op.id, IoError::io);
    return true;
  }
  if (!in_flight_.has_room(0)) return false;
  submit_flush(op.id);
  return true;
}

// Is there room for it, when it has been answered?
bool Pivoted::may_retain(Command command, ByteRange piece) const {
  if (retained_bytes_ >= options_.buffer_bytes) return false;
  return !journal_.kept() ||
         slots_reserved_ + Journal::slots_for(command, piece) <= journal_.free_slots();
}

bool Pivoted::try_pieces(GuestOp& op, Request& request) {
  if (request.again) {
    if (request.in_flight != 0) return false;
    request.again = false;
    request.sent_until = op.range.begin;
  }
  const bool writes = is_write(op.command);
  const std::uint64_t most = piece_bytes(op.command);
  const std::uint64_t align = std::max<std::uint64_t>(block_size_min, info_.block_min);
  while (request.sent_until < op.range.end) {
    const std::uint64_t border = (request.sent_until + most) / align * align;
    const ByteRange piece{request.sent_until, std::min(border, op.range.end)};
    if (writes && !may_retain(op.command, piece)) return false;
    const bool data =
        op.command == Command::read || op.command == Command::write || (writes && !info_.can_zero);
    const bool room = in_flight_.has_room(data ? piece.length() : 0);
    if (!room || in_flight_.conflict(piece)) return false;
    submit_piece(op, request, piece);
    // Status may be answered for a part: the first is enough.
    if (op.command == Command::block_status) request.sent_until = op.range.end;
  }
  return true;
}

void Pivoted::submit_piece(GuestOp& op, Request& request, ByteRange piece) {
  DiskOp disk;
  disk.id = context_.new_op(OpKind::guest);
  disk.command = op.command == Command::trim ? Command::zero : op.command;
  disk.range = piece;
  if (op.command == Command::write) {
    disk.payload = op.payload.slice(piece.begin - op.range.begin, piece.length());
  }
  disk.fua = op.fua && info_.can_fua;
  disk.may_hole = op.command == Command::trim || !op.no_hole;
  disk.as_data = disk.command == Command::zero && !info_.can_zero;
  const bool data = disk.command == Command::read || disk.command == Command::write || disk.as_data;
  in_flight_.add({disk.id,
                  OpKind::guest,
                  disk.command,
                  piece,
                  data ? piece.length() : 0,
                  0,
                  std::nullopt,
                  false,
                  op.id,
                  {context_.now}});
  ++request.in_flight;
  request.sent_until = piece.end;
  if (is_write(disk.command)) {
    resume_.send(piece);
    slots_reserved_ += Journal::slots_for(disk.command, piece);
  }
  context_.submit_target(std::move(disk));
}

void Pivoted::submit_flush(std::optional<OpId> guest) {
  DiskOp disk;
  disk.id = context_.new_op(OpKind::flush);
  disk.command = Command::flush;
  flush_cuts_.emplace(disk.id, acknowledged_);
  if (!guest) own_flush_ = true;
  in_flight_.add(
      {disk.id, OpKind::flush, Command::flush, {}, 0, 0, guest, false, {}, {context_.now}});
  context_.submit_target(std::move(disk));
}

void Pivoted::pump() {
  if (!link_up_) return;
  if (replays_left_ != 0) {
    pump_replay();
    return;
  }
  for (auto it = pending_.begin(); it != pending_.end() && serving();) {
    // try_submit() only ever completes or sends: it never changes pending_.
    it = try_submit(*guests_.find(*it)) ? pending_.erase(it) : it + 1;
  }
  const bool much = retained_bytes_ >= options_.buffer_bytes / 2 ||
                    (journal_.kept() && 2 * journal_.free_slots() < journal_.slots());
  // What a quarantine holds back no flush releases.
  const bool helps = acknowledged_ > flushed_up_to_;
  const bool wanted = flush_wanted_ || (much && helps);
  if (serving() && wanted && !own_flush_ && in_flight_.has_room(0)) {
    submit_flush(std::nullopt);
  }
}

// --- answers ---

void Pivoted::target_done(TargetDone&& event) {
  const TargetOp op = in_flight_.remove(event.id);
  if (event.error != IoError::lost) answered_at_ = context_.now;
  // It was not done, and will not be: by the next server, then.
  const bool leaving = event.error == IoError::shutdown;
  if (leaving) event.error = IoError::lost;
  if (event.error == IoError::lost && !leaving && is_write(op.command) &&
      !NBDFERRY_MUTANT(pivot_no_quarantine)) {
    quarantines_.push_back({op.range, context_.now + options_.quarantine});
  }
  if (is_write(op.command)) settle(op.range);
  switch (op.kind) {
    case OpKind::guest:
      guest_done(op, std::move(event));
      break;
    case OpKind::flush:
      flush_done(op, event.error);
      break;
    case OpKind::replay:
      replay_done(op, event.error);
      break;
    default:
      NBDFERRY_ASSERT(false, "an answer of an unknown kind");
  }
}

// A target that says it can zero, and fails to: it gets data from now on.
bool Pivoted::zeroes_as_data(const TargetOp& failed) {
  if (failed.command != Command::zero || failed.window_bytes != 0) return false;
  if (std::exchange(info_.can_zero, false)) {
    context_.notice("the target failed to zero: zeroes are sent to it as data");
  }
  return true;
}

void Pivoted::guest_done(const TargetOp& op, TargetDone&& event) {
  GuestOp* guest = guests_.find(op.parent);
  NBDFERRY_ASSERT(guest != nullptr, "a guest request ended before its answer");
  Request& request = requests_.at(op.parent);
  --request.in_flight;
  if (is_write(op.command)) slots_reserved_ -= Journal::slots_for(op.command, op.range);
  if (event.error == IoError::lost) {
    request.again = true;
  } else if (event.error != IoError::none && zeroes_as_data(op)) {
    request.again = true;
  } else if (event.error != IoError::none) {
    request.error = event.error;
  } else if (is_write(op.command)) {
    retain(*guest, op.range);
  } else if (op.command == Command::read) {
    std::byte* to = request.data.data() + (op.range.begin - guest->range.begin);
    std::memcpy(to, event.data.data(), op.range.length());
    overlay(op.range, to);
  } else {
    guest->extents = std::move(event.extents);
    if (may_differ(op.range)) guest->extents = {Extent{op.range.length(), false, false}};
  }
  if (request.in_flight != 0) return;
  if (request.again) {
    // It is pending still if not all of it had been sent. Overlapping writes never run together, so
    // its place among the pending ones does not matter.
    if (request.sent_until == guest->range.end) pending_.push_front(guest->id);
    request.sent_until = guest->range.begin;
    return;
  }
  if (request.sent_until != guest->range.end) return;
  if (request.error == IoError::none && is_write(guest->command) && guest->fua && !info_.can_fua) {
    request.wants_flush = true;
    pending_.push_front(guest->id);
    return;
  }
  guest->data = std::move(request.data).freeze();
  complete(op.parent, request.error);
}

// A late write of a lost connection may stand on the target, or a replay may have failed: what we
// retain is what was written.
void Pivoted::overlay(ByteRange range, std::byte* data) const {
  // Elsewhere the target has it. A replay that was needed can't have ended during this read: it
  // would have overlapped.
  if (failed_ == 0 && quarantines_.empty() && replays_left_ == 0) return;
  for (const auto& r : retained_) {
    if (!r.range.overlaps(range)) continue;
    const ByteRange part = r.range.intersect(range);
    std::byte* to = data + (part.begin - range.begin);
    if (r.command == Command::write) {
      std::memcpy(to, r.payload.data() + (part.begin - r.range.begin), part.length());
    } else {
      std::memset(to, 0, part.length());
    }
  }
}

void Pivoted::retain(const GuestOp& op, ByteRange piece) {
  Retained r;
  r.range = piece;
  r.command = op.command == Command::write ? Command::write : Command::zero;
  if (op.command == Command::write) {
    r.payload = op.payload.slice(piece.begin - op.range.begin, piece.length());
  }
  r.may_hole = op.command == Command::trim || !op.no_hole;
  r.number = ++acknowledged_;
  // An older write of the same range may be about to be written again: then so must this one.
  r.replaying = replays_left_ != 0;
  if (r.replaying) ++replays_left_;
  // Before what it replaces is removed.
  if (!NBDFERRY_MUTANT(journal_after_reply)) write_journal(r);
  if (!quarantines_.empty() || failed_ != 0) {
    // What is held back by a quarantine, or could not be written, is at least held once only.
    std::erase_if(retained_, [&](const Retained& old) {
      if (!piece.contains(old.range) || old.replaying) return false;
      if (old.failed) --failed_;
      forget(old);
      return true;
    });
  }
  keep(std::move(r));
  if (retained_.back().replaying && replay_next_ == retained_.end()) --replay_next_;
}

void Pivoted::write_journal(Retained& r) {
  if (journal_.kept()) r.slots = journal_.add(r.command, r.range, r.may_hole, r.payload.data());
}

void Pivoted::keep(Retained&& r) {
  retained_bytes_ += retained_overhead + r.payload.size();
  retained_.push_back(std::move(r));
}

void Pivoted::forget(const Retained& r) {
  retained_bytes_ -= retained_overhead + r.payload.size();
  journal_.remove(r.slots);
}

void Pivoted::release(std::uint64_t up_to) {
  // What is newer than something that stays, and overlaps it, stays with it: the older one alone
  // would be read, and written again, over the newer one's bytes.
  RangeSet kept;
  std::erase_if(retained_, [&](Retained& r) {
    const bool stays = r.number > up_to || r.replaying || r.failed || in_quarantine(r.range) ||
                       kept.overlaps(r.range);
    if (stays) {
      if (NBDFERRY_MUTANT(journal_freed_early)) journal_.remove(std::exchange(r.slots, {}));
      kept.add(r.range);
      return false;
    }
    forget(r);
    return true;
  });
}

void Pivoted::flush_done(const TargetOp& op, IoError error) {
  const std::uint64_t cut = flush_cuts_.at(op.id);
  flush_cuts_.erase(op.id);
  const std::optional<OpId> guest = op.waiter;
  if (!guest) own_flush_ = false;
  if (error == IoError::none) {
    flushed_up_to_ = std::max(flushed_up_to_, cut);
    flush_wanted_ = false;
    release(cut);
  } else {
    if (error != IoError::lost && std::exchange(flush_wanted_, false)) loss_unreported_ = true;
    write_all_again();  // another flush would not say that it was not written
  }
  if (error == IoError::lost) {
    if (guest) pending_.push_front(*guest);
    return;
  }
  const bool again = replays_left_ != 0 || failed_ != 0 || replayed_ > cut;
  if (guest && error == IoError::none && again) {
    pending_.push_front(*guest);  // what is written again may stand on the medium half done
    return;
  }
  if (guest) complete(*guest, error);
}

// --- loss and replay ---

// Something was not written, perhaps. What is in flight, too, for the server may have it already.
void Pivoted::write_all_again() {
  in_flight_.for_each([&](const TargetOp& o) {
    if (o.kind == OpKind::guest && is_write(o.command)) requests_.at(o.parent).again = true;
  });
  start_replay(true);
}

// No block is to spare for a proof: the guest's data is there. One that was proved before is the one that
// it was as far as a target is that comes back.
void Pivoted::path_found(const PathFound& event) {
  if (!link_up_) return;
  if (event.known && !NBDFERRY_MUTANT(pivot_forgets_paths)) {
    context_.out->emplace_back(UsePath{event.path});
  } else {
    context_.out->emplace_back(RefusePath{
        event.path, "after a pivot it can't be proved that it leads to the same export"});
  }
}

void Pivoted::path_lost(const PathLost& event) {
  if (!link_up_) return;
  last_error_ = "a path to the target was lost: " + event.reason;
  context_.notice(last_error_);
  if (event.unflushed && !NBDFERRY_MUTANT(pivot_path_loss_keeps_unflushed)) write_all_again();
}

void Pivoted::path_refused(const std::string& reason) {
  last_error_ = reason;
  context_.notice(reason);
}

void Pivoted::target_lost(const std::string& reason) {
  link_up_ = false;
  lost_at_ = context_.now;
  loss_unreported_ = loss_unreported_ || flush_wanted_;
  last_error_ = "the target was lost: " + reason;
  context_.notice(last_error_ + " (requests wait for it)");
}

void Pivoted::target_refused(const std::string& reason) {
  if (link_up_) target_lost(reason);
  last_error_ = reason;
  reopen_at_ = context_.now + reopen_pause;
}

void Pivoted::target_closed() {
  if (link_up_) target_lost("the connections were closed");
  reopen_at_ = context_.now + reopen_pause;
}

// Why it is not the one that we left; or empty.
std::string Pivoted::check_target(const TargetInfo& info) const {
  // Somebody else may write there. What is retained is not to go over that.
  if (info_.incoming && !info.incoming) {
    return "the target takes anybody's writes now: it was promoted meanwhile, or is another one: "
           "connect its guest to it directly";
  }
  const bool blocks_fit = met_ ? info.block_min == info_.block_min
                               : info.block_min <= context_.config.promised_block_min;
  const bool takes_all = std::all_of(retained_.begin(), retained_.end(), [&](const Retained& r) {
    return r.range.length() <= info.payload_max;
  });
  if (info.size < context_.config.size || info.read_only || !info.can_flush || !blocks_fit ||
      !takes_all) {
    return "the target came back as another export: smaller, read-only, without flush, or for "
           "other "
           "lengths of requests";
  }
  return {};
}

void Pivoted::target_up(const TargetUp& event) {
  if (const std::string why = check_target(event.info); !why.empty()) {
    if (last_error_ != why) context_.notice(why);
    last_error_ = why;
    context_.out->emplace_back(CloseTarget{});
    return;
  }
  const bool zeroes = !met_ || info_.can_zero;
  info_ = event.info;
  info_.can_zero = info_.can_zero && zeroes;
  target_window({event.window_ops, event.window_bytes});
  link_up_ = true;
  context_.notice(met_ ? "the target is back" : "the target serves");
  if (!met_) in_flight_.set_alignment(std::max<std::uint64_t>(block_size_min, info_.block_min));
  met_ = true;
  if (info_.fenced) {
    quarantines_.clear();
    resume_.settle({0, context_.config.size});
  }
  if (!NBDFERRY_MUTANT(pivot_no_replay)) start_replay(true);
}

void Pivoted::target_window(const TargetWindow& event) {
  window_ = event;
  in_flight_.set_window(event.window_ops, event.window_bytes);
}

void Pivoted::start_replay(bool all) {
  replays_left_ = 0;
  RangeSet again;
  for (auto& r : retained_) {
    // With it all that came later on top of it, even if it is just being written again.
    const bool wanted = all || in_quarantine(r.range) || again.overlaps(r.range);
    r.repeat = r.repeat || (wanted && r.sent);
    r.replaying = r.replaying || wanted;
    if (!r.replaying) continue;
    ++replays_left_;
    if (!all) again.add(r.range);
  }
  replay_next_ = retained_.begin();
  seek_replay();
}

void Pivoted::seek_replay() {
  while (replay_next_ != retained_.end() && (!replay_next_->replaying || replay_next_->sent)) {
    ++replay_next_;
  }
}

void Pivoted::pump_replay() {
  // In order: one that must wait stops those behind it.
  for (; replay_next_ != retained_.end(); seek_replay()) {
    Retained& r = *replay_next_;
    const bool as_data = r.command == Command::zero && !info_.can_zero;
    const bool data = r.command == Command::write || as_data;
    const std::uint64_t bytes = data ? r.range.length() : 0;
    if (in_flight_.conflict(r.range) || !in_flight_.has_room(bytes)) return;
    DiskOp disk;
    disk.id = context_.new_op(OpKind::replay);
    disk.command = r.command;
    disk.range = r.range;
    disk.payload = r.payload;
    disk.may_hole = r.may_hole;
    disk.as_data = as_data;
    replays_.emplace(disk.id, replay_next_);
    r.sent = true;
    in_flight_.add({disk.id,
                    OpKind::replay,
                    disk.command,
                    disk.range,
                    bytes,
                    0,
                    std::nullopt,
                    false,
                    {},
                    {context_.now}});
    ++context_.counters.replayed_writes;
    resume_.send(disk.range);
    context_.submit_target(std::move(disk));
  }
}

void Pivoted::replay_done(const TargetOp& op, IoError error) {
  const auto it = replays_.at(op.id);
  replays_.erase(op.id);
  NBDFERRY_ASSERT(it->replaying && it->sent, "a retained write was replayed that need not be");
  it->sent = false;
  if (const bool repeat = std::exchange(it->repeat, false); error == IoError::lost || repeat) {
    replay_next_ = retained_.begin();  // it stays to be replayed
    seek_replay();
    return;
  }
  --replays_left_;
  it->replaying = false;
  if (error == IoError::none && std::exchange(it->failed, false)) --failed_;
  it->number = replayed_ = ++acknowledged_;  // only a flush that is submitted from now on covers it
  if (error != IoError::none) {
    (void)zeroes_as_data(op);
    if (!it->failed) ++failed_;
    it->failed = true;
    last_error_ = "a write could not be replayed: " + std::string(to_string(error));
    context_.notice(last_error_);
  }
}

void Pivoted::fail_pending() {
  for (const OpId id : std::exchange(pending_, {})) complete(id, IoError::io);
}

void Pivoted::tick() {
  if (NBDFERRY_MUTANT(journal_after_reply)) {
    for (auto& r : retained_) {
      if (r.slots.empty() && may_retain(r.command, r.range)) write_journal(r);
    }
  }
  if (reopen_at_ && context_.now >= *reopen_at_) {
    reopen_at_.reset();
    context_.out->emplace_back(OpenTarget{});
  }
  if (!link_up_ && context_.now - lost_at_ >= options_.reconnect_delay) fail_pending();
  if (failed_ != 0 && serving() && context_.now >= retry_at_) {
    retry_at_ = context_.now + replay_retry;
    start_replay(true);
  }
  if (!link_up_ || quarantines_.empty()) return;
  const bool over = std::any_of(quarantines_.begin(), quarantines_.end(),
                                [&](const Quarantine& q) { return q.until <= context_.now; });
  if (!over) return;
  // A write that is under way may have been done before something late landed on it: do it again.
  in_flight_.for_each([&](const TargetOp& o) {
    if (o.kind == OpKind::guest && is_write(o.command) && in_quarantine(o.range)) {
      requests_.at(o.parent).again = true;
    }
  });
  // Nothing late can land any more: put what was written on top of what may have landed.
  start_replay(false);
  std::vector<ByteRange> ended;
  std::erase_if(quarantines_, [&](const Quarantine& q) {
    if (q.until > context_.now) return false;
    ended.push_back(q.range);
    return true;
  });
  for (const auto& r : ended) settle(r);
}

void Pivoted::report(Status& s) const {
  s.phase = Phase::switched;
  s.buffered_bytes = retained_bytes_;
  s.last_error = last_error_;
  s.target_silent = in_flight_.silence(context_.now, answered_at_);
  std::uint64_t suspect = 0;
  for (const auto& q : quarantines_) suspect += q.range.length();
  s.suspect_bytes = suspect;
  s.quarantine_left = Duration{0};
  for (const auto& q : quarantines_) {
    s.quarantine_left = std::max(s.quarantine_left, q.until - context_.now);
  }
}

}  // namespace nbdferry::mirror
