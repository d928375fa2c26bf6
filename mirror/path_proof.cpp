#include "mirror/path_proof.hpp"

#include <algorithm>

#include "mirror/migration.hpp"

namespace nbdferry::mirror {

namespace {

constexpr int tries_max = 64;  // blocks looked at in one step
constexpr std::uint32_t read_errors_max = 3;
constexpr std::size_t waiting_max = 64;  // far more than there are: some went while they waited

// All of the block, so that what is there by chance does not do.
std::byte nonce_at(const PathFound& path, std::uint64_t offset) {
  return path.nonce[offset % path.nonce.size()];
}

}  // namespace

void PathProof::found(const PathFound& path) {
  if (waiting_.size() < waiting_max) {
    waiting_.push_back(path);
  } else {
    m_.context().out->emplace_back(LeavePath{path.path});
  }
}

void PathProof::forget() {
  restart();
  waiting_.clear();
}

void PathProof::restart() {
  if (step_ == Step::find) return;
  // Nobody is to wait for an answer by a path that may never give one.
  if (step_ == Step::read) {
    m_.context().out->emplace_back(LeavePath{waiting_.front().path});
    waiting_.pop_front();
    errors_ = 0;
  }
  step_ = Step::find;
  op_.reset();
  block_ = {};
  m_.poke_copier();
}

void PathProof::advance() {
  if (waiting_.empty()) return;
  if (NBDFERRY_MUTANT(path_used_unproven)) {
    use();
    return;
  }
  if (!m_.may_prove()) {
    restart();
    return;
  }
  if (step_ == Step::to_flush) {
    op_ = m_.flush_target();
    if (op_) step_ = Step::flush;
  }
  if (!m_.has_room_for_proof()) return;
  if (step_ == Step::find) write_nonce();
  if (step_ == Step::to_read) read_nonce();
}

bool PathProof::spare(ByteRange block) const {
  return block == m_.blocks_of(block) && !m_.in_flight().conflict(block) && !m_.unreadable(block);
}

std::optional<ByteRange> PathProof::find_block() {
  std::uint64_t at = 0;
  for (int i = 0; i < tries_max; ++i) {
    const auto run = m_.map().next_stale(at, m_.block_size());
    if (!run) break;
    if (spare(*run)) return run;
    at = run->end;
  }
  for (int i = 0; i < tries_max; ++i) {
    if (quiet_from_ >= m_.map().size()) quiet_from_ = 0;
    const ByteRange block = m_.blocks_of({quiet_from_, quiet_from_ + 1});
    quiet_from_ = block.end;
    if (!spare(block) || !m_.verifier().quiet(block)) continue;
    if (!NBDFERRY_MUTANT(nonce_block_stays_synced)) {
      m_.mark_stale(block, "a path is to be proved");
    }
    return block;
  }
  return std::nullopt;
}

void PathProof::write_nonce() {
  const auto block = find_block();
  if (!block) return;
  Buffer nonce(block->length());
  for (std::uint64_t i = 0; i < block->length(); ++i) {
    nonce.data()[i] = nonce_at(waiting_.front(), i);
  }
  DiskOp op;
  op.command = Command::write;
  op.range = *block;
  op.payload = std::move(nonce).freeze();
  op_ = m_.send_proof(std::move(op));
  block_ = *block;
  step_ = Step::write;
}

void PathProof::read_nonce() {
  DiskOp op;
  op.command = Command::read;
  op.range = block_;
  op.path = waiting_.front().path;
  op_ = m_.send_proof(std::move(op));
  step_ = Step::read;
}

void PathProof::target_done(const TargetOp& op, const TargetDone& event) {
  if (op_ != op.id) return;  // the proof has begun anew since
  op_.reset();
  if (step_ == Step::read) {
    judge(event);
  } else if (event.error != IoError::none) {
    restart();
  } else {
    step_ = m_.info().can_flush ? Step::to_flush : Step::to_read;
  }
}

void PathProof::flushed(OpId flush, bool good) {
  if (step_ != Step::flush || op_ != flush) return;
  op_.reset();
  if (good) {
    step_ = Step::to_read;
  } else {
    restart();
  }
}

void PathProof::judge(const TargetDone& read) {
  step_ = Step::to_read;
  if (read.error == IoError::lost) {
    next();  // it is there no more
    return;
  }
  if (read.error != IoError::none) {
    if (++errors_ == read_errors_max) {
      refuse("it can't be read: " + std::string(to_string(read.error)));
    }
    return;
  }
  const auto bytes = read.data.bytes();
  for (std::uint64_t i = 0; i < block_.length(); ++i) {
    if (bytes[i] == nonce_at(waiting_.front(), i)) continue;
    refuse("it leads to another export: what has just been written by another path is not there");
    return;
  }
  use();
}

void PathProof::use() {
  m_.context().out->emplace_back(UsePath{waiting_.front().path});
  next();
}

void PathProof::refuse(std::string reason) {
  m_.context().out->emplace_back(RefusePath{waiting_.front().path, std::move(reason)});
  next();
}

void PathProof::next() {
  waiting_.pop_front();
  errors_ = 0;
  restart();
}

}  // namespace nbdferry::mirror
