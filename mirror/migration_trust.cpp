// Migration: what the target is believed to hold, and for how long: across a restart (ResumeMap), after a
// loss (samples), and by verification.
#include <algorithm>

#include "mirror/migration.hpp"

namespace nbdferry::mirror {

namespace {

constexpr std::uint64_t samples_max = 64;
constexpr Duration verify_pause = std::chrono::seconds(1);

}  // namespace

// --- after a restart, or a loss ---

// What the process before us left: what was clean is held, what was sent may still land.
void Migration::adopt() {
  resume_.for_each_clean([&](ByteRange r) { map_->set(r, BlockState::synced); });
  // A write that an earlier migration had under way may have been noted as sent for too long.
  suspects_.for_each([&](ByteRange r) { map_->set(map_->covering(r), BlockState::stale); });
  resumed_bytes_ = map_->size() - map_->stale_bytes();
  unproven_ = resumed_bytes_ != 0 && !info_.proven;
  sampled_ = !unproven_;
  // It may be another one, which says the same, and has not flushed it: what reads well is not all.
  if (unproven_ && info_.can_flush) {
    unflushed_.found(*map_, {0, map_->size()});
    flushed_at_ = context_.now - context_.config.limits.flush_period;
  }
  adopt_verification();
  context_.notice("resumed: the target holds " + std::to_string(resumed_bytes_) + " bytes, " +
                  std::to_string(map_->stale_bytes()) + " are to be copied");
}

// What it found, whoever the target is. How far it came, only of the very same target.
void Migration::adopt_verification() {
  if (!NBDFERRY_MUTANT(resume_forgets_differences)) differing_bytes_ = resume_.differing();
  const std::uint64_t mark = resume_.verified();
  if (resumed_bytes_ == 0 || (unproven_ && !NBDFERRY_MUTANT(resume_verified_another))) {
    resume_.set_verified(0);
  } else if (mark == map_->size()) {
    verified_ = true;
  } else {
    verifier_.restore(mark);
  }
}

// What older connections hold will not be written, the target says.
void Migration::lift_suspects() {
  suspects_.for_each([&](ByteRange r) { map_->clear_flag(r, ChunkFlag::suspect); });
  const Suspects lifted = std::exchange(suspects_, {});
  lifted.for_each([&](ByteRange r) { settle(r); });
}

// Of what it should hold: what was flushed last, and something from everywhere.
Ranges Migration::samples() const {
  const std::uint64_t held = map_->size() - map_->stale_bytes() - map_->armed_bytes();
  const std::uint64_t step = std::max(chunk_size, held / samples_max / chunk_size * chunk_size);
  Ranges out = resume_.recent();
  std::uint64_t skip = 0;
  map_->for_each_run({0, map_->size()}, [&](ByteRange r, BlockState state) {
    if (state != BlockState::synced) return;
    std::uint64_t at = r.begin + skip;
    for (; at < r.end; at += step) out.push_back({at, std::min(at + chunk_size, r.end)});
    skip = at - r.end;
  });
  return out;
}

void Migration::distrust(std::uint64_t at) {
  ++context_.counters.distrusted;
  report_error(
      "the target does not hold what it held before it was lost, or we were restarted (at byte " +
      std::to_string(at) + "): copying everything");
  mark_stale({0, map_->size()}, "the target is not what it was");
  resumed_bytes_ = 0;
  unproven_ = verified_ = false;
  verifier_.forget();
  resume_.set_verified(0);
}

// --- for the next restart ---

// Of a flush that went well: what a restart may take for granted. Not what has been written since, or is
// about to be.
void Migration::trust_flushed(ByteRange run) {
  if (!resume_.kept()) return;
  const auto whole_chunks = [&](ByteRange r) {
    ByteRange whole = r.narrowed(chunk_size);
    if (r.end == map_->size()) whole.end = r.end;
    return whole;
  };
  map_->for_each_run(run, [&](ByteRange r, BlockState state) {
    if (state != BlockState::synced && !NBDFERRY_MUTANT(resume_trusts_stale)) return;
    map_->for_each_flag_run(whole_chunks(r), unflushed_.flag(), [&](ByteRange part, bool later) {
      if (!later || NBDFERRY_MUTANT(resume_trusts_later_writes)) trust_idle(part);
    });
  });
}

void Migration::trust_idle(ByteRange chunks) {
  const auto busy = [&](ByteRange r) {
    if (NBDFERRY_MUTANT(resume_trusts_queued)) return false;
    bool running = false;
    guests_.for_each_running(r, [&](GuestOp&) { running = true; });
    return running || queue_.overlaps(r) || in_flight_.writes_in(r);
  };
  if (!busy(chunks)) {
    resume_.trust(chunks);
    return;
  }
  if (chunks.length() <= chunk_size) return;
  // What is busy is rare in what is long.
  const std::uint64_t middle = chunks.begin + chunks.length() / 2 / chunk_size * chunk_size;
  trust_idle({chunks.begin, std::max(middle, chunks.begin + chunk_size)});
  trust_idle({std::max(middle, chunks.begin + chunk_size), chunks.end});
}

// No write of it is unanswered, unless one of the same chunks is in flight, or was lost lately.
void Migration::settle(ByteRange range) {
  resume_.settle_but(range, [&](ByteRange chunk) {
    return in_flight_.writes_in(chunk) ||
           (suspects_.any(chunk) && !NBDFERRY_MUTANT(resume_settles_suspects));
  });
}

// --- verification ---

void Migration::verify(const Verify& event) {
  if (!event.acknowledge) {
    verifier_.start(event.command);
    return;
  }
  differing_bytes_ = 0;
  resume_.set_differing(0);
  context_.done(event.command, true);
}

// Until somebody has seen it nothing is switched over, not even by another process.
void Migration::found_difference(std::uint64_t bytes) {
  differing_bytes_ += bytes;
  resume_.set_differing(differing_bytes_);
  if (!NBDFERRY_MUTANT(verify_tells_nobody)) {
    switchover_.give_up("a verification found a difference");
  }
}

void Migration::verified_up_to(std::uint64_t mark) { resume_.set_verified(mark); }

void Migration::verification_ended(bool good) {
  verified_ = good;
  verify_at_ = context_.now + verify_pause;
}

// What was asked for, or what a switchover by itself needs after a restart.
void Migration::maybe_verify() {
  const bool wanted = options_.verify || (unsure() && options_.switch_when != SwitchWhen::manual);
  if (!wanted || verified_ || differing_bytes_ != 0 || !in_sync_ || verifier_.running() ||
      context_.now < verify_at_ || switchover_.state() != Switchover::State::none) {
    return;
  }
  verifier_.start(std::nullopt);
}

std::string Migration::doubt() const {
  if (differing_bytes_ != 0) {
    return "a verification found " + std::to_string(differing_bytes_) +
           " bytes that differed, and sent them again: find out why, then acknowledge it (verify "
           "--acknowledge)";
  }
  if (options_.verify && !verified_) return "not verified yet (--verify): it will be, once in sync";
  if (unsure() && !NBDFERRY_MUTANT(resume_never_doubts)) {
    return "after a restart this target can't prove that it is what it was: verify first (or "
           "migrate with --trust-target)";
  }
  return {};
}

}  // namespace nbdferry::mirror
