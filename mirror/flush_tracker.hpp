// FlushTracker: what the target has acknowledged but not flushed (rule 7). What it was found to
// hold already counts alike: its cache may hold that for an earlier client that did not flush.
//
// Chunks carry one of two flags, of the even or the odd epoch. Submitting a flush ends the epoch:
// what is acknowledged later belongs to the next, since the flush does not cover it. A good flush
// clears the old epoch; a failed one, or a loss, makes everything of both epochs stale. Beside the
// flags there is a list of runs of chunks, so that neither walks the disk: short, since the target
// is flushed when it grows, and a hole of any length is one run.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mirror/block_map.hpp"
#include "mirror/ranges.hpp"

namespace nbdferry::mirror {

class FlushTracker {
 public:
  // A write of `range` was acknowledged by the target.
  void written(BlockMap& map, ByteRange range) {
    found(map, range);
    current_bytes_ += range.length();
  }
  // The target said that it holds the right thing in `range`, which was not written.
  void found(BlockMap& map, ByteRange range);

  [[nodiscard]] bool clean() const { return current_.empty() && flushing_.empty(); }
  // Runs of chunks, and bytes written, since the last flush was submitted.
  [[nodiscard]] std::size_t unflushed_runs() const { return current_.size(); }
  [[nodiscard]] std::uint64_t unflushed_bytes() const { return current_bytes_; }

  void begin();  // a flush is being submitted; none is under way
  // It was answered well: the runs of chunks that it covers, but for what was written to them since.
  Ranges succeeded(BlockMap& map);
  // It failed, or the server may have lost what it did not flush: the chunks that become stale.
  [[nodiscard]] Ranges failed(BlockMap& map);

  // What chunks carry that were written since the last flush was submitted.
  [[nodiscard]] ChunkFlag flag() const {
    return odd_ ? ChunkFlag::unflushed_odd : ChunkFlag::unflushed_even;
  }

 private:
  [[nodiscard]] ChunkFlag other_flag() const {
    return odd_ ? ChunkFlag::unflushed_even : ChunkFlag::unflushed_odd;
  }

  bool odd_ = false;
  Ranges current_;   // runs of chunks with flag()
  Ranges flushing_;  // runs of chunks with other_flag()
  std::uint64_t current_bytes_ = 0;
};

}  // namespace nbdferry::mirror
