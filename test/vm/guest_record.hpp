// What guest_writer writes: records that say themselves what they are, so that the host can tell
// afterwards which are there, whole, and how old. Everything about record n follows from the seed and
// n alone: guest_check.py computes it again. Change one, change both.
//
// What must hold: no two records, and no two sectors of one, have the same bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>

namespace guest {

constexpr std::size_t sector_bytes = 512;
constexpr std::size_t slot_sectors = 128;
constexpr std::size_t slot_bytes = slot_sectors * sector_bytes;

/// The finaliser of splitmix64: enough to make choices that look like chance.
constexpr std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

constexpr std::uint64_t choice(std::uint64_t seed, std::uint64_t record) {
  return mix(mix(seed) ^ record);
}

/// zlib's crc32, which the host has in its standard library.
inline std::uint32_t crc32(std::span<const std::byte> bytes) {
  static constexpr auto table = [] {
    std::array<std::uint32_t, 256> result{};
    for (std::uint32_t i = 0; i < result.size(); ++i) {
      std::uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = (c & 1) ? 0xedb88320 ^ (c >> 1) : c >> 1;
      result[i] = c;
    }
    return result;
  }();
  std::uint32_t crc = 0xffffffff;
  for (const auto b : bytes) {
    crc = table[(crc ^ std::to_integer<std::uint32_t>(b)) & 0xff] ^ (crc >> 8);
  }
  return ~crc;
}

inline void fill(std::span<std::byte> bytes, std::uint64_t state) {
  for (std::size_t at = 0; at < bytes.size(); at += sizeof state) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    std::memcpy(&bytes[at], &state, std::min(sizeof state, bytes.size() - at));
  }
}

// Disk B: slots of 64 KiB, each written by every `slots`-th record, in an order that jumps about.

struct RawPlan {
  bool discard;      // frees the whole slot instead of writing
  bool sync;         // fdatasync after it
  unsigned sectors;  // written, from the slot's first
};

constexpr RawPlan raw_plan(std::uint64_t seed, std::uint64_t record) {
  const auto dice = choice(seed, record);
  const bool small = (dice & 1) != 0;
  return {.discard = (dice >> 1) % 32 == 0,
          .sync = (dice >> 8) % 8 == 0,
          .sectors = 1 + static_cast<unsigned>((dice >> 16) % (small ? 8 : slot_sectors))};
}

/// The step by which the next record's slot lies from the last one's: every slot has its turn.
constexpr std::uint64_t slot_step(std::uint64_t slots) {
  auto step = slots * 5 / 8 + 1;
  while (std::gcd(step, slots) != 1) ++step;
  return step;
}

struct Sector {
  static constexpr std::uint64_t magic_value = 0x314345525942444e;
  std::uint64_t magic;
  std::uint64_t record;
  std::uint64_t seed;
  std::uint32_t slot;
  std::uint16_t index;    // of this sector within the record
  std::uint16_t sectors;  // of the record
  std::array<std::byte, 476> payload;
  std::uint32_t crc;  // of all before it
};
static_assert(sizeof(Sector) == sector_bytes);

// Disk A: four lanes of files, record n in lane n mod 4; a file holds 64 records.

constexpr std::uint64_t lanes = 4;
constexpr std::uint64_t file_records = 64;
constexpr std::uint64_t files_kept = 8;  // per lane, less the open one

struct FilePlan {
  bool sync;       // all open files, and the directory
  unsigned bytes;  // with the header
};

constexpr FilePlan file_plan(std::uint64_t seed, std::uint64_t record) {
  const auto dice = choice(seed + 1, record);
  const bool small = (dice & 1) != 0;
  return {.sync = (dice >> 8) % 16 == 0,
          .bytes = 64 + static_cast<unsigned>((dice >> 16) % (small ? 1024 : 16384))};
}

struct FileHeader {
  static constexpr std::uint64_t magic_value = 0x31454c4659424446;
  std::uint64_t magic;
  std::uint64_t record;
  std::uint64_t seed;
  std::uint32_t bytes;  // with this header
  std::uint32_t crc;    // of the record's bytes, this field being zero
};
static_assert(sizeof(FileHeader) == 32);

}  // namespace guest
