// Small helpers on lists of disjoint, sorted ranges.
#pragma once

#include <algorithm>
#include <iterator>
#include <map>
#include <vector>

#include "mirror/types.hpp"

namespace nbdferry::mirror {

using Ranges = std::vector<ByteRange>;

// Takes `hole` out of `list`. Returns whether anything was taken.
inline bool subtract(Ranges& list, ByteRange hole) {
  bool changed = false;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const ByteRange r = list[i];
    if (!r.overlaps(hole)) continue;
    changed = true;
    const ByteRange left{r.begin, hole.begin};
    const ByteRange right{hole.end, r.end};
    list.erase(list.begin() + static_cast<std::ptrdiff_t>(i));
    if (!right.empty()) list.insert(list.begin() + static_cast<std::ptrdiff_t>(i), right);
    if (!left.empty()) list.insert(list.begin() + static_cast<std::ptrdiff_t>(i), left);
    if (left.empty() && right.empty()) --i;  // wraps at 0, as ++ brings it back
  }
  return changed;
}

[[nodiscard]] inline Ranges intersection(const Ranges& list, ByteRange with) {
  Ranges out;
  for (const auto& r : list) {
    if (r.overlaps(with)) out.push_back(r.intersect(with));
  }
  return out;
}

// A set of bytes as disjoint ranges: for asking often, in logarithmic time.
class RangeSet {
 public:
  void add(ByteRange r) {
    auto it = first_touching(r.begin);
    for (; it != by_begin_.end() && it->first <= r.end; it = by_begin_.erase(it)) {
      r = {std::min(r.begin, it->first), std::max(r.end, it->second)};
    }
    by_begin_.emplace(r.begin, r.end);
  }
  [[nodiscard]] bool overlaps(ByteRange r) const {
    const auto after = by_begin_.lower_bound(r.end);
    return after != by_begin_.begin() && std::prev(after)->second > r.begin;
  }

 private:
  [[nodiscard]] std::map<std::uint64_t, std::uint64_t>::iterator first_touching(std::uint64_t at) {
    const auto it = by_begin_.lower_bound(at);
    return it != by_begin_.begin() && std::prev(it)->second >= at ? std::prev(it) : it;
  }
  std::map<std::uint64_t, std::uint64_t> by_begin_;
};

[[nodiscard]] inline std::uint64_t total(const Ranges& list) {
  std::uint64_t sum = 0;
  for (const auto& r : list) sum += r.length();
  return sum;
}

}  // namespace nbdferry::mirror
