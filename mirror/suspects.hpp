// Suspects: ranges that a request sent before a loss may still overwrite on the target (rule 8).
//
// They outlive a migration: a cancelled one's unanswered writes may land in the next one's target.
#pragma once

#include <cstdint>
#include <vector>

#include "mirror/types.hpp"

namespace nbdferry::mirror {

class Suspects {
 public:
  void add(ByteRange blocks, Time until) { list_.push_back({blocks, until}); }

  [[nodiscard]] bool empty() const { return list_.empty(); }
  [[nodiscard]] bool any(ByteRange range) const {
    for (const auto& s : list_) {
      if (s.blocks.overlaps(range)) return true;
    }
    return false;
  }

  // Takes out what is over by `now`. Returns it; parts may still be suspect for another reason.
  [[nodiscard]] std::vector<ByteRange> expire(Time now) {
    std::vector<ByteRange> out;
    std::erase_if(list_, [&](const Suspect& s) {
      if (s.until > now) return false;
      out.push_back(s.blocks);
      return true;
    });
    return out;
  }

  // Until none is left.
  [[nodiscard]] Duration left(Time now) const {
    Time last = now;
    for (const auto& s : list_) last = std::max(last, s.until);
    return last - now;
  }

  // Bytes that are suspect, each counted once.
  [[nodiscard]] std::uint64_t bytes() const {
    std::vector<ByteRange> sorted;
    for (const auto& s : list_) sorted.push_back(s.blocks);
    std::sort(sorted.begin(), sorted.end(),
              [](const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; });
    std::uint64_t sum = 0;
    std::uint64_t end = 0;
    for (const auto& r : sorted) {
      if (r.end > end) sum += r.end - std::max(end, r.begin);
      end = std::max(end, r.end);
    }
    return sum;
  }

  template <typename F>
  void for_each(F&& f) const {
    for (const auto& s : list_) f(s.blocks);
  }

 private:
  struct Suspect {
    ByteRange blocks;
    Time until;
  };
  std::vector<Suspect> list_;
};

}  // namespace nbdferry::mirror
