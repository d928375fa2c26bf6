// DiskImage: what a disk holds, and what it would hold after a power cut.
//
// Each 512-byte unit has a current and a durable version. A flush makes durable what was written
// before its submission; a crash keeps or loses every other unit on its own. A failed flush may
// mark units clean that never reached the disk (as Linux's page cache does), so that a later flush
// that succeeds proves nothing about them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "mirror/types.hpp"
#include "test/sim/prng.hpp"

namespace nbdferry::sim {

inline constexpr std::uint64_t unit_size = 512;

// Bytes that tell which write made them: `stamp` in every word, mixed with the place on the disk.
void fill_pattern(std::byte* out, ByteRange range, std::uint64_t stamp);
[[nodiscard]] bool all_zero(const std::byte* bytes, std::uint64_t length);

class DiskImage {
 public:
  // Zeroes, durable.
  explicit DiskImage(std::uint64_t size);

  [[nodiscard]] std::uint64_t size() const { return current_.size(); }
  [[nodiscard]] std::uint64_t units() const { return current_versions_.size(); }
  [[nodiscard]] ByteRange unit_range(std::uint64_t unit) const {
    return ByteRange{unit * unit_size, (unit + 1) * unit_size}.intersect({0, size()});
  }
  [[nodiscard]] const std::byte* current() const { return current_.data(); }
  [[nodiscard]] const std::byte* durable() const { return durable_.data(); }

  [[nodiscard]] bool dirty(std::uint64_t unit) const {
    return durable_versions_[unit] != current_versions_[unit];
  }

  // Initial content: current and durable alike.
  void preset(ByteRange range, std::uint64_t stamp);
  // Changes a byte of a unit behind everybody's back, on the medium too.
  void corrupt(std::uint64_t unit);

  // `range` within one unit; null data means zeroes.
  void write(ByteRange range, const std::byte* data);
  void write_back(ByteRange range);
  // Returns whether something that read as zeroes is back.
  bool crash(Prng& prng);

  // A flush under way: what it covers.
  struct Covered {
    std::vector<std::uint32_t> units;
    std::vector<std::uint32_t> versions;
    std::vector<std::byte> data;
  };
  [[nodiscard]] Covered begin_flush() const;
  void end_flush(const Covered& covered);
  void fail_flush(const Covered& covered, Prng& prng);
  // Later flushes write everything again: nobody is asked to know of another client's failed flush.
  void forgive() { abandoned_.assign(abandoned_.size(), 0); }

 private:
  void settle(std::uint64_t unit, const std::byte* data, std::uint32_t version);

  std::vector<std::byte> current_;
  std::vector<std::byte> durable_;
  std::vector<std::uint32_t> current_versions_;  // of each unit; it is dirty where they differ
  std::vector<std::uint32_t> durable_versions_;
  std::vector<std::uint32_t> abandoned_;  // versions that no flush will write any more
  std::uint32_t last_version_ = 0;
};

}  // namespace nbdferry::sim
