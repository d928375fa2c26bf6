#include "mirror/pivoted.hpp"

#include <algorithm>
#include <cstring>

#include "mirror/assert.hpp"

namespace nbdferry::mirror {

Pivoted::Pivoted(Context& context, GuestOps& guests, const MigrateOptions& options,
                 const TargetInfo& info, const TargetWindow& window)
    : context_(context), guests_(guests), options_(options), info_(info), window_(window) {
  in_flight_.set_window(window.window_ops, window.window_bytes);
  in_flight_.set_alignment(std::max<std::uint64_t>(block_size_min, info.block_min));
}

// --- requests
// -------------------------------------------------------------------------------------

void Pivoted::submit(GuestOp& op) {
  if (!link_up_ && context_.now - lost_at_ >= options_.reconnect_delay) {
    complete(op.id, IoError::io);
    return;
  }
  pending_.push_back(op.id);
}

void Pivoted::complete(OpId guest, IoError error) {
  GuestOp* op = guests_.find(guest);
  NBDFERRY_ASSERT(op != nullptr, "an answer to a guest request that is gone");
  op->source_done = true;
  op->result = error;
  context_.settle.push_back(guest);
}

bool Pivoted::in_quarantine(ByteRange range) const {
  return std::any_of(quarantines_.begin(), quarantines_.end(),
                     [&](const Quarantine& q) { return q.range.overlaps(range); });
}

// False: not now. Then it stays pending.
bool Pivoted::try_submit(GuestOp& op) {
  if (op.command == Command::flush || op.needs_flush) {
    if (replay_failed_) {
      // What the guest believes to be written could not be: this is where it must learn it.
      replay_failed_ = false;
      complete(op.id, IoError::io);
      start_replay(true);
      return true;
    }
    if (!in_flight_.has_room(0)) return false;
    submit_flush(op.id);
    return true;
  }
  if (op.command == Command::cache) {
    complete(op.id, IoError::none);
    return true;
  }
  if (op.command == Command::zero && op.fast_zero) {
    complete(op.id, IoError::not_supported);
    return true;
  }
  const bool writes = is_write(op.command);
  if (writes && retained_bytes_ >= options_.buffer_bytes) return false;
  const bool data =
      op.command == Command::read || op.command == Command::write || (writes && !info_.can_zero);
  const std::uint64_t bytes = data ? op.range.length() : 0;
  if (in_flight_.conflict(op.range) || !in_flight_.has_room(bytes)) return false;
  DiskOp disk;
  disk.id = context_.new_op(OpKind::guest);
  disk.command = op.command == Command::trim ? Command::zero : op.command;
  disk.range = op.range;
  disk.payload = op.payload;
  disk.fua = op.fua && info_.can_fua;
  disk.may_hole = op.command == Command::trim || !op.no_hole;
  in_flight_.add({disk.id, OpKind::guest, disk.command, disk.range, bytes, 0, std::nullopt, op.id});
  context_.submit_target(std::move(disk));
  return true;
}

void Pivoted::submit_flush(std::optional<OpId> guest) {
  DiskOp disk;
  disk.id = context_.new_op(OpKind::flush);
  disk.command = Command::flush;
  flush_cuts_.emplace(disk.id, acknowledged_);
  if (!guest) own_flush_ = true;
  in_flight_.add({disk.id, OpKind::flush, Command::flush, {}, 0, 0, guest, {}});
  context_.submit_target(std::move(disk));
}

void Pivoted::pump() {
  if (!link_up_) return;
  if (replays_left_ != 0) {
    pump_replay();
    return;
  }
  for (auto it = pending_.begin(); it != pending_.end() && serving();) {
    GuestOp* op = guests_.find(*it);
    if (op == nullptr || try_submit(*op)) {
      it = pending_.erase(it);
    } else {
      ++it;
    }
  }
  const bool much = retained_bytes_ >= options_.buffer_bytes / 2;
  if (serving() && much && !own_flush_ && in_flight_.has_room(0)) submit_flush(std::nullopt);
}

// --- answers
// --------------------------------------------------------------------------------------

void Pivoted::target_done(TargetDone&& event) {
  const TargetOp op = in_flight_.remove(event.id);
  if (event.error == IoError::lost && is_write(op.command) &&
      !NBDFERRY_MUTANT(pivot_no_quarantine)) {
    quarantines_.push_back({op.range, context_.now + options_.quarantine});
  }
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

void Pivoted::guest_done(const TargetOp& op, TargetDone&& event) {
  GuestOp* guest = guests_.find(op.parent);
  NBDFERRY_ASSERT(guest != nullptr, "a guest request ended before its answer");
  if (event.error == IoError::lost) {
    // Overlapping writes never run together, so its place among the pending ones does not matter.
    pending_.push_front(op.parent);
    return;
  }
  if (event.error == IoError::none) {
    if (is_write(op.command)) {
      retain(*guest);
      if (guest->fua && !info_.can_fua) {
        guest->needs_flush = true;
        pending_.push_front(guest->id);
        return;
      }
    } else if (op.command == Command::read) {
      overlay(*guest, std::move(event.data));
    } else if (op.command == Command::block_status) {
      guest->extents = std::move(event.extents);
      if (in_quarantine(op.range)) guest->extents = {Extent{op.range.length(), false, false}};
    }
  }
  complete(op.parent, event.error);
}

// A late write of a lost connection may stand on the target: what we retain is what was written.
void Pivoted::overlay(GuestOp& op, Payload data) {
  op.data = std::move(data);
  if (!in_quarantine(op.range)) return;
  Buffer merged(op.data.size());
  std::memcpy(merged.data(), op.data.data(), op.data.size());
  for (const auto& r : retained_) {
    if (!r.range.overlaps(op.range)) continue;
    const ByteRange part = r.range.intersect(op.range);
    std::byte* to = merged.data() + (part.begin - op.range.begin);
    if (r.command == Command::write) {
      std::memcpy(to, r.payload.data() + (part.begin - r.range.begin), part.length());
    } else {
      std::memset(to, 0, part.length());
    }
  }
  op.data = std::move(merged).freeze();
}

void Pivoted::retain(const GuestOp& op) {
  if (!quarantines_.empty()) {
    // What is held back by a quarantine is at least held once only.
    std::erase_if(retained_, [&](const Retained& r) {
      if (!op.range.contains(r.range) || r.replaying) return false;
      retained_bytes_ -= r.payload.size();
      return true;
    });
  }
  Retained r;
  r.range = op.range;
  r.command = op.command == Command::write ? Command::write : Command::zero;
  r.payload = op.payload;
  r.may_hole = op.command == Command::trim || !op.no_hole;
  r.number = ++acknowledged_;
  // An older write of the same range may be about to be written again: then so must this one.
  r.replaying = replays_left_ != 0;
  if (r.replaying) ++replays_left_;
  retained_bytes_ += r.payload.size();
  retained_.push_back(std::move(r));
}

void Pivoted::release(std::uint64_t up_to) {
  std::erase_if(retained_, [&](const Retained& r) {
    if (r.number > up_to || r.replaying || in_quarantine(r.range)) return false;
    retained_bytes_ -= r.payload.size();
    return true;
  });
}

void Pivoted::flush_done(const TargetOp& op, IoError error) {
  const std::uint64_t cut = flush_cuts_.at(op.id);
  flush_cuts_.erase(op.id);
  const std::optional<OpId> guest = op.waiter;
  if (!guest) own_flush_ = false;
  if (error == IoError::lost) {
    if (guest) pending_.push_front(*guest);
    return;
  }
  if (error == IoError::none) {
    release(cut);
  } else {
    start_replay(true);  // it proves that something was not written: write it again
  }
  if (guest) complete(*guest, error);
}

// --- loss and replay
// ------------------------------------------------------------------------------

void Pivoted::target_lost(const std::string& reason) {
  link_up_ = false;
  lost_at_ = context_.now;
  last_error_ = "the target was lost: " + reason;
  context_.notice(last_error_ + " (requests wait for it)");
}

void Pivoted::target_up(const TargetUp& event) {
  if (event.info.size < context_.config.size || event.info.read_only || !event.info.can_flush) {
    last_error_ = "the target came back as another export: smaller, read-only or without flush";
    context_.notice(last_error_);
    return;
  }
  info_ = event.info;
  target_window({event.window_ops, event.window_bytes});
  link_up_ = true;
  context_.notice("the target is back");
  if (!NBDFERRY_MUTANT(pivot_no_replay)) start_replay(true);
}

void Pivoted::target_window(const TargetWindow& event) {
  window_ = event;
  in_flight_.set_window(event.window_ops, event.window_bytes);
}

void Pivoted::start_replay(bool all) {
  replays_left_ = replay_numbers_.size();
  for (auto& r : retained_) {
    const bool in_flight = std::any_of(replay_numbers_.begin(), replay_numbers_.end(),
                                       [&](const auto& n) { return n.second == r.number; });
    if (in_flight) continue;
    r.replaying = r.replaying || all || in_quarantine(r.range);
    if (r.replaying) ++replays_left_;
  }
}

void Pivoted::pump_replay() {
  // In order: one that must wait stops those behind it.
  for (auto& r : retained_) {
    if (!r.replaying) continue;
    const bool sent = std::any_of(replay_numbers_.begin(), replay_numbers_.end(),
                                  [&](const auto& n) { return n.second == r.number; });
    if (sent) continue;
    const bool data = r.command == Command::write || !info_.can_zero;
    const std::uint64_t bytes = data ? r.range.length() : 0;
    if (in_flight_.conflict(r.range) || !in_flight_.has_room(bytes)) return;
    DiskOp disk;
    disk.id = context_.new_op(OpKind::replay);
    disk.command = r.command;
    disk.range = r.range;
    disk.payload = r.payload;
    disk.may_hole = r.may_hole;
    replay_numbers_.emplace(disk.id, r.number);
    in_flight_.add({disk.id, OpKind::replay, disk.command, disk.range, bytes, 0, std::nullopt, {}});
    ++context_.counters.replayed_writes;
    context_.submit_target(std::move(disk));
  }
}

void Pivoted::replay_done(const TargetOp& op, IoError error) {
  const std::uint64_t number = replay_numbers_.at(op.id);
  replay_numbers_.erase(op.id);
  if (error == IoError::lost) return;  // it stays to be replayed
  --replays_left_;
  const auto it = std::find_if(retained_.begin(), retained_.end(),
                               [&](const Retained& r) { return r.number == number; });
  NBDFERRY_ASSERT(it != retained_.end(), "a retained write was dropped while it was replayed");
  it->replaying = false;
  if (error != IoError::none) {
    replay_failed_ = true;
    last_error_ = "a write could not be replayed: " + std::string(to_string(error));
    context_.notice(last_error_);
  }
}

void Pivoted::fail_pending() {
  for (const OpId id : pending_) {
    if (guests_.find(id) != nullptr) complete(id, IoError::io);
  }
  pending_.clear();
}

void Pivoted::tick() {
  if (!link_up_ && context_.now - lost_at_ >= options_.reconnect_delay) fail_pending();
  if (!link_up_ || quarantines_.empty()) return;
  const bool over = std::any_of(quarantines_.begin(), quarantines_.end(),
                                [&](const Quarantine& q) { return q.until <= context_.now; });
  if (!over) return;
  // Nothing late can land any more: put what was written on top of what may have landed.
  start_replay(false);
  std::erase_if(quarantines_, [&](const Quarantine& q) { return q.until <= context_.now; });
}

void Pivoted::report(Status& s) const {
  s.phase = Phase::switched;
  s.buffered_bytes = retained_bytes_;
  s.last_error = last_error_;
  std::uint64_t suspect = 0;
  for (const auto& q : quarantines_) suspect += q.range.length();
  s.suspect_bytes = suspect;
}

}  // namespace nbdferry::mirror
