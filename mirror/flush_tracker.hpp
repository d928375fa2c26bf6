// FlushTracker: what the target has acknowledged but not flushed (rule 7).
//
// Chunks carry one of two flags, of the even or the odd epoch. Submitting a flush ends the epoch:
// what is acknowledged later belongs to the next, since the flush does not cover it. A good flush
// clears the old epoch; a failed one, or a loss, makes everything of both epochs stale.
#pragma once

#include <cstdint>
#include <vector>

#include "mirror/block_map.hpp"

namespace nbdferry::mirror {

class FlushTracker {
 public:
  // A write of `range` was acknowledged by the target.
  void written(BlockMap& map, ByteRange range);

  [[nodiscard]] bool clean() const { return current_.empty() && flushing_.empty(); }
  // Chunks written since the last flush was submitted.
  [[nodiscard]] std::size_t unflushed_chunks() const { return current_.size(); }
  [[nodiscard]] std::uint64_t unflushed_bytes() const { return current_bytes_; }

  void begin();                   // a flush is being submitted; none is under way
  void succeeded(BlockMap& map);  // it was answered well
  // It failed, or the server may have lost what it did not flush: the chunks that become stale.
  [[nodiscard]] std::vector<std::uint64_t> failed(BlockMap& map);

 private:
  [[nodiscard]] ChunkFlag flag() const {
    return odd_ ? ChunkFlag::unflushed_odd : ChunkFlag::unflushed_even;
  }
  [[nodiscard]] ChunkFlag other_flag() const {
    return odd_ ? ChunkFlag::unflushed_even : ChunkFlag::unflushed_odd;
  }

  bool odd_ = false;
  std::vector<std::uint64_t> current_;   // chunks with flag()
  std::vector<std::uint64_t> flushing_;  // chunks with other_flag()
  std::uint64_t current_bytes_ = 0;
};

}  // namespace nbdferry::mirror
