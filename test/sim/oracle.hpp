// Oracle: the naive twin of what the guest may see.
//
// It knows every write of the guest in the order of arrival. A byte may hold the value of the last
// write to it that was acknowledged before the question was asked, or of any later one: unanswered,
// or failed (a failed write leaves its range undefined: old or new). TRIM may or may not zero.
// It also knows what the guest has flushed, and so what a power cut could have left of its disk.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "mirror/payload.hpp"
#include "mirror/types.hpp"
#include "test/sim/disk_image.hpp"

namespace nbdferry::sim {

class Oracle {
 public:
  explicit Oracle(const DiskImage& source);

  // A write arrives; returns its number, by which to tell its end.
  std::uint32_t arrived(Command command, ByteRange range, Payload payload);
  void acknowledged(std::uint32_t write, std::uint64_t event, bool fua);
  // It was submitted to the guest's disk: from now on it may be there.
  void submitted(std::uint32_t write, std::uint64_t event) {
    writes_[write].submitted = std::min(writes_[write].submitted, event);
  }
  // A flush was answered well: what was acknowledged before it was asked for stays.
  void flushed(std::uint64_t asked, std::uint64_t answered);
  // It failed and has changed nothing.
  void refused(std::uint32_t write);
  // Any content may be there from now on.
  void undefined(ByteRange range);

  // The first byte of `range` whose content (`bytes`: of the whole range) is not allowed to
  // somebody who asked at `event`. Units for which `ignored(unit)` holds are left out.
  template <typename Ignored>
  [[nodiscard]] std::optional<std::uint64_t> wrong(ByteRange range, const std::byte* bytes,
                                                   std::uint64_t event, Ignored&& ignored) const {
    for (std::uint64_t u = range.begin / unit_size; u * unit_size < range.end; ++u) {
      if (ignored(u)) continue;
      const ByteRange part = range.intersect({u * unit_size, (u + 1) * unit_size});
      if (!explained(part, bytes + (part.begin - range.begin), event)) {
        return part.begin;
      }
    }
    return std::nullopt;
  }
  [[nodiscard]] std::optional<std::uint64_t> wrong(ByteRange range, const std::byte* bytes,
                                                   std::uint64_t event) const {
    return wrong(range, bytes, event, [](std::uint64_t) { return false; });
  }

  // Is there a moment at which a power cut could have left this on the guest's disk (the whole of it)?
  // Each unit that was written holds one of its versions: submitted before that moment, and no newer
  // one flushed before it. Returns a byte of a unit that rules it out.
  [[nodiscard]] std::optional<std::uint64_t> impossible_after_cut(const std::byte* image) const;

 private:
  enum class Kind : std::uint8_t { write, zero, trim, undefined, nothing };
  struct Write {
    Kind kind;
    ByteRange range;
    Payload payload;
    std::uint64_t acknowledged = UINT64_MAX;  // event
    std::uint64_t submitted = UINT64_MAX;
    std::uint64_t durable = UINT64_MAX;  // when a flush that covers it was answered
  };
  struct Node {
    std::uint32_t write;
    std::int32_t older;  // index of a node, or -1
  };

  std::uint32_t add(Kind kind, ByteRange range, Payload payload);
  // The first moment from `cut` on at which unit `u` could hold `bytes`.
  [[nodiscard]] std::optional<std::uint64_t> cut_for(std::uint64_t u, const std::byte* bytes,
                                                     std::uint64_t cut) const;
  [[nodiscard]] ByteRange unit_range(std::uint64_t u) const {
    return ByteRange{u * unit_size, (u + 1) * unit_size}.intersect({0, initial_.size()});
  }
  [[nodiscard]] bool explained(ByteRange part, const std::byte* bytes,
                               std::uint64_t event) const;  // part: within a unit
  [[nodiscard]] static bool matches(const Write& w, ByteRange part, const std::byte* bytes);

  std::vector<std::byte> initial_;
  std::vector<Write> writes_;
  std::vector<Node> nodes_;
  std::vector<std::int32_t> heads_;  // of each unit: its youngest write
};

}  // namespace nbdferry::sim
