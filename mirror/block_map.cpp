#include "mirror/block_map.hpp"

#include <cstdlib>
#include <cstring>
#include <new>

namespace nbdferry::mirror {

namespace {

// Single blocks armed one by one after a read error may take leaves that stale_closure() did not
// see.
constexpr std::size_t leaves_slack = 4096;

// The two-bit state `state` in each of the sixteen places of a leaf.
constexpr std::uint32_t leaf_of(std::uint8_t state) { return 0x55555555U * state; }

// Eight chunks' bytes, for the walks.
constexpr std::uint64_t word_chunks = 8;
constexpr std::uint64_t word_of(std::uint8_t byte) { return 0x0101010101010101ULL * byte; }

}  // namespace

void BlockMap::Free::operator()(std::uint8_t* p) const { std::free(p); }

BlockMap::BlockMap(std::uint64_t size, std::size_t leaves_max)
    : size_(size),
      leaves_max_(leaves_max),
      chunk_count_((size + chunk_size - 1) / chunk_size),
      // calloc: a large map costs nothing until it is touched, and zero means stale, no flags.
      chunks_(static_cast<std::uint8_t*>(std::calloc(chunk_count_ + 1, 1))),
      fresh_bytes_((chunk_count_ + group_chunks - 1) / group_chunks),
      stale_bytes_(size) {
  if (!chunks_) throw std::bad_alloc();
}

std::uint64_t BlockMap::first_other(std::uint64_t from, std::uint64_t to, std::uint8_t mask,
                                    std::uint8_t value) const {
  std::uint64_t c = from;
  for (; c + word_chunks <= to; c += word_chunks) {
    std::uint64_t word = 0;
    std::memcpy(&word, &chunks_[c], sizeof word);
    if ((word & word_of(mask)) != word_of(value)) break;
  }
  while (c < to && (chunks_[c] & mask) == value) ++c;
  return c;
}

void BlockMap::fill(std::uint64_t from, std::uint64_t to, std::uint8_t mask, std::uint8_t value) {
  std::uint64_t c = from;
  for (; c + word_chunks <= to; c += word_chunks) {
    std::uint64_t word = 0;
    std::memcpy(&word, &chunks_[c], sizeof word);
    word = (word & ~word_of(mask)) | word_of(value);
    std::memcpy(&chunks_[c], &word, sizeof word);
  }
  for (; c < to; ++c) chunks_[c] = static_cast<std::uint8_t>((chunks_[c] & ~mask) | value);
}

ByteRange BlockMap::even_run(std::uint64_t at, ByteRange range) const {
  const std::uint64_t first = at / chunk_size;
  const std::uint64_t last = range.end == size_ ? chunk_count_ : range.end / chunk_size;
  const std::uint64_t limit = std::min(last, (first / group_chunks + 1) * group_chunks);
  const std::uint8_t state = chunks_[first] & state_mask;
  if (at % chunk_size != 0 || state == mixed || first >= limit) return {at, at};
  return clip({at, first_other(first, limit, state_mask, state) * chunk_size});
}

BlockState BlockMap::block_state(std::uint64_t block) const {
  const std::uint64_t chunk = block / leaf_blocks;
  const std::uint8_t state = chunks_[chunk] & state_mask;
  if (state != mixed) return static_cast<BlockState>(state);
  return static_cast<BlockState>((leaves_.at(chunk) >> (block % leaf_blocks * 2)) & 3);
}

ByteRange BlockMap::stale_closure(ByteRange range) const {
  // Only the two chunks at the ends can be covered in part; each may need one new leaf.
  ByteRange out = range;
  std::size_t room = leaves_max_ > leaves_.size() ? leaves_max_ - leaves_.size() : 0;
  const auto widen = [&](std::uint64_t chunk) {
    const std::uint8_t state = chunks_[chunk] & state_mask;
    if (covers_chunk(range, chunk) || state == mixed ||
        state == static_cast<std::uint8_t>(BlockState::stale)) {
      return;
    }
    if (room > 0) {
      --room;
      return;
    }
    const ByteRange whole = chunk_range(chunk);
    out = {std::min(out.begin, whole.begin), std::max(out.end, whole.end)};
  };
  const std::uint64_t first = range.begin / chunk_size;
  const std::uint64_t last = (range.end - 1) / chunk_size;
  widen(first);
  if (last != first) widen(last);
  return out;
}

void BlockMap::account(std::uint64_t chunk, ByteRange part, BlockState from, BlockState to) {
  if (from == to) return;
  const std::uint64_t n = part.length();
  auto& fresh = fresh_bytes_[chunk / group_chunks];
  if (from == BlockState::stale) {
    stale_bytes_ -= n;
    fresh += n;
  }
  if (to == BlockState::stale) {
    stale_bytes_ += n;
    fresh -= n;
  }
  if (from == BlockState::armed) armed_bytes_ -= n;
  if (to == BlockState::armed) armed_bytes_ += n;
}

void BlockMap::set_part(std::uint64_t chunk, ByteRange part, BlockState state) {
  const std::uint8_t old = chunks_[chunk] & state_mask;
  if (old == static_cast<std::uint8_t>(state)) return;
  std::uint32_t leaf = old == mixed ? leaves_.at(chunk) : leaf_of(old);
  const auto value = static_cast<std::uint32_t>(state);
  for (std::uint64_t at = part.begin; at < part.end; at += block_size_min) {
    const auto shift = static_cast<unsigned>(at / block_size_min % leaf_blocks * 2);
    const auto before = static_cast<BlockState>((leaf >> shift) & 3);
    account(chunk, {at, std::min(at + block_size_min, part.end)}, before, state);
    leaf = (leaf & ~(3U << shift)) | (value << shift);
  }
  // The last chunk's leaf has places beyond the disk: they follow its first block.
  const ByteRange whole = chunk_range(chunk);
  const std::uint64_t blocks = (whole.length() + block_size_min - 1) / block_size_min;
  for (std::uint64_t b = blocks; b < leaf_blocks; ++b) {
    leaf = (leaf & ~(3U << (b * 2))) | ((leaf & 3U) << (b * 2));
  }
  if (leaf == leaf_of(leaf & 3)) {
    if (old == mixed) leaves_.erase(chunk);
    fill(chunk, chunk + 1, state_mask, leaf & 3);
    return;
  }
  leaves_[chunk] = leaf;
  fill(chunk, chunk + 1, state_mask, mixed);
}

void BlockMap::set(ByteRange range, BlockState state) {
  NBDFERRY_ASSERT(range == covering(range) && !range.empty(), "state of a part of a block");
  for (std::uint64_t at = range.begin; at < range.end;) {
    const std::uint64_t chunk = at / chunk_size;
    ByteRange part = even_run(at, range);
    if (part.empty()) {
      part = range.intersect(chunk_range(chunk));
      set_part(chunk, part, state);
    } else {
      account(chunk, part, static_cast<BlockState>(chunks_[chunk] & state_mask), state);
      fill(chunk, chunks_end(part), state_mask, static_cast<std::uint8_t>(state));
    }
    at = part.end;
  }
}

bool BlockMap::any(ByteRange range, BlockState state) const {
  for (std::uint64_t at = range.begin; at < range.end;) {
    const std::uint64_t chunk = at / chunk_size;
    const std::uint8_t s = chunks_[chunk] & state_mask;
    if (s == static_cast<std::uint8_t>(state)) return true;
    if (s != mixed) {
      at = first_other(chunk, chunks_end(range), state_mask, s) * chunk_size;
      continue;
    }
    if (block_state(at / block_size_min) == state) return true;
    at = (at / block_size_min + 1) * block_size_min;
  }
  return false;
}

bool BlockMap::all(ByteRange range, BlockState state) const {
  bool same = true;
  for_each_run(range, [&](ByteRange, BlockState s) { same = same && s == state; });
  return same;
}

std::optional<ByteRange> BlockMap::next_stale(std::uint64_t from, std::uint64_t length_max) const {
  if (from >= size_) return std::nullopt;
  for (std::uint64_t at = from / block_size_min * block_size_min; at < size_;) {
    const std::uint64_t chunk = at / chunk_size;
    const std::uint64_t group = chunk / group_chunks;
    const ByteRange group_range =
        clip({group * group_chunks * chunk_size, (group + 1) * group_chunks * chunk_size});
    if (fresh_bytes_[group] == group_range.length()) {
      at = group_range.end;
      continue;
    }
    const std::uint8_t s = chunks_[chunk] & state_mask;
    if (chunk_flag(chunk, ChunkFlag::suspect)) {
      at = (chunk + 1) * chunk_size;
      continue;
    }
    if (s != mixed && s != 0) {
      at = first_other(chunk, chunks_end(group_range), state_mask, s) * chunk_size;
      continue;
    }
    if (block_state(at / block_size_min) != BlockState::stale) {
      at += block_size_min;
      continue;
    }
    // Extend the run.
    std::uint64_t end = at;
    // Ends on a chunk's border: arming part of a wholly stale chunk would cost a leaf.
    const std::uint64_t border = (at + length_max) / chunk_size * chunk_size;
    const std::uint64_t limit = std::min(size_, border > at ? border : at + length_max);
    constexpr std::uint8_t mask = state_mask | static_cast<std::uint8_t>(ChunkFlag::suspect);
    while (end < limit) {
      const std::uint64_t c = end / chunk_size;
      if (chunk_flag(c, ChunkFlag::suspect)) break;
      const std::uint8_t cs = chunks_[c] & state_mask;
      if (cs == 0) {
        end = std::min(first_other(c, chunks_end({at, limit}), mask, 0) * chunk_size, limit);
      } else if (cs == mixed && block_state(end / block_size_min) == BlockState::stale) {
        end = std::min(end + block_size_min, limit);
      } else {
        break;
      }
    }
    return ByteRange{at, end};
  }
  return std::nullopt;
}

void BlockMap::set_flag(ByteRange range, ChunkFlag flag) {
  const auto bit = static_cast<std::uint8_t>(flag);
  fill(range.begin / chunk_size, chunks_end(range), bit, bit);
}

void BlockMap::clear_flag(ByteRange range, ChunkFlag flag) {
  fill(range.begin / chunk_size, chunks_end(range), static_cast<std::uint8_t>(flag), 0);
}

bool BlockMap::any_flag(ByteRange range, ChunkFlag flag) const {
  const std::uint64_t end = chunks_end(range);
  return first_other(range.begin / chunk_size, end, static_cast<std::uint8_t>(flag), 0) != end;
}

std::pair<ByteRange, bool> BlockMap::flag_run(ByteRange range, ChunkFlag flag) const {
  const std::uint64_t first = range.begin / chunk_size;
  const auto bit = static_cast<std::uint8_t>(flag);
  const bool on = chunk_flag(first, flag);
  const std::uint64_t end = first_other(first, chunks_end(range), bit, on ? bit : 0);
  return {{range.begin, std::min(range.end, end * chunk_size)}, on};
}

void BlockMap::check_invariants() const {
  std::uint64_t stale = 0;
  std::uint64_t armed = 0;
  std::size_t leaves = 0;
  std::vector<std::uint64_t> fresh(fresh_bytes_.size());
  for (std::uint64_t c = 0; c < chunk_count_; ++c) {
    if ((chunks_[c] & state_mask) == mixed) {
      ++leaves;
      NBDFERRY_ASSERT(leaves_.contains(c), "a mixed chunk without a leaf");
    }
    for_each_run(chunk_range(c), [&](ByteRange r, BlockState s) {
      if (s == BlockState::stale) stale += r.length();
      if (s == BlockState::armed) armed += r.length();
      if (s != BlockState::stale) fresh[c / group_chunks] += r.length();
    });
  }
  NBDFERRY_ASSERT(stale == stale_bytes_ && armed == armed_bytes_, "the map's sums are wrong");
  NBDFERRY_ASSERT(fresh == fresh_bytes_, "the map's group sums are wrong");
  NBDFERRY_ASSERT(leaves == leaves_.size() && leaves <= leaves_max_ + leaves_slack, "stray leaves");
}

}  // namespace nbdferry::mirror
