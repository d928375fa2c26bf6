// Small helpers on lists of disjoint, sorted ranges.
#pragma once

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

[[nodiscard]] inline bool overlaps_any(const Ranges& list, ByteRange with) {
  return std::any_of(list.begin(), list.end(),
                     [&](const ByteRange& r) { return r.overlaps(with); });
}

[[nodiscard]] inline std::uint64_t total(const Ranges& list) {
  std::uint64_t sum = 0;
  for (const auto& r : list) sum += r.length();
  return sum;
}

}  // namespace nbdferry::mirror
