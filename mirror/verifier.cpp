#include "mirror/verifier.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "mirror/migration.hpp"

namespace nbdferry::mirror {

namespace {

constexpr std::size_t reads_max = 4;
constexpr std::size_t checksums_max = 16;  // each takes a round trip, and carries nothing
constexpr std::uint32_t tries_max = 100;
constexpr std::size_t batch_max = 256;
constexpr Duration retry_pause = std::chrono::milliseconds(100);
constexpr Duration mark_period = std::chrono::milliseconds(100);

}  // namespace

void Verifier::start(std::optional<CommandId> command) {
  Context& context = m_.context();
  const auto refuse = [&](const char* why) {
    if (command) context.done(*command, false, why);
  };
  if (purpose_ == Purpose::whole && !command_) {
    command_ = command;  // it runs by itself: its verdict is the answer
    begun_earlier_ = true;
    return;
  }
  if (running()) return refuse("cannot verify: a verification is running");
  if (!m_.in_sync() || m_.switchover().state() != Switchover::State::none) {
    return refuse("cannot verify: the migration is not in sync (or is switching over)");
  }
  purpose_ = Purpose::whole;
  command_ = command;
  retry_at_ = Time{0};
  begun_earlier_ = std::exchange(stopped_, false);
  if (begun_earlier_) return;
  cursor_ = 0;
  mark_max_ = m_.map().size();
  verified_ = mismatched_ = skipped_ = unreadable_ = 0;
  m_.verified_up_to(0);
}

void Verifier::sample(const std::vector<ByteRange>& parts) {
  purpose_ = Purpose::samples;
  batch_.clear();
  for (const auto& part : parts) {
    for (std::uint64_t at = part.begin; at < part.end; at += reading_bytes()) {
      batch_.push_back({{at, std::min(at + reading_bytes(), part.end)}});
    }
  }
}

void Verifier::stop(const char* why) {
  if (purpose_ == Purpose::whole) {
    m_.verified_up_to(mark());
    stopped_ = true;
    retry_.insert(retry_.end(), batch_.begin(), batch_.end());
  }
  batch_.clear();
  purpose_ = Purpose::none;
  if (!command_) return;
  m_.context().done(*std::exchange(command_, std::nullopt), false,
                    "verification stopped: " + std::string(why) + " (it can be continued)");
}

void Verifier::forget() {
  NBDFERRY_ASSERT(!running(), "what runs goes on");
  stopped_ = false;
  retry_.clear();
}

void Verifier::restore(std::uint64_t mark) {
  cursor_ = verified_ = mark / chunk_size * chunk_size;
  stopped_ = cursor_ != 0;
  mark_max_ = m_.map().size();
}

std::uint64_t Verifier::mark() const {
  std::uint64_t at = std::min(cursor_, mark_max_);
  for (const auto* jobs : {&retry_, &batch_}) {
    for (const auto& job : *jobs) at = std::min(at, job.range.begin);
  }
  for (const auto& c : comparisons_) at = std::min(at, c.job.range.begin);
  return at;
}

void Verifier::tick() {
  if (purpose_ != Purpose::whole || m_.context().now < mark_at_) return;
  mark_at_ = m_.context().now + mark_period;
  m_.verified_up_to(mark());
}

void Verifier::touched(ByteRange range) {
  for (auto& c : comparisons_) {
    if (c.job.range.overlaps(range) && !NBDFERRY_MUTANT(verify_ignores_writes)) c.dirty = true;
  }
}

// Nothing may change the range on either side while it is compared, but for what touched() reports.
bool Verifier::quiet(ByteRange range) {
  if (!m_.map().all(m_.map().covering(range), BlockState::synced)) return false;
  if (m_.queue().overlaps(range) || m_.in_flight().conflict(range)) return false;
  bool busy = false;
  m_.guests().for_each_running(range, [&](GuestOp&) { busy = true; });
  return !busy;
}

void Verifier::again(Job job) {
  if (sampling()) return;  // there are others
  if (++job.tries >= tries_max) {
    skipped_ += job.range.length();
    mark_max_ = std::min(mark_max_, job.range.begin);
    return;
  }
  // Smaller pieces are quiet more often.
  const std::uint64_t block = m_.block_size();
  if (job.range.length() > block) {
    const std::uint64_t half = std::max<std::uint64_t>(1, job.range.length() / 2 / block) * block;
    const std::uint64_t middle = job.range.begin + half;
    retry_.push_back({{middle, job.range.end}, job.tries, job.by_reading});
    job.range.end = middle;
  }
  retry_.push_back(job);
}

// A block that can't be read, in a migration that may do without it.
bool Verifier::left_out(ByteRange range, bool unreadable) {
  const bool out = unreadable && !sampling() && m_.options().skip_unreadable &&
                   range.length() <= m_.block_size();
  if (out) unreadable_ += range.length();
  return out;
}

bool Verifier::checksums() const { return m_.info().can_checksum && !sampling(); }

std::uint64_t Verifier::reading_bytes() const {
  return std::min(m_.context().config.limits.verify_bytes, m_.piece_bytes(Command::read));
}

// It yields to the guest on the local disk, as the copier does.
bool Verifier::has_room() const {
  if (comparisons_.size() >= (checksums() ? checksums_max : reads_max)) return false;
  std::uint64_t bytes = 0;
  for (const auto& c : comparisons_) bytes += c.job.range.length();
  return bytes == 0 || bytes < m_.read_share();
}

// What had to wait comes in between, some at a time, so that what is never quiet does not hold up the
// rest, nor the mark for long.
std::optional<Verifier::Job> Verifier::next_job() {
  if (batch_.empty() && !sampling() && m_.context().now >= retry_at_) {
    const auto end =
        retry_.begin() + static_cast<std::ptrdiff_t>(std::min(batch_max, retry_.size()));
    batch_.assign(retry_.begin(), end);
    retry_.erase(retry_.begin(), end);
    retry_at_ = m_.context().now + retry_pause;
  }
  if (!batch_.empty()) {
    const Job job = batch_.front();
    batch_.pop_front();
    return job;
  }
  const std::uint64_t size = m_.map().size();
  if (sampling() || cursor_ >= size) return std::nullopt;
  const std::uint64_t step =
      checksums() ? m_.context().config.limits.checksum_bytes : reading_bytes();
  const Job job{{cursor_, std::min(size, cursor_ + step)}};
  cursor_ = job.range.end;
  return job;
}

std::optional<std::uint64_t> Verifier::start_one() {
  if (!running() || m_.holds_writes() || !has_room()) return {};
  auto job = next_job();
  if (!job) return {};
  const bool reads = !checksums() || job->by_reading;
  if (reads && job->range.length() > reading_bytes()) {
    Job rest = *job;
    rest.range.begin = job->range.end = job->range.begin + reading_bytes();
    batch_.push_front(rest);
  }
  const std::uint64_t brings = reads ? job->range.length() : 0;
  if (!m_.in_flight().has_room(brings)) {
    batch_.push_front(*job);
    return {};
  }
  if (!quiet(job->range)) {
    if (!left_out(job->range, m_.unreadable(job->range))) again(*job);
    return 0;
  }
  start_on_both(*job, reads ? Command::read : Command::checksum);
  return brings;
}

void Verifier::start_on_both(const Job& job, Command command) {
  Comparison c;
  c.purpose = purpose_;
  c.job = job;
  c.command = command;
  DiskOp op;
  op.command = command;
  op.range = job.range;
  op.id = c.source_op = m_.context().new_op(OpKind::verify);
  m_.context().submit_source(op);
  op.id = c.target_op = m_.context().new_op(OpKind::verify);
  m_.in_flight().add({op.id,
                      OpKind::verify,
                      command,
                      op.range,
                      command == Command::read ? op.range.length() : 0,
                      0,
                      std::nullopt,
                      false,
                      {},
                      {m_.context().now}});
  m_.context().submit_target(std::move(op));
  comparisons_.push_back(std::move(c));
}

void Verifier::source_done(SourceDone&& event) {
  const auto it = std::find_if(comparisons_.begin(), comparisons_.end(),
                               [&](const Comparison& c) { return c.source_op == event.id; });
  if (it == comparisons_.end()) return;
  it->source = std::move(event.data);
  it->source_sum = event.checksum;
  it->unreadable = event.error != IoError::none;
  part_done(it, event.error);
}

void Verifier::target_done(const TargetOp& op, TargetDone&& event) {
  const auto it = std::find_if(comparisons_.begin(), comparisons_.end(),
                               [&](const Comparison& c) { return c.target_op == op.id; });
  if (it == comparisons_.end()) return;
  it->target = std::move(event.data);
  it->target_sum = event.checksum;
  const bool refused = event.error != IoError::none && event.error != IoError::lost;
  if (refused && it->command == Command::checksum) it->job.by_reading = true;
  part_done(it, event.error);
}

void Verifier::part_done(std::list<Comparison>::iterator it, IoError error) {
  if (error != IoError::none) it->error = error;
  if (--it->pending != 0) return;
  Comparison c = std::move(*it);
  comparisons_.erase(it);
  if (c.purpose != purpose_) {
    if (c.purpose == Purpose::whole && stopped_) retry_.push_back(c.job);
  } else if (left_out(c.job.range, c.unreadable)) {
    // Knowingly; and from now on the copier knows, too: a write that mends a part of it brings it all.
    m_.mark_stale(m_.blocks_of(c.job.range), "the source can't be read");
  } else if (c.error != IoError::none || c.dirty) {
    again(c.job);
  } else if (c.command == Command::checksum) {
    compare_checksums(c);
  } else {
    compare(c);
  }
}

void Verifier::compare_checksums(const Comparison& c) {
  if (c.source_sum == c.target_sum || NBDFERRY_MUTANT(verify_overlooks_checksums)) {
    verified_ += c.job.range.length();
    return;
  }
  Job job = c.job;
  job.by_reading = true;
  retry_.push_back(job);
}

void Verifier::compare(Comparison& c) {
  const std::uint64_t step = m_.block_size();
  if (sampling()) {
    const auto* const end = c.source.data() + c.job.range.length();
    const auto* const differs = std::mismatch(c.source.data(), end, c.target.data()).first;
    if (differs == end) return;
    purpose_ = Purpose::none;
    batch_.clear();
    m_.distrust(c.job.range.begin + static_cast<std::uint64_t>(differs - c.source.data()));
    return;
  }
  verified_ += c.job.range.length();
  for (std::uint64_t at = c.job.range.begin; at < c.job.range.end; at += step) {
    const ByteRange block{at, std::min(at + step, c.job.range.end)};
    const std::uint64_t offset = at - c.job.range.begin;
    if (std::memcmp(c.source.data() + offset, c.target.data() + offset, block.length()) == 0)
      continue;
    mismatched_ += block.length();
    mark_max_ = 0;  // another process has to begin anew
    m_.context().notice("verify: source and target differ at byte " + std::to_string(at) +
                        ": sending it again");
    m_.mark_stale(m_.blocks_of(block), "verification found a difference");
    m_.found_difference(block.length());
  }
}

void Verifier::finish_if_done() {
  if (!running() || !batch_.empty() || !comparisons_.empty()) return;
  if (sampling()) {
    purpose_ = Purpose::none;
    m_.sample_was_good();
    return;
  }
  if (cursor_ < m_.map().size() || !retry_.empty()) return;
  purpose_ = Purpose::none;
  std::string message =
      std::to_string(verified_) + " bytes compared, " + std::to_string(mismatched_) + " differed";
  if (mismatched_ != 0) message += " and were sent again";
  if (skipped_ != 0) {
    message += "; " + std::to_string(skipped_) + " bytes were never quiet enough to compare";
  }
  if (unreadable_ != 0) {
    message += "; " + std::to_string(unreadable_) + " bytes of the source can't be read";
  }
  if (begun_earlier_) message += " (begun earlier)";
  const bool good = mismatched_ == 0 && skipped_ == 0;
  m_.verified_up_to(mark());
  m_.verification_ended(good);
  if (command_) {
    m_.context().done(*std::exchange(command_, std::nullopt), good, message);
  } else {
    m_.context().notice("verified: " + message);
  }
}

}  // namespace nbdferry::mirror
