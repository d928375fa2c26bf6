#include "mirror/flush_tracker.hpp"

#include <utility>

namespace nbdferry::mirror {

void FlushTracker::found(BlockMap& map, ByteRange range) {
  const ByteRange chunks = range.widened(chunk_size).intersect({0, map.size()});
  map.for_each_flag_run(chunks, flag(), [&](ByteRange run, bool already) {
    if (already) return;
    map.set_flag(run, flag());
    if (!current_.empty() && current_.back().end == run.begin) {
      current_.back().end = run.end;
    } else {
      current_.push_back(run);
    }
  });
}

void FlushTracker::begin() {
  NBDFERRY_ASSERT(flushing_.empty(), "two flushes of the target at once");
  flushing_.swap(current_);
  odd_ = !odd_;
  current_bytes_ = 0;
}

Ranges FlushTracker::succeeded(BlockMap& map) {
  for (const auto& r : flushing_) map.clear_flag(r, other_flag());
  if (NBDFERRY_MUTANT(flush_covers_later_writes)) {
    for (const auto& r : current_) map.clear_flag(r, flag());
    current_.clear();
  }
  return std::exchange(flushing_, {});
}

Ranges FlushTracker::failed(BlockMap& map) {
  for (const auto& r : flushing_) map.clear_flag(r, other_flag());
  for (const auto& r : current_) map.clear_flag(r, flag());
  Ranges out = std::exchange(flushing_, {});
  out.insert(out.end(), current_.begin(), current_.end());
  current_.clear();
  current_bytes_ = 0;
  return out;
}

}  // namespace nbdferry::mirror
