// The vocabulary that all folders share: offsets, ranges, ids, time, errors, commands, extents.
//
// Units: offsets and lengths are bytes; Time is nanoseconds since an arbitrary, monotone epoch that
// the edge chooses (the core has no clock). Everything here is a plain value.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace nbdferry {

using Time = std::chrono::nanoseconds;  // a point: since the edge's epoch
using Duration = std::chrono::nanoseconds;

enum class RequestId : std::uint64_t {
};                                   // a guest's request, chosen by the edge, unique while open
enum class OpId : std::uint64_t {};  // a disk operation of the core, never reused
enum class CommandId : std::uint64_t {};  // an operator's command, chosen by the edge
// A way to the target that was found, chosen by the edge, never reused; PathId{} is none in particular.
enum class PathId : std::uint64_t {};

inline constexpr std::uint64_t block_size_min = 4096;  // leaf of the map
inline constexpr std::uint64_t chunk_size = 65536;     // upper level of the map

// Half-open range of bytes [begin, end).
struct ByteRange {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;

  [[nodiscard]] constexpr std::uint64_t length() const { return end - begin; }
  [[nodiscard]] constexpr bool empty() const { return end <= begin; }
  [[nodiscard]] constexpr bool overlaps(const ByteRange& o) const {
    return begin < o.end && o.begin < end;
  }
  [[nodiscard]] constexpr bool contains(const ByteRange& o) const {
    return begin <= o.begin && o.end <= end;
  }
  [[nodiscard]] constexpr ByteRange intersect(const ByteRange& o) const {
    return {std::max(begin, o.begin), std::min(end, o.end)};
  }
  // Both ends moved outwards to multiples of `alignment` (a power of two).
  [[nodiscard]] constexpr ByteRange widened(std::uint64_t alignment) const {
    return {begin & ~(alignment - 1), (end + alignment - 1) & ~(alignment - 1)};
  }
  // Both ends moved inwards: the whole units in it; empty when there is none.
  [[nodiscard]] constexpr ByteRange narrowed(std::uint64_t alignment) const {
    return {(begin + alignment - 1) & ~(alignment - 1), end & ~(alignment - 1)};
  }
  friend constexpr bool operator==(const ByteRange&, const ByteRange&) = default;
};

// What the guest can ask, and what a disk can be asked. WRITE, TRIM and ZERO are "writes". CHECKSUM is a
// read of which only 64 bits come back: the same of the same bytes, on every disk that offers it.
enum class Command : std::uint8_t { read, write, trim, zero, flush, cache, block_status, checksum };

[[nodiscard]] constexpr bool is_write(Command c) {
  return c == Command::write || c == Command::trim || c == Command::zero;
}

// Results of disk operations. The first eight are NBD's error codes (NBD protocol, "Error values");
// `lost` exists on the target only: the request was sent, perhaps, and will never be answered, and
// the server may still apply it later (DESIGN.md, rule 8).
enum class IoError : std::uint8_t {
  none,
  not_permitted,  // EPERM
  io,             // EIO
  no_memory,      // ENOMEM
  invalid,        // EINVAL
  no_space,       // ENOSPC
  overflow,       // EOVERFLOW
  not_supported,  // ENOTSUP
  shutdown,       // ESHUTDOWN
  lost,
};

[[nodiscard]] std::string_view to_string(IoError e);
[[nodiscard]] std::string_view to_string(Command c);

// One run of block status, in the order of the range asked for; flags as base:allocation has them.
struct Extent {
  std::uint64_t length = 0;
  bool hole = false;  // not allocated
  bool zero = false;  // reads as zeroes
  friend constexpr bool operator==(const Extent&, const Extent&) = default;
};

}  // namespace nbdferry
