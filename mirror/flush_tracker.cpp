#include "mirror/flush_tracker.hpp"

namespace nbdferry::mirror {

void FlushTracker::written(BlockMap& map, ByteRange range) {
  for (std::uint64_t c = range.begin / chunk_size; c * chunk_size < range.end; ++c) {
    if (map.chunk_flag(c, flag())) continue;
    map.set_flag(map.chunk_range(c), flag());
    current_.push_back(c);
  }
  current_bytes_ += range.length();
}

void FlushTracker::begin() {
  NBDFERRY_ASSERT(flushing_.empty(), "two flushes of the target at once");
  flushing_.swap(current_);
  odd_ = !odd_;
  current_bytes_ = 0;
}

void FlushTracker::succeeded(BlockMap& map) {
  for (const auto c : flushing_) map.clear_flag(map.chunk_range(c), other_flag());
  flushing_.clear();
  if (!NBDFERRY_MUTANT(flush_covers_later_writes)) return;
  for (const auto c : current_) map.clear_flag(map.chunk_range(c), flag());
  current_.clear();
}

std::vector<std::uint64_t> FlushTracker::failed(BlockMap& map) {
  std::vector<std::uint64_t> out;
  for (const auto c : flushing_) {
    map.clear_flag(map.chunk_range(c), other_flag());
    out.push_back(c);
  }
  for (const auto c : current_) {
    map.clear_flag(map.chunk_range(c), flag());
    out.push_back(c);
  }
  flushing_.clear();
  current_.clear();
  current_bytes_ = 0;
  return out;
}

}  // namespace nbdferry::mirror
