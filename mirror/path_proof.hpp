// PathProof: does another path lead to the same export? A nonce is written by the paths in use, to a block
// that the target does not hold anyway, flushed, and read by the new one.
//
// What must hold: the block is stale, and nobody else's until the proof ends: not armed, not suspect, no
// operation on it in flight. It stays stale, so that it is copied, and it counts as written, so that a
// block status of "zero" is not believed of it. If nothing is stale, a quiet block becomes it. Not during
// a switchover: one that begins puts the proof off.
#pragma once

#include <deque>
#include <optional>

#include "mirror/context.hpp"
#include "mirror/target_ops.hpp"

namespace nbdferry::mirror {

class Migration;

class PathProof {
 public:
  explicit PathProof(Migration& migration) : m_(migration) {}

  void found(const PathFound& path);
  // The target was lost, and its paths with it; or the migration has ended.
  void forget();
  // What was written for it may be gone, or has to make way: it begins anew.
  void restart();
  // After each event: the next step, if it can be taken.
  void advance();
  void target_done(const TargetOp& op, const TargetDone& event);
  void flushed(OpId flush, bool good);

  // The block that must not be armed, nor be overwritten; or empty.
  [[nodiscard]] ByteRange reserved() const { return block_; }
  [[nodiscard]] bool reserves(ByteRange range) const { return block_.overlaps(range); }
  // Not answered yet, oldest first.
  [[nodiscard]] const std::deque<PathFound>& waiting() const { return waiting_; }

 private:
  enum class Step : std::uint8_t { find, write, to_flush, flush, to_read, read };

  [[nodiscard]] std::optional<ByteRange> find_block();
  [[nodiscard]] bool spare(ByteRange block) const;
  void write_nonce();
  void read_nonce();
  void judge(const TargetDone& read);
  void use();
  void refuse(std::string reason);
  void next();

  Migration& m_;
  std::deque<PathFound> waiting_;  // the first is being proved
  Step step_ = Step::find;
  ByteRange block_;
  std::optional<OpId> op_;  // the write, flush or read under way
  std::uint32_t errors_ = 0;
  std::uint64_t quiet_from_ = 0;  // where a quiet block is looked for next
};

}  // namespace nbdferry::mirror
