// Copier: brings stale blocks to the target. Arms a range, waits for the source writes that were
// admitted before, reads it (or asks for its holes), and hands pieces to the migration's dispatch.
//
// What must hold: rule 3 (arm, then read); rule 4 (a piece waits for what is in flight on its
// range, a mirrored write for the copy of its block); rule 9 (holes are not read; zeroes are sent
// unless the target is known to be zero there). A block of a copy that becomes stale is no longer
// live: it is neither sent nor counted as done.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "mirror/context.hpp"
#include "mirror/ranges.hpp"
#include "mirror/target_ops.hpp"

namespace nbdferry::mirror {

class Migration;

struct CopyPiece {
  OpId copy{};
  ByteRange range;
  Command command = Command::write;  // write, zero, or block_status (is the target zero here?)
  Payload payload;
};

class Copier {
 public:
  explicit Copier(Migration& migration) : m_(migration) {}

  // Arms and reads as much as its window allows.
  void start_copies();
  // A guest write ended on the source: copies may have waited for it.
  void source_progress();
  // Something became stale, or may be armed again.
  void poke() { idle_ = false; }

  void source_done(SourceDone&& event);
  void hint_done(SourceDone&& event);
  void target_done(const TargetOp& op, const TargetDone& event);

  // These blocks became stale: forget what is under way for them.
  void discard(ByteRange blocks);

  // The first piece that may go to the target now and conflicts with nothing in flight; `waited_for`:
  // only of copies that were hurried.
  [[nodiscard]] const CopyPiece* next_piece(bool waited_for);
  // A guest's write waits for this copy.
  void hurry(OpId copy);
  [[nodiscard]] bool hurries() const { return hurried_ != 0; }
  CopyPiece take_piece();  // the one that next_piece() returned

  // The copy that has `range` armed: a mirrored write waits for it.
  [[nodiscard]] std::optional<OpId> holder(ByteRange range) const;

  // All blocks that are being copied.
  [[nodiscard]] Ranges live() const;
  [[nodiscard]] bool active() const { return !copies_.empty(); }
  [[nodiscard]] bool has_work() const { return !copies_.empty() || !idle_; }
  [[nodiscard]] std::uint64_t unreadable_bytes() const { return unreadable_bytes_; }
  // Could a part of it not be read, when it was tried last?
  [[nodiscard]] bool unreadable(ByteRange range) const {
    const auto it = unreadable_from(range.begin);
    return it != unreadable_.end() && it->first < range.end;
  }
  // These blocks are being written: try to read them again. Returns whether any was unreadable.
  bool forget_unreadable(ByteRange blocks);
  [[nodiscard]] std::uint64_t unreadable_stale_bytes() const;
  void check_invariants() const;

 private:
  enum class State : std::uint8_t { waiting, reading, probing, sending };
  struct Copy {
    OpId id{};
    ByteRange range;
    Ranges live;                // blocks still armed for this copy
    std::uint64_t barrier = 0;  // source writes admitted up to here must end first
    State state = State::waiting;
    bool expect_hole = false;
    OpId source_op{};  // while reading or probing
    std::deque<CopyPiece> pieces;
    std::uint32_t in_flight = 0;
    std::uint64_t cost = 0;  // bytes of the copier's window
    bool hurried = false;
  };
  struct Unreadable {
    std::uint64_t end = 0;
    Time retry_at{0};
  };
  using Copies = std::list<Copy>;

  [[nodiscard]] bool start_one();
  [[nodiscard]] std::optional<ByteRange> next_run();
  [[nodiscard]] std::optional<ByteRange> scan();
  [[nodiscard]] std::optional<ByteRange> readable_part(ByteRange run);
  // How far the run is all hole or all data, as far as the hint knows; asks when it does not.
  [[nodiscard]] std::optional<std::pair<ByteRange, bool>> hinted(ByteRange run);
  void correct_hint(ByteRange range, const std::vector<Extent>& extents);
  void arm(ByteRange range, bool expect_hole);
  void proceed(Copy& copy);
  void read_failed(Copy& copy, IoError error);
  void make_data_pieces(Copy& copy, const Payload& data);
  void add_pieces(Copy& copy, ByteRange range, Command command, const Payload& data);
  void add_piece(Copy& copy, CopyPiece&& piece);
  void probe_answered(Copy& copy, const std::vector<Extent>& extents);
  void zero_range(Copy& copy, ByteRange range);
  void target_status(Copy& copy, ByteRange range, const std::vector<Extent>& extents);
  void finish_if_done(Copies::iterator it);
  [[nodiscard]] Copies::iterator find(OpId id);
  // The first unreadable part that ends after `at`.
  [[nodiscard]] std::map<std::uint64_t, Unreadable>::const_iterator unreadable_from(
      std::uint64_t at) const;

  Migration& m_;
  Copies copies_;
  std::uint64_t cost_ = 0;
  std::size_t hurried_ = 0;          // copies
  std::size_t waiting_ = 0;          // copies
  std::size_t unsent_ = 0;           // pieces, of all
  std::uint64_t reading_bytes_ = 0;  // from the source
  std::uint64_t cursor_ = 0;
  bool hot_too_ = false;     // there is nothing else
  bool passed_hot_ = false;  // in this scan
  bool after_data_ = false;  // the last copy was of data: no need to look far for a hole
  bool idle_ = false;        // a whole round found nothing to copy
  std::uint64_t hole_bytes_ =
      0;  // longest copy of a hole; grows while the target proves to be zero

  std::optional<OpId> hint_op_;
  std::uint64_t hint_from_ = 0;  // where the hint that is under way begins
  std::uint64_t hint_begin_ = 0;
  std::vector<Extent> hint_;
  std::uint64_t hint_end_ = 0;

  std::set<std::uint64_t> bisected_;  // chunks that are read block by block
  // By begin; disjoint, each within a block. All of it is stale, or armed by a copy that tries again.
  std::map<std::uint64_t, Unreadable> unreadable_;
  std::uint64_t unreadable_bytes_ = 0;
  Copies::iterator next_from_ = copies_.end();  // where next_piece() found its piece
  std::size_t next_index_ = 0;
};

}  // namespace nbdferry::mirror
