#include "test/sim/oracle.hpp"

#include <algorithm>
#include <cstring>

namespace nbdferry::sim {

Oracle::Oracle(const DiskImage& source)
    : initial_(source.current(), source.current() + source.size()), heads_(source.units(), -1) {}

std::uint32_t Oracle::add(Kind kind, ByteRange range, Payload payload) {
  const auto number = static_cast<std::uint32_t>(writes_.size());
  writes_.push_back({kind, range, std::move(payload)});
  for (std::uint64_t u = range.begin / unit_size; u * unit_size < range.end; ++u) {
    nodes_.push_back({number, heads_[u]});
    heads_[u] = static_cast<std::int32_t>(nodes_.size() - 1);
  }
  return number;
}

std::uint32_t Oracle::arrived(Command command, ByteRange range, Payload payload) {
  const Kind kind = command == Command::write  ? Kind::write
                    : command == Command::zero ? Kind::zero
                                               : Kind::trim;
  return add(kind, range, std::move(payload));
}

void Oracle::acknowledged(std::uint32_t write, std::uint64_t event, bool fua) {
  writes_[write].acknowledged = event;
  if (fua) writes_[write].durable = event;
}

void Oracle::flushed(std::uint64_t asked, std::uint64_t answered) {
  for (auto& w : writes_) {
    if (w.acknowledged < asked) w.durable = std::min(w.durable, answered);
  }
}

void Oracle::refused(std::uint32_t write) { writes_[write].kind = Kind::nothing; }

void Oracle::undefined(ByteRange range) { add(Kind::undefined, range, {}); }

bool Oracle::matches(const Write& w, ByteRange part, const std::byte* bytes) {
  switch (w.kind) {
    case Kind::write:
      return std::memcmp(w.payload.data() + (part.begin - w.range.begin), bytes, part.length()) ==
             0;
    case Kind::zero:
    case Kind::trim:
      return all_zero(bytes, part.length());
    case Kind::undefined:
      return true;
    case Kind::nothing:
      return false;
  }
  return false;
}

bool Oracle::explained(ByteRange part, const std::byte* bytes, std::uint64_t event) const {
  for (std::int32_t node = heads_[part.begin / unit_size]; node >= 0;) {
    const Node& n = nodes_[static_cast<std::size_t>(node)];
    node = n.older;
    const Write& w = writes_[n.write];
    const ByteRange both = w.range.intersect(part);
    if (both.empty()) continue;
    if (both != part) {
      // The write covers some of it: ask anew for each part on its own.
      for (const ByteRange p :
           {ByteRange{part.begin, both.begin}, both, ByteRange{both.end, part.end}}) {
        if (!p.empty() && !explained(p, bytes + (p.begin - part.begin), event)) return false;
      }
      return true;
    }
    if (matches(w, part, bytes)) return true;
    const bool certain = w.kind == Kind::write || w.kind == Kind::zero;
    if (certain && w.acknowledged < event) return false;
  }
  return std::memcmp(initial_.data() + part.begin, bytes, part.length()) == 0;
}

std::optional<std::uint64_t> Oracle::cut_for(std::uint64_t u, const std::byte* bytes,
                                             std::uint64_t cut) const {
  const ByteRange unit = unit_range(u);
  std::uint64_t best = UINT64_MAX;
  std::uint64_t limit = UINT64_MAX;  // from then on something newer is there
  const auto offer = [&](std::uint64_t from) {
    const std::uint64_t at = std::max(cut, from);
    if (at <= limit) best = std::min(best, at);
  };
  for (std::int32_t node = heads_[u]; node >= 0 && limit >= cut;) {
    const Node& n = nodes_[static_cast<std::size_t>(node)];
    node = n.older;
    const Write& w = writes_[n.write];
    if (!w.range.contains(unit)) return cut;  // written in parts: not judged
    if (w.kind == Kind::undefined) {
      offer(0);
    } else if (w.submitted != UINT64_MAX && matches(w, unit, bytes)) {
      offer(w.submitted);
    }
    if (w.kind == Kind::write || w.kind == Kind::zero) limit = std::min(limit, w.durable);
  }
  if (limit >= cut && std::memcmp(initial_.data() + unit.begin, bytes, unit.length()) == 0) {
    offer(0);
  }
  return best == UINT64_MAX ? std::nullopt : std::optional(best);
}

std::optional<std::uint64_t> Oracle::impossible_after_cut(const std::byte* image) const {
  for (std::uint64_t cut = 0, before = UINT64_MAX; cut != before;) {
    before = cut;
    for (std::uint64_t u = 0; u < heads_.size(); ++u) {
      if (heads_[u] < 0) continue;
      const auto at = cut_for(u, image + u * unit_size, cut);
      if (!at) return u * unit_size;
      cut = *at;
    }
  }
  return std::nullopt;
}

}  // namespace nbdferry::sim
