// BlockMap: for each block of the disk, does the target hold it?
//
// Two levels. One byte per 64 KiB chunk: its state (stale, armed, synced, or mixed) and flags; two
// bits per 4 KiB leaf for mixed chunks only. 16 MiB per TiB of disk, zero pages until touched, plus
// a bounded number of leaves. Where chunks are alike, as in a sparse disk, walks take eight at a
// time. All ranges given to it are multiples of 4 KiB, but for the disk's end.
//
// What must hold: a chunk has a leaf exactly when it is mixed; stale_bytes() is exact, with the
// last block counted as long as it is. Making part of a chunk stale may need a leaf that the bound
// forbids: callers widen by stale_closure() first, so that nothing becomes stale unnoticed.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "mirror/assert.hpp"
#include "mirror/types.hpp"

namespace nbdferry::mirror {

enum class BlockState : std::uint8_t { stale = 0, armed = 1, synced = 2 };

// Flags of a chunk. The two unflushed flags alternate with each flush of the target (FlushTracker).
enum class ChunkFlag : std::uint8_t {
  unflushed_even = 1 << 2,
  unflushed_odd = 1 << 3,
  suspect = 1 << 4,  // not to be armed (rule 8)
  written = 1 << 5,  // a write was sent to the target in this migration
};

class BlockMap {
 public:
  BlockMap(std::uint64_t size, std::size_t leaves_max);

  [[nodiscard]] std::uint64_t size() const { return size_; }
  [[nodiscard]] std::uint64_t stale_bytes() const { return stale_bytes_; }
  [[nodiscard]] std::uint64_t armed_bytes() const { return armed_bytes_; }
  [[nodiscard]] std::size_t leaves() const { return leaves_.size(); }

  // Whole blocks of the disk that cover `range`.
  [[nodiscard]] ByteRange covering(ByteRange range) const {
    return clip(range.widened(block_size_min));
  }

  // `range` (blocks), widened to whole chunks where making it stale would need a leaf too many.
  [[nodiscard]] ByteRange stale_closure(ByteRange range) const;

  void set(ByteRange range, BlockState state);

  // Calls f(ByteRange, BlockState) for the maximal runs of equal state in `range`, clipped to it.
  template <typename F>
  void for_each_run(ByteRange range, F&& f) const;

  [[nodiscard]] bool any(ByteRange range, BlockState state) const;
  [[nodiscard]] bool all(ByteRange range, BlockState state) const;

  // The first run of stale blocks at or after `from` outside of suspect chunks, at most
  // `length_max`.
  [[nodiscard]] std::optional<ByteRange> next_stale(std::uint64_t from,
                                                    std::uint64_t length_max) const;

  // Flags, by chunk.
  void set_flag(ByteRange range, ChunkFlag flag);
  void clear_flag(ByteRange range, ChunkFlag flag);
  [[nodiscard]] bool any_flag(ByteRange range, ChunkFlag flag) const;
  // The longest beginning of `range` whose chunks agree in the flag, and whether they have it.
  [[nodiscard]] std::pair<ByteRange, bool> flag_run(ByteRange range, ChunkFlag flag) const;
  // f(run, has_it) for these, one after another; it may change the flag within its run.
  template <typename F>
  void for_each_flag_run(ByteRange range, ChunkFlag flag, F&& f) const {
    while (!range.empty()) {
      const auto [run, on] = flag_run(range, flag);
      f(run, on);
      range.begin = run.end;
    }
  }
  [[nodiscard]] bool chunk_flag(std::uint64_t chunk, ChunkFlag flag) const {
    return (chunks_[chunk] & static_cast<std::uint8_t>(flag)) != 0;
  }

  [[nodiscard]] std::uint64_t chunk_count() const { return chunk_count_; }
  [[nodiscard]] ByteRange chunk_range(std::uint64_t chunk) const {
    return clip({chunk * chunk_size, (chunk + 1) * chunk_size});
  }

  void check_invariants() const;

 private:
  static constexpr std::uint8_t state_mask = 3;
  static constexpr std::uint8_t mixed = 3;
  static constexpr unsigned leaf_blocks = chunk_size / block_size_min;
  static constexpr std::uint64_t group_chunks = 4096;

  [[nodiscard]] ByteRange clip(ByteRange r) const { return {r.begin, std::min(r.end, size_)}; }
  [[nodiscard]] BlockState block_state(std::uint64_t block) const;
  // The whole chunks of one state, not mixed, that begin at `at`: in `range`, and in one group.
  [[nodiscard]] ByteRange even_run(std::uint64_t at, ByteRange range) const;
  [[nodiscard]] bool covers_chunk(ByteRange range, std::uint64_t chunk) const {
    return range.contains(chunk_range(chunk));
  }
  // The first chunk in [from, to) whose byte is not `value` under `mask`; `to` when all are.
  [[nodiscard]] std::uint64_t first_other(std::uint64_t from, std::uint64_t to, std::uint8_t mask,
                                          std::uint8_t value) const;
  // Replaces these bits of all bytes in [from, to).
  void fill(std::uint64_t from, std::uint64_t to, std::uint8_t mask, std::uint8_t value);
  [[nodiscard]] static std::uint64_t chunks_end(ByteRange range) {
    return (range.end + chunk_size - 1) / chunk_size;
  }
  void set_part(std::uint64_t chunk, ByteRange part, BlockState state);
  void account(std::uint64_t chunk, ByteRange part, BlockState from, BlockState to);

  std::uint64_t size_;
  std::size_t leaves_max_;
  std::uint64_t chunk_count_;
  struct Free {
    void operator()(std::uint8_t* p) const;
  };
  std::unique_ptr<std::uint8_t[], Free> chunks_;
  std::unordered_map<std::uint64_t, std::uint32_t> leaves_;  // chunk -> two bits a block
  std::vector<std::uint64_t> fresh_bytes_;                   // per group: bytes that are not stale
  std::uint64_t stale_bytes_;
  std::uint64_t armed_bytes_ = 0;
};

template <typename F>
void BlockMap::for_each_run(ByteRange range, F&& f) const {
  std::uint64_t run_begin = range.begin;
  std::optional<BlockState> run;
  const auto extend = [&](std::uint64_t at, BlockState state) {
    if (run && *run != state) {
      f(ByteRange{run_begin, at}, *run);
      run_begin = at;
    }
    run = state;
  };
  for (std::uint64_t at = range.begin; at < range.end;) {
    const std::uint64_t chunk = at / chunk_size;
    const std::uint8_t state = chunks_[chunk] & state_mask;
    if (state != mixed) {
      extend(at, static_cast<BlockState>(state));
      at = first_other(chunk, chunks_end(range), state_mask, state) * chunk_size;
    } else {
      extend(at, block_state(at / block_size_min));
      at = (at / block_size_min + 1) * block_size_min;
    }
  }
  if (run) f(ByteRange{run_begin, range.end}, *run);
}

}  // namespace nbdferry::mirror
