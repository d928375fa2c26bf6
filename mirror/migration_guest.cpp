// Migration: the guest's writes, from admission to the queue.
#include "mirror/migration.hpp"

namespace nbdferry::mirror {

namespace {

constexpr std::size_t entries_min = 16;
constexpr std::size_t bytes_per_entry = 1024;
constexpr double overwrite_buffer_max = 0.5;

}  // namespace

ByteRange Migration::blocks_of(ByteRange range) const {
  ByteRange r = range.widened(block_size());
  r.end = std::min(r.end, context_.config.size);
  return r;
}

void Migration::mark_stale(ByteRange blocks, const char* why) {
  const ByteRange r = map_->stale_closure(blocks);
  resume_.touch(r);
  map_->set(r, BlockState::stale);
  if (!NBDFERRY_MUTANT(stale_keeps_queued)) queue_.discard(r);
  if (!NBDFERRY_MUTANT(stale_keeps_copies)) copier_.discard(r);
  if (!NBDFERRY_MUTANT(stale_keeps_claims)) {
    guests_.for_each_running(r, [&](GuestOp& op) { subtract(op.mirrored, r); });
  }
  verifier_.touched(r);
  copier_.poke();
  switchover_.debt(why);
}

void Migration::classify(GuestOp& op) {
  // After the end, too, until the target is let go: a flush that is under way does not cover it.
  if (!map_ || closed_) return;
  const ByteRange blocks = blocks_of(op.range);
  verifier_.touched(blocks);
  heat_->wrote(blocks);
  // A write may mend what could not be read: it counts as debt again, and ends what ignored it.
  const bool unread = !NBDFERRY_MUTANT(unreadable_forever) && copier_.forget_unreadable(blocks);
  if (!mirroring()) {
    // Before the write is submitted: from here on the target is known not to hold them.
    mark_stale(blocks, "a write while not mirroring");
    return;
  }
  overwrite_stale(op);
  map_->for_each_run(blocks, [&](ByteRange r, BlockState s) {
    const bool skip = s == BlockState::stale ||
                      (NBDFERRY_MUTANT(armed_is_not_mirrored) && s == BlockState::armed);
    if (!skip) op.mirrored.push_back(r);
  });
  if (unread) mark_stale(blocks, "a write to an unreadable block");
  if (op.mirrored.empty() || mode_ != Mode::sync) return;
  op.waits_for_target = true;
  if (!can_queue_early(op)) return;
  op.queued_early = true;
  enqueue(op, true);
}

// A stale chunk that it covers whole is mirrored at once and never read: the target holds it when the
// write has ended. Not where a lost write may still arrive on the target (rule 8), and not where the
// buffer is filling: then it is the copier's.
void Migration::overwrite_stale(GuestOp& op) {
  const bool plain = op.command == Command::write || (op.command == Command::zero && !op.fast_zero);
  const ByteRange whole = op.range.narrowed(chunk_size);
  if (!plain || whole.empty() || buffer_used() > overwrite_buffer_max) return;
  Ranges stale;
  map_->for_each_run(whole, [&](ByteRange run, BlockState s) {
    const ByteRange r = run.narrowed(chunk_size);
    if (s == BlockState::stale && !r.empty()) stale.push_back(r);
  });
  for (const auto& r : stale) {
    if (suspects_.any(r) && !NBDFERRY_MUTANT(overwrite_suspects)) continue;
    if (proof_.reserves(r) && !NBDFERRY_MUTANT(overwrite_takes_nonce_block)) continue;
    map_->set(r, BlockState::synced);
    op.overwrites = true;
    ++context_.counters.overwritten;
  }
  if (op.overwrites) ++overwrites_;
}

// Beside the source write, and not after it: only where its outcome is known (rule 9), where whole
// target blocks are written, and where it supersedes nothing (rule 6: its result is not known yet).
bool Migration::can_queue_early(const GuestOp& op) const {
  const bool plain = op.command == Command::write || (op.command == Command::zero && !op.fast_zero);
  if (!plain || op.range != op.range.widened(info_.block_min)) return false;
  for (const auto& r : op.mirrored) {
    if (queue_.overlaps(r)) return false;
  }
  return true;
}

void Migration::source_answered(GuestOp& op, IoError error, bool changed) {
  if (!map_ || ended_) return;
  // Whatever it amounts to, the map and the queue know of it when this is over.
  if (op.overwrites) --overwrites_;
  if (op.fast_zero && error == IoError::not_supported) {
    op.mirrored.clear();  // refused before anything changed
    release_waiter(op);
    return;
  }
  if (error != IoError::none) {
    // What it changed is unknown: the copier finds out (rule 7).
    if (!NBDFERRY_MUTANT(failed_write_not_stale)) {
      mark_stale(blocks_of(op.range), "a guest write failed on the source");
    }
    op.mirrored.clear();
    release_waiter(op);
    return;
  }
  if (op.queued_early) return;
  if (op.command == Command::trim && !changed && !NBDFERRY_MUTANT(trim_always_zeroes)) {
    op.mirrored.clear();
    return;
  }
  if (!link_up_) {
    const Ranges blocks = op.mirrored;
    for (const auto& r : blocks) mark_stale(r, "the target was lost before a write ended");
    return;
  }
  // The mode may have changed while the source was writing.
  op.waits_for_target = mode_ == Mode::sync && !op.mirrored.empty();
  if (op.waits_for_target && context_.now - op.admitted_at >= options_.sync_timeout) {
    op.waits_for_target = false;  // its time is over already: it becomes debt below
    const Ranges blocks = op.mirrored;
    for (const auto& r : blocks) mark_stale(r, "a sync write was late on the source");
    return;
  }
  if (!op.mirrored.empty()) enqueue(op, false);
}

void Migration::enqueue(GuestOp& op, bool early) {
  NBDFERRY_ASSERT(early || op.source_done, "a write is mirrored before its source result");
  op.epoch = queue_.open_epoch();
  const Ranges blocks = op.mirrored;  // pushing may make some stale
  const ByteRange inner_all = op.range.narrowed(info_.block_min);
  for (const auto& r : blocks) {
    const ByteRange inner = inner_all.intersect(r);
    if (!inner.empty()) enqueue_part(op, inner);
  }
  if (op.range == op.range.widened(info_.block_min)) return;
  // The target's blocks at the ends are covered in part: read them back whole.
  const ByteRange wide = op.range.widened(info_.block_min);
  const ByteRange first{wide.begin, wide.begin + info_.block_min};
  const ByteRange last{wide.end - info_.block_min, wide.end};
  if (first.begin < op.range.begin || first.end > op.range.end) read_back(op, first);
  if (last != first && last.end > op.range.end) read_back(op, last);
}

void Migration::enqueue_part(GuestOp& op, ByteRange part) {
  const bool data = op.command == Command::write;
  const std::uint64_t piece_max = piece_bytes(data ? Command::write : Command::zero);
  for (std::uint64_t at = part.begin; at < part.end; at += piece_max) {
    MirrorEntry e;
    e.range = {at, std::min(at + piece_max, part.end)};
    e.command = data ? Command::write : Command::zero;
    e.may_hole = op.command == Command::trim || !op.no_hole;
    if (data) e.payload = op.payload.slice(at - op.range.begin, e.range.length());
    push_piece(op, std::move(e));
  }
}

// Bytes exactly; entries, too, so that many tiny ones don't take more memory than their data.
bool Migration::full(const MirrorEntry& entry) const {
  return buffer_held() + MirrorQueue::cost(entry) > options_.buffer_bytes ||
         queue_.size() >= entries_min + options_.buffer_bytes / bytes_per_entry;
}

void Migration::push_piece(GuestOp& op, MirrorEntry entry) {
  // An earlier piece's overflow may have made this block stale, a large chunk at a time.
  Ranges wanted;
  for (const auto& r : intersection(op.mirrored, entry.range)) wanted.push_back(r);
  if (wanted.size() != 1 || wanted[0] != entry.range) {
    for (const auto& r : wanted) {
      MirrorEntry part = entry;
      part.range = r;
      if (entry.command == Command::write) {
        part.payload = entry.payload.slice(r.begin - entry.range.begin, r.length());
      }
      push_piece(op, std::move(part));
    }
    return;
  }
  new_debt_.add(entry.command == Command::write ? entry.range.length() : 0);
  if (!op.waits_for_target && full(entry)) {
    if (map_->armed_bytes() > 0) ++context_.counters.overflow_during_copy;
    overflowed_ = true;
    mark_stale(blocks_of(entry.range), "the buffer is full");
    return;
  }
  if (op.waits_for_target) {
    entry.waiter = op.id;
    ++op.pieces;
  }
  const bool trim = op.command == Command::trim;
  if (op.epoch != queue_.first_epoch()) ++context_.counters.epochs_waited;
  if (queue_.push(std::move(entry), op.epoch)) {
    ++context_.counters.superseded;
    if (trim) ++context_.counters.superseded_by_trim;
  }
}

void Migration::read_back(GuestOp& op, ByteRange block) {
  if (intersection(op.mirrored, block).empty()) return;
  ++context_.counters.read_backs;
  ++op.readbacks;
  queue_.expect(op.epoch);
  const OpId id = context_.new_op(OpKind::readback);
  read_backs_.emplace(id, ReadBack{op.id, block});
  DiskOp read;
  read.id = id;
  read.command = Command::read;
  read.range = block;
  context_.submit_source(std::move(read));
}

void Migration::read_back_done(SourceDone&& event) {
  const auto it = read_backs_.find(event.id);
  if (it == read_backs_.end()) return;  // the migration has ended
  const ReadBack rb = it->second;
  read_backs_.erase(it);
  GuestOp& op = *guests_.find(rb.guest);
  --op.readbacks;
  context_.settle.push_back(op.id);
  if (intersection(op.mirrored, rb.range).empty()) {
    // It has become stale since.
  } else if (event.error != IoError::none) {
    mark_stale(blocks_of(rb.range), "a block could not be read back");
  } else {
    MirrorEntry e;
    e.range = rb.range;
    e.payload = std::move(event.data);
    push_piece(op, std::move(e));
  }
  queue_.expected_came(op.epoch);
}

void Migration::release_waiter(GuestOp& op) {
  op.waits_for_target = false;
  context_.settle.push_back(op.id);
  if (op.pieces == 0) return;
  // Unsent pieces were discarded when their blocks became stale; those in flight go on alone.
  op.pieces -= in_flight_.forget_waiter(op.id);
  NBDFERRY_ASSERT(op.pieces == 0, "a guest write's pieces are miscounted");
}

}  // namespace nbdferry::mirror
