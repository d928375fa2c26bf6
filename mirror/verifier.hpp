// Verifier: compares source and target block by block while the guest writes: all of the disk, or a
// sample of it. By checksums, where the target tells them: what they show to differ, and what the target
// would not tell, is compared by reading both sides.
//
// A difference counts only if no write to the block was admitted, queued or in flight between the
// start of the first read and the end of the second. What really differs becomes stale, and so
// heals. How far it has come, and what it found, outlives the process (ResumeMap).
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <optional>

#include "mirror/context.hpp"
#include "mirror/target_ops.hpp"

namespace nbdferry::mirror {

class Migration;

class Verifier {
 public:
  explicit Verifier(Migration& migration) : m_(migration) {}

  // All of the disk, for an operator or by ourselves. One that was stopped goes on where it was.
  void start(std::optional<CommandId> command);
  // Parts of it, each once; says distrust() to the migration at the first difference.
  void sample(const std::vector<ByteRange>& parts);
  void stop(const char* why);  // ends it without a verdict
  // There is nothing to go on with: all of it, if it comes to that.
  void forget();
  // One that a process before us had begun has come so far.
  void restore(std::uint64_t mark);

  [[nodiscard]] bool running() const { return purpose_ != Purpose::none; }
  [[nodiscard]] bool sampling() const { return purpose_ == Purpose::samples; }
  [[nodiscard]] std::uint64_t verified_bytes() const { return verified_; }
  [[nodiscard]] std::uint64_t mismatched_bytes() const { return mismatched_; }

  // A write of `range` was admitted, or it became stale: comparisons of it do not count.
  void touched(ByteRange range);

  // Starts one comparison if there is one to start and room for it: the bytes that it brings here.
  std::optional<std::uint64_t> start_one();
  void source_done(SourceDone&& event);
  void target_done(const TargetOp& op, TargetDone&& event);
  void finish_if_done();
  void tick();
  // Does the target hold `range`, and is nothing about to change that?
  [[nodiscard]] bool quiet(ByteRange range);

 private:
  enum class Purpose : std::uint8_t { none, whole, samples };
  struct Job {
    ByteRange range;
    std::uint32_t tries = 0;
    bool by_reading = false;  // its checksums say nothing
  };
  struct Comparison {
    Job job;
    Command command = Command::read;  // on both sides
    OpId source_op{};
    OpId target_op{};
    Purpose purpose = Purpose::none;
    bool dirty = false;
    std::uint32_t pending = 2;
    IoError error = IoError::none;
    bool unreadable = false;  // on the source
    Payload source;
    Payload target;
    std::uint64_t source_sum = 0;
    std::uint64_t target_sum = 0;
  };

  [[nodiscard]] bool checksums() const;
  [[nodiscard]] std::uint64_t reading_bytes() const;
  [[nodiscard]] bool has_room() const;
  [[nodiscard]] std::optional<Job> next_job();
  void start_on_both(const Job& job, Command command);
  void again(Job job);
  [[nodiscard]] bool left_out(ByteRange range, bool unreadable);
  void compare(Comparison& c);
  void compare_checksums(const Comparison& c);
  void part_done(std::list<Comparison>::iterator it, IoError error);
  // Up to here everything has been compared, and was alike.
  [[nodiscard]] std::uint64_t mark() const;

  Migration& m_;
  Purpose purpose_ = Purpose::none;
  std::optional<CommandId> command_;
  std::uint64_t cursor_ = 0;
  bool stopped_ = false;        // before its end: there is something to go on with
  bool begun_earlier_ = false;  // than the operator asked for it
  std::deque<Job> retry_;       // were not quiet, or changed while they were compared …
  std::deque<Job> batch_;       // … and are being tried again
  Time retry_at_{0};            // the next batch
  Time mark_at_{0};             // when it is remembered again
  std::uint64_t mark_max_ = 0;  // beyond it something differed, or was never compared
  std::list<Comparison> comparisons_;
  std::uint64_t verified_ = 0;
  std::uint64_t mismatched_ = 0;
  std::uint64_t skipped_ = 0;
  std::uint64_t unreadable_ = 0;  // may be left out (--skip-unreadable)
};

}  // namespace nbdferry::mirror
