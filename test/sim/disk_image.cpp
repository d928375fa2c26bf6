#include "test/sim/disk_image.hpp"

#include <cstring>

namespace nbdferry::sim {

void fill_pattern(std::byte* out, ByteRange range, std::uint64_t stamp) {
  const std::uint64_t mixed = (stamp + 1) * 0x9e3779b97f4a7c15ULL;
  for (std::uint64_t at = range.begin; at < range.end;) {
    const std::uint64_t word = (mixed ^ (at / 8)) * 0xd6e8feb86659fd93ULL | 0x0101010101010101ULL;
    const std::uint64_t in_word = at % 8;
    const std::uint64_t n = std::min<std::uint64_t>(8 - in_word, range.end - at);
    std::byte bytes[8];
    std::memcpy(bytes, &word, 8);
    std::memcpy(out + (at - range.begin), bytes + in_word, n);
    at += n;
  }
}

bool all_zero(const std::byte* bytes, std::uint64_t length) {
  return length == 0 ||
         (bytes[0] == std::byte{0} && std::memcmp(bytes, bytes + 1, length - 1) == 0);
}

DiskImage::DiskImage(std::uint64_t size)
    : current_(size),
      durable_(size),
      current_versions_((size + unit_size - 1) / unit_size),
      durable_versions_(current_versions_.size()),
      abandoned_(current_versions_.size()) {}

void DiskImage::preset(ByteRange range, std::uint64_t stamp) {
  fill_pattern(current_.data() + range.begin, range, stamp);
  std::memcpy(durable_.data() + range.begin, current_.data() + range.begin, range.length());
}

void DiskImage::corrupt(std::uint64_t unit) {
  const std::uint64_t at = unit_range(unit).begin;
  // Not an exclusive or: doing it twice must not undo it.
  for (auto* bytes : {&current_, &durable_}) {
    (*bytes)[at] = static_cast<std::byte>(std::to_integer<unsigned>((*bytes)[at]) + 1);
  }
}

void DiskImage::write(ByteRange range, const std::byte* data) {
  std::byte* to = current_.data() + range.begin;
  if (data == nullptr) {
    std::memset(to, 0, range.length());
  } else {
    std::memcpy(to, data, range.length());
  }
  current_versions_[range.begin / unit_size] = ++last_version_;
}

void DiskImage::settle(std::uint64_t unit, const std::byte* data, std::uint32_t version) {
  if (durable_versions_[unit] >= version) return;
  const ByteRange r = unit_range(unit);
  std::memcpy(durable_.data() + r.begin, data, r.length());
  durable_versions_[unit] = version;
}

void DiskImage::write_back(ByteRange range) {
  for (std::uint64_t u = range.begin / unit_size; u * unit_size < range.end; ++u) {
    settle(u, current_.data() + u * unit_size, current_versions_[u]);
  }
}

bool DiskImage::crash(Prng& prng) {
  bool undone = false;
  std::uint64_t coins = 0;
  for (std::uint64_t u = 0; u < units(); ++u) {
    if (u % 64 == 0) coins = prng.next();
    const bool keep = (coins >> (u % 64) & 1) != 0;
    if (durable_versions_[u] == current_versions_[u]) continue;
    const ByteRange r = unit_range(u);
    const bool abandoned = abandoned_[u] == current_versions_[u];
    if (keep && !abandoned) {
      std::memcpy(durable_.data() + r.begin, current_.data() + r.begin, r.length());
    } else {
      undone = undone || (all_zero(current_.data() + r.begin, r.length()) &&
                          !all_zero(durable_.data() + r.begin, r.length()));
      std::memcpy(current_.data() + r.begin, durable_.data() + r.begin, r.length());
    }
    durable_versions_[u] = current_versions_[u] = ++last_version_;
  }
  return undone;
}

DiskImage::Covered DiskImage::begin_flush() const {
  Covered c;
  for (std::uint64_t u = 0; u < units(); ++u) {
    if (durable_versions_[u] == current_versions_[u] || abandoned_[u] == current_versions_[u]) {
      continue;
    }
    c.units.push_back(static_cast<std::uint32_t>(u));
    c.versions.push_back(current_versions_[u]);
    const ByteRange r = unit_range(u);
    const std::size_t at = c.data.size();
    c.data.resize(at + unit_size);
    std::memcpy(c.data.data() + at, current_.data() + r.begin, r.length());
  }
  return c;
}

void DiskImage::end_flush(const Covered& covered) {
  for (std::size_t i = 0; i < covered.units.size(); ++i) {
    settle(covered.units[i], covered.data.data() + i * unit_size, covered.versions[i]);
  }
}

void DiskImage::fail_flush(const Covered& covered, Prng& prng) {
  for (std::size_t i = 0; i < covered.units.size(); ++i) {
    if (prng.chance(1, 2)) abandoned_[covered.units[i]] = covered.versions[i];
  }
}

}  // namespace nbdferry::sim
