// Migration: what goes to the target, in which order, and what its answers mean.
#include <algorithm>

#include "mirror/migration.hpp"

namespace nbdferry::mirror {

namespace {

// Of the bytes on the wire the copier gets at least one in four, so that the end comes nearer.
constexpr std::uint64_t mirrored_per_copied = 3;
constexpr std::uint64_t copy_credit_max = 4ULL * 1024 * 1024;
constexpr Duration guest_idle = std::chrono::milliseconds(100);
constexpr Duration read_ahead_time = std::chrono::milliseconds(50);
constexpr std::uint64_t read_ahead_copies_min = 4;
constexpr std::size_t unflushed_runs_max = 64 * 1024;
constexpr std::uint32_t zero_errors_max = 2;
constexpr Duration error_backoff = std::chrono::milliseconds(100);
constexpr Duration error_backoff_max = std::chrono::seconds(5);

constexpr const char* zeroes_as_data = "zeroes have to go to the target as data";

}  // namespace

std::uint64_t Migration::piece_bytes(Command command) const {
  const Limits& limits = context_.config.limits;
  const bool as_zeroes = command == Command::zero && can_zero();
  const std::uint64_t wanted =
      as_zeroes ? limits.zero_piece_bytes
                : std::min<std::uint64_t>(limits.write_piece_bytes, info_.payload_max);
  // Whole blocks, so that what is cut here is aligned there too.
  return std::max(block_size(), wanted / block_size() * block_size());
}

std::uint64_t Migration::read_ahead() const {
  const Limits& limits = context_.config.limits;
  const double rate = copy_rate_.bytes_per_second();
  const auto carried = [&](double bytes_per_second, Duration in) {
    return static_cast<std::uint64_t>(bytes_per_second * std::chrono::duration<double>(in).count());
  };
  // Beside what is under way on a long path.
  const std::uint64_t under_way =
      carried(std::max(rate, bulk_window_.bytes_per_second()), bulk_window_.fastest() * 5 / 4);
  // Little while nothing is known of the rate: the guest is not to wait for many reads at once.
  const std::uint64_t least =
      std::min(read_ahead_copies_min * limits.copy_bytes, limits.copy_window_bytes);
  const std::uint64_t soon =
      std::clamp(carried(rate, read_ahead_time), least, limits.copy_window_bytes);
  return std::min(limits.copy_window_max, soon + under_way);
}

std::uint64_t Migration::copy_bytes() const {
  const std::uint64_t most = context_.config.limits.copy_bytes;
  const bool idle = guest_at_ == Time{0} || context_.now - guest_at_ > guest_idle;
  return idle ? most : std::max(chunk_size, most / 4);
}

void Migration::dispatch() {
  if (!link_up_) return;
  for (;;) {
    const bool copies_first = copy_credit_ >= context_.config.limits.copy_bytes;
    if (dispatch_copy(Turn::waited_for)) continue;
    if (copies_first && dispatch_copy(Turn::its_share)) continue;
    if (dispatch_mirrored()) continue;
    if (dispatch_copy(Turn::rest)) continue;
    if (dispatch_verify()) continue;
    return;
  }
}

// Beside what the window allows: what nobody waits for stays short of it, so that what somebody
// waits for gets through.
bool Migration::has_room_for_bulk(std::uint64_t bytes) {
  const std::uint64_t under_way = in_flight_.bytes();
  if (!in_flight_.has_room(bytes)) return false;
  if (under_way == 0 || under_way + bytes <= bulk_window_.bytes()) return true;
  bulk_window_.held_back();
  return false;
}

bool Migration::dispatch_mirrored() {
  while (const MirrorEntry* e = queue_.next()) {
    const ByteRange blocks = blocks_of(e->range);
    if (too_long(e->command, e->range)) {
      mark_stale(blocks, zeroes_as_data);
      continue;
    }
    // Rule 4: it waits for the copy of its block, and for whatever is in flight there.
    if (map_->any(blocks, BlockState::armed) && !NBDFERRY_MUTANT(mirrored_overtakes_copy)) {
      const auto copy = copier_.holder(blocks);
      NBDFERRY_ASSERT(copy.has_value(), "an armed block without a copy");
      if (e->waiter) copier_.hurry(*copy);
      queue_.park_next(*copy);
      continue;
    }
    if (const auto other = in_flight_.conflict(e->range)) {
      queue_.park_next(*other);
      continue;
    }
    const std::uint64_t bytes = bytes_sent(e->command, e->range);
    if (!(e->waiter ? in_flight_.has_room(bytes) : has_room_for_bulk(bytes))) return false;
    if (bytes != 0 && !bandwidth_.may_send()) {
      throttled_ = true;
      return false;
    }
    MirrorEntry entry = queue_.take_next();
    merge_adjacent(entry);
    const std::uint64_t sent = bytes_sent(entry.command, entry.range);
    DiskOp op;
    op.id = context_.new_op(OpKind::mirrored);
    op.command = entry.command;
    op.range = entry.range;
    op.payload = entry.payload;
    op.may_hole = entry.may_hole;
    op.as_data = sent != 0;
    in_flight_.add({op.id,
                    OpKind::mirrored,
                    op.command,
                    op.range,
                    sent,
                    MirrorQueue::cost(entry),
                    entry.waiter,
                    entry.debt,
                    {},
                    bulk_window_.sends(context_.now, in_flight_.bytes())});
    map_->set_flag(op.range, ChunkFlag::written);
    resume_.send(op.range);
    context_.submit_target(std::move(op));
    bandwidth_.sent(sent);
    copy_credit_ = std::min(copy_credit_max, copy_credit_ + sent / mirrored_per_copied);
    return true;
  }
  return false;
}

bool Migration::can_merge(const MirrorEntry& first, const MirrorEntry& next) {
  if (next.command != first.command || next.may_hole != first.may_hole) return false;
  // Writes that the guest waits for go out as they are: nothing of theirs waits for a copy.
  if (first.waiter || next.waiter) return false;
  const ByteRange both{first.range.begin, next.range.end};
  const std::uint64_t limit =
      std::min(context_.config.limits.merge_bytes, piece_bytes(first.command));
  if (both.length() > limit || in_flight_.conflict(next.range)) return false;
  return !map_->any(blocks_of(next.range), BlockState::armed) &&
         (!sends_data(first.command) || has_room_for_bulk(both.length()));
}

// What lies right behind it in the queue goes with it, in one request.
void Migration::merge_adjacent(MirrorEntry& entry) {
  std::vector<MirrorEntry> parts;
  MirrorEntry grown = entry;
  grown.payload = {};
  while (const MirrorEntry* next = queue_.ready_at(grown.range.end)) {
    if (!can_merge(grown, *next)) break;
    grown.range.end = next->range.end;
    grown.debt = grown.debt || next->debt;
    parts.push_back(queue_.take_with_last(next->range.begin));
    ++context_.counters.merged;
  }
  if (parts.empty()) return;
  if (entry.command == Command::write) {
    Buffer all(grown.range.length());
    std::byte* out = all.data();
    const auto append = [&](const Payload& p) {
      std::copy(p.bytes().begin(), p.bytes().end(), out);
      out += p.size();
    };
    append(entry.payload);
    for (const auto& p : parts) append(p.payload);
    grown.payload = std::move(all).freeze();
  }
  entry = std::move(grown);
}

bool Migration::dispatch_copy(Turn turn) {
  const CopyPiece* next = copier_.next_piece(turn == Turn::waited_for);
  if (next == nullptr) {
    if (turn == Turn::rest) copy_credit_ = 0;
    return false;
  }
  if (too_long(next->command, next->range)) {
    mark_stale(next->range, zeroes_as_data);
    return true;
  }
  const std::uint64_t bytes = bytes_sent(next->command, next->range);
  // The bulk window is for what can wait. Small mirrored writes would take each place in it as it
  // becomes free, and the copier's share would be nothing.
  if (!(turn == Turn::rest ? has_room_for_bulk(bytes) : in_flight_.has_room(bytes))) return false;
  if (bytes != 0 && !(bandwidth_.may_send() && deadline_share_.may_send())) {
    throttled_ = true;
    return false;
  }
  CopyPiece piece = copier_.take_piece();
  DiskOp op;
  op.id = context_.new_op(OpKind::copy);
  op.command = piece.command;
  op.range = piece.range;
  op.payload = std::move(piece.payload);
  op.as_data = bytes != 0;
  in_flight_.add({op.id, OpKind::copy, op.command, op.range, bytes, 0, std::nullopt, false,
                  piece.copy, bulk_window_.sends(context_.now, in_flight_.bytes())});
  if (is_write(op.command)) {
    map_->set_flag(op.range, ChunkFlag::written);
    resume_.send(op.range);
  }
  context_.submit_target(std::move(op));
  bandwidth_.sent(bytes);
  deadline_share_.sent(bytes);
  copy_credit_ -= std::min(copy_credit_, bytes);
  return true;
}

// A zero that an earlier client of the target wrote, and did not flush, goes with a restart.
void Migration::trust_zeroes(ByteRange range) {
  if (NBDFERRY_MUTANT(zeroes_survive_restart)) return;
  if (info_.can_flush) {
    unflushed_.found(*map_, range);
  } else {
    map_->set_flag(range, ChunkFlag::written);
  }
}

bool Migration::dispatch_verify() {
  if (!verifier_.running()) return false;
  if (!bandwidth_.may_send()) {
    throttled_ = true;
    return false;
  }
  const auto bytes = verifier_.start_one();
  bandwidth_.sent(bytes.value_or(0));
  return bytes.has_value();
}

std::optional<OpId> Migration::flush_target() {
  if (flush_op_ || !link_up_ || !in_flight_.has_room(0)) return std::nullopt;
  DiskOp op;
  op.id = context_.new_op(OpKind::flush);
  op.command = Command::flush;
  flush_op_ = op.id;
  unflushed_.begin();  // what is acknowledged from now on is not covered
  in_flight_.add(
      {op.id, OpKind::flush, Command::flush, {}, 0, 0, std::nullopt, false, {}, {context_.now}});
  const OpId id = op.id;
  context_.submit_target(std::move(op));
  return id;
}

// Periodically, to keep small what a loss makes stale; more often once the copy is through, so that a
// switchover's own flush finds little to do: the guest waits for it.
void Migration::maybe_flush() {
  if (!info_.can_flush || flush_op_ || !link_up_ || holds_writes()) return;
  const Limits& limits = context_.config.limits;
  const bool much = unflushed_.unflushed_bytes() >= limits.flush_bytes ||
                    unflushed_.unflushed_runs() >= unflushed_runs_max;
  const bool level = map_->stale_bytes() == 0;
  const bool long_ago =
      context_.now - flushed_at_ >= (level ? limits.flush_period_level : limits.flush_period);
  if (unflushed_.clean() || (!much && !long_ago)) return;
  (void)flush_target();
}

void Migration::flush_done(const TargetOp& op, IoError error) {
  flush_op_.reset();
  flushed_at_ = context_.now;
  const bool good = error == IoError::none;
  if (good) {
    for (const auto& r : unflushed_.succeeded(*map_)) trust_flushed(r);
  } else {
    ++context_.counters.flush_failures;
    flush_failed_ = !NBDFERRY_MUTANT(zeroes_survive_failed_flush);
    // A flush that is tried again proves nothing: what it should have covered may be gone (rule 7).
    if (NBDFERRY_MUTANT(failed_flush_is_retried)) {
      (void)unflushed_.failed(*map_);
    } else {
      for (const auto& r : unflushed_.failed(*map_)) mark_stale(r, "a flush of the target failed");
      mark_writes_stale("a flush of the target failed");
    }
    if (error != IoError::lost) target_failed(op, error);
  }
  switchover_.flushed(op.id, good);
  proof_.flushed(op.id, good);
}

OpId Migration::send_proof(DiskOp op) {
  const std::uint64_t bytes = op.range.length();
  op.id = context_.new_op(OpKind::proof);
  in_flight_.add({op.id,
                  OpKind::proof,
                  op.command,
                  op.range,
                  bytes,
                  0,
                  std::nullopt,
                  false,
                  {},
                  bulk_window_.sends(context_.now, in_flight_.bytes())});
  if (is_write(op.command)) {
    if (!NBDFERRY_MUTANT(nonce_not_counted_as_written))
      map_->set_flag(op.range, ChunkFlag::written);
    if (!NBDFERRY_MUTANT(nonce_not_counted_as_sent)) resume_.send(op.range);
  }
  const OpId id = op.id;
  context_.submit_target(std::move(op));
  bandwidth_.sent(bytes);
  return id;
}

void Migration::target_done(TargetDone&& event) {
  const TargetOp op = in_flight_.remove(event.id);
  queue_.unpark(op.id);
  if (op.kind == OpKind::mirrored) queue_.answered();
  if (event.error != IoError::lost) answered_at_ = context_.now;
  const bool wrote = is_write(op.command);
  if (event.error == IoError::none) {
    // Writes that are answered well say nothing of a flush that always fails, nor zeroes of writes.
    if (op.command == Command::flush) {
      flush_errors_.in_row = 0;
    } else if (op.command == Command::zero && op.window_bytes == 0) {
      zero_errors_in_row_ = 0;
    } else {
      errors_.in_row = 0;
    }
    if (wrote) {
      rate_.add(op.window_bytes);
      if (op.kind == OpKind::copy) copy_rate_.add(op.window_bytes);
      if (op.window_bytes != 0) {
        bulk_window_.answered(context_.now, op.sending, op.window_bytes);
      }
      if (info_.can_flush) unflushed_.written(*map_, op.range);
      if (NBDFERRY_MUTANT(resume_trusts_unflushed)) resume_.trust(op.range);
    }
  } else if (event.error == IoError::lost && wrote && !NBDFERRY_MUTANT(lost_is_not_suspect)) {
    // The old server may apply it at any later time (rule 8), whatever becomes of the migration.
    ++context_.counters.suspects;
    suspects_.add(blocks_of(op.range), context_.now + options_.quarantine);
    map_->set_flag(blocks_of(op.range), ChunkFlag::suspect);
  }
  if (event.error == IoError::lost && last_error_.empty()) {
    last_error_ = "a connection to the target was lost before it had answered";
  }
  if (wrote) settle(op.range);
  if (op.kind == OpKind::flush) {
    flush_done(op, event.error);
    return;
  }
  // After the end, too: what is kept for a restart must not say that it is there.
  if (event.error != IoError::none && wrote && !NBDFERRY_MUTANT(failed_target_not_stale)) {
    mark_stale(blocks_of(op.range), "a target operation failed");
  }
  const IoError error = event.error;
  switch (op.kind) {
    case OpKind::mirrored:
      mirrored_done(op, event.error);
      break;
    case OpKind::copy:
      copier_.target_done(op, event);
      break;
    case OpKind::verify:
      verifier_.target_done(op, std::move(event));
      break;
    case OpKind::proof:
      proof_.target_done(op, event);
      break;
    default:
      NBDFERRY_ASSERT(false, "an answer of an unknown kind");
  }
  if (wrote && error != IoError::none && error != IoError::lost) target_failed(op, error);
}

void Migration::mirrored_done(const TargetOp& op, IoError error) {
  if (error == IoError::none) mirrored_bytes_ += op.range.length();
  if (!op.waiter) return;
  GuestOp* guest = guests_.find(*op.waiter);
  NBDFERRY_ASSERT(guest != nullptr && guest->pieces > 0, "the guest write of a piece is gone");
  --guest->pieces;
  if (NBDFERRY_MUTANT(target_error_reaches_guest) && error != IoError::none) guest->result = error;
  context_.settle.push_back(guest->id);
}

void Migration::target_failed(const TargetOp& op, IoError error) {
  if (ended_) return;
  const std::string what = "the target failed to " + std::string(to_string(op.command)) + ": " +
                           std::string(to_string(error));
  last_error_ = what;
  // Its server is let go, and the next one awaited. All that was in flight may be answered so: once counts.
  if (error == IoError::shutdown && context_.now < retry_at_) return;
  const bool hopeless = error == IoError::no_space || error == IoError::not_permitted;
  if (op.command == Command::zero && op.window_bytes == 0 && !hopeless) {
    zero_failed(error);
    return;
  }
  Errors& errors = op.command == Command::flush ? flush_errors_ : errors_;
  if (++errors.in_row == 1) errors.since = context_.now;
  const Limits& limits = context_.config.limits;
  // Much may be under way, and all of it fail at once: that is no long time.
  const bool lately = context_.now - errors.since < limits.target_errors_time;
  if (hopeless || (errors.in_row >= limits.target_errors_max && !lately)) {
    end(Phase::failed, what);
    return;
  }
  const auto doublings = lately ? 0 : std::min<std::uint32_t>(errors.in_row - 1, 6);
  const auto backoff = error_backoff * (1 << doublings);
  retry_at_ = context_.now + std::min(backoff, error_backoff_max);
}

// It offers to zero, and does not: whether it takes data decides how this goes on.
void Migration::zero_failed(IoError error) {
  const bool never = error == IoError::not_supported || error == IoError::invalid;
  if (!never && ++zero_errors_in_row_ < zero_errors_max) return;
  if (NBDFERRY_MUTANT(zeroes_fail_for_ever) || std::exchange(zeroes_fail_, true)) return;
  context_.notice(last_error_ + ": zeroes are sent to it as data");
}

void Migration::source_done(SourceDone&& event) {
  switch (Context::kind_of(event.id)) {
    case OpKind::readback:
      read_back_done(std::move(event));
      break;
    case OpKind::copy:
      copier_.source_done(std::move(event));
      break;
    case OpKind::hint:
      copier_.hint_done(std::move(event));
      break;
    case OpKind::verify:
      verifier_.source_done(std::move(event));
      break;
    default:
      NBDFERRY_ASSERT(false, "a source answer of an unknown kind");
  }
}

}  // namespace nbdferry::mirror
