// HeatMap: where on the disk the guest has been writing lately, so that the copier comes there last:
// what is still stale costs the target nothing when it is written again.
//
// A counter for each region, halved every second. At most 65,536 regions whatever the disk's size.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "mirror/types.hpp"

namespace nbdferry::mirror {

class HeatMap {
 public:
  // Regions are a power of two, at least `region_min` bytes.
  HeatMap(std::uint64_t size, std::uint64_t region_min) : region_(region_min) {
    while (size / region_ >= regions_max) region_ *= 2;
    counts_.resize(size / region_ + 1);
  }

  void wrote(ByteRange range) {
    for (std::uint64_t r = range.begin / region_; r * region_ < range.end; ++r) {
      if (counts_[r] == std::numeric_limits<std::uint16_t>::max()) continue;
      ++counts_[r];
      ++sum_;
    }
  }

  void tick(Time now) {
    if (now - cooled_at_ < half_life) return;
    cooled_at_ = now;
    if (sum_ == 0) return;
    sum_ = 0;
    for (auto& c : counts_) sum_ += c /= 2;
  }

  // Much hotter than the disk as a whole: one that is written evenly has no such place.
  [[nodiscard]] bool hot(std::uint64_t offset) const {
    const std::uint64_t count = counts_[offset / region_];
    return count >= count_min && count * counts_.size() > sum_ * times_mean;
  }

  // The first part of `run` that is hot, or not, throughout.
  [[nodiscard]] ByteRange alike(ByteRange run) const {
    const bool first = hot(run.begin);
    std::uint64_t end = region_end(run.begin);
    while (end < run.end && hot(end) == first) end += region_;
    return {run.begin, std::min(end, run.end)};
  }
  [[nodiscard]] std::uint64_t region_end(std::uint64_t offset) const {
    return (offset / region_ + 1) * region_;
  }

 private:
  static constexpr std::uint64_t regions_max = 65'536;
  static constexpr Duration half_life = std::chrono::seconds(1);
  static constexpr std::uint64_t count_min = 8;
  static constexpr std::uint64_t times_mean = 4;
  std::uint64_t region_;
  std::vector<std::uint16_t> counts_;
  std::uint64_t sum_ = 0;
  Time cooled_at_{0};
};

}  // namespace nbdferry::mirror
