// BlockMap against a naive twin: one state for each block, in a plain vector.
#include <random>
#include <vector>

#include <doctest/doctest.h>

#include "mirror/block_map.hpp"

namespace nbdferry::mirror {

namespace {

constexpr std::uint64_t blocks_per_chunk = chunk_size / block_size_min;

struct Twin {
  explicit Twin(std::uint64_t disk)
      : size(disk), states((disk + block_size_min - 1) / block_size_min, BlockState::stale) {}

  [[nodiscard]] std::uint64_t bytes(std::size_t block) const {
    return std::min((block + 1) * block_size_min, size) - block * block_size_min;
  }
  [[nodiscard]] std::uint64_t sum(BlockState s) const {
    std::uint64_t n = 0;
    for (std::size_t b = 0; b < states.size(); ++b) n += states[b] == s ? bytes(b) : 0;
    return n;
  }
  void set(ByteRange r, BlockState s) {
    for (std::uint64_t at = r.begin; at < r.end; at += block_size_min) {
      states[at / block_size_min] = s;
    }
  }
  [[nodiscard]] bool any(ByteRange r, BlockState s) const {
    for (std::uint64_t at = r.begin; at < r.end; at += block_size_min) {
      if (states[at / block_size_min] == s) return true;
    }
    return false;
  }

  std::uint64_t size;
  std::vector<BlockState> states;
};

void check_same(const BlockMap& map, const Twin& twin) {
  map.check_invariants();
  REQUIRE(map.stale_bytes() == twin.sum(BlockState::stale));
  REQUIRE(map.armed_bytes() == twin.sum(BlockState::armed));
  std::uint64_t at = 0;
  map.for_each_run({0, map.size()}, [&](ByteRange r, BlockState s) {
    REQUIRE(r.begin == at);
    for (; at < r.end; at += block_size_min) REQUIRE(twin.states[at / block_size_min] == s);
    at = r.end;
  });
  REQUIRE(at == map.size());
}

ByteRange random_range(std::mt19937& random, const BlockMap& map) {
  const std::uint64_t begin = random() % map.size();
  const std::uint64_t length = random() % (random() % 2 == 0 ? 20'000 : 200'000) + 1;
  return map.covering({begin, std::min(begin + length, map.size())});
}

}  // namespace

TEST_CASE("a new map is stale all over, to the last byte") {
  const BlockMap map(10 * chunk_size + 777, 10);
  CHECK(map.stale_bytes() == 10 * chunk_size + 777);
  CHECK(map.leaves() == 0);
  CHECK(map.all({0, map.size()}, BlockState::stale));
}

TEST_CASE("the map agrees with a vector of states") {
  std::mt19937 random(2);
  for (const std::uint64_t size : {4096ULL, 1000ULL, 65536ULL * 3, 65536ULL * 7 + 5000}) {
    CAPTURE(size);
    BlockMap map(size, 1000);
    Twin twin(size);
    for (int step = 0; step < 3000; ++step) {
      const ByteRange r = random_range(random, map);
      const auto state = static_cast<BlockState>(random() % 3);
      map.set(r, state);
      twin.set(r, state);
      const ByteRange q = random_range(random, map);
      const auto asked = static_cast<BlockState>(random() % 3);
      REQUIRE(map.any(q, asked) == twin.any(q, asked));
      if (step % 50 == 0) check_same(map, twin);
    }
  }
}

TEST_CASE("the next stale run begins where the twin's does") {
  std::mt19937 random(3);
  const std::uint64_t size = chunk_size * 6 + 1234;
  BlockMap map(size, 1000);
  Twin twin(size);
  for (int step = 0; step < 3000; ++step) {
    const ByteRange r = random_range(random, map);
    const auto state = random() % 4 == 0 ? BlockState::stale : BlockState::synced;
    map.set(r, state);
    twin.set(r, state);
    const std::uint64_t from = random() % (size + 1);
    std::size_t block = from / block_size_min;
    if (from == size) block = twin.states.size();
    while (block < twin.states.size() && twin.states[block] != BlockState::stale) ++block;
    const auto run = map.next_stale(from, chunk_size);
    REQUIRE(run.has_value() == (block < twin.states.size()));
    if (!run) continue;
    REQUIRE(run->begin == block * block_size_min);
    REQUIRE(run->length() <= chunk_size);
    REQUIRE(map.all(*run, BlockState::stale));
  }
}

// Long runs of chunks that are alike are walked in words: borders of words, groups and flags.
TEST_CASE("the map agrees with a vector where it is large and even") {
  std::mt19937 random(4);
  const std::uint64_t size = 9000 * chunk_size + 5000;
  BlockMap map(size, 1000);
  Twin twin(size);
  std::vector<bool> flags(map.chunk_count());
  for (int step = 0; step < 400; ++step) {
    const std::uint64_t fine = step % 4 == 0 ? block_size_min : chunk_size;
    const std::uint64_t a = random() % (size / fine) * fine;
    const std::uint64_t b = step % 16 == 0 ? size : random() % (size / fine) * fine;
    const ByteRange r{std::min(a, b), std::max(a, b)};
    if (r.empty()) continue;
    const auto state = static_cast<BlockState>(random() % 3);
    map.set(r, state);
    twin.set(r, state);
    const ByteRange f = map.chunk_range(random() % map.chunk_count());
    const bool on = random() % 2 == 0;
    const ByteRange flagged{f.begin, std::min(size, f.end + random() % 100 * chunk_size)};
    if (on) {
      map.set_flag(flagged, ChunkFlag::written);
    } else {
      map.clear_flag(flagged, ChunkFlag::written);
    }
    for (std::uint64_t c = f.begin / chunk_size; c * chunk_size < flagged.end; ++c) flags[c] = on;
    REQUIRE(map.any(r, BlockState::armed) == twin.any(r, BlockState::armed));
    const auto first = std::find(flags.begin() + static_cast<std::ptrdiff_t>(r.begin / chunk_size),
                                 flags.end(), true);
    const auto chunk = static_cast<std::uint64_t>(first - flags.begin());
    REQUIRE(map.any_flag(r, ChunkFlag::written) == (chunk * chunk_size < r.end));
    const auto [run, set] = map.flag_run(r, ChunkFlag::written);
    REQUIRE(set == flags[r.begin / chunk_size]);
    const std::uint64_t unlike = set ? run.end : std::min(chunk * chunk_size, r.end);
    REQUIRE((run.begin == r.begin && run.end == unlike));
    REQUIRE((run.end == r.end || flags[run.end / chunk_size] != set));
    if (step % 20 == 0) check_same(map, twin);
  }
}

TEST_CASE("a run never reaches into a suspect chunk") {
  BlockMap map(chunk_size * 4, 100);
  map.set_flag(map.chunk_range(1), ChunkFlag::suspect);
  CHECK(map.next_stale(0, chunk_size * 4) == ByteRange{0, chunk_size});
  CHECK(map.next_stale(chunk_size, chunk_size * 4) == ByteRange{2 * chunk_size, 4 * chunk_size});
  map.clear_flag(map.chunk_range(1), ChunkFlag::suspect);
  CHECK(map.next_stale(0, chunk_size * 4) == ByteRange{0, 4 * chunk_size});
}

TEST_CASE("beyond the bound on leaves, a part takes its chunk with it") {
  BlockMap map(chunk_size * 4, 1);
  map.set({0, map.size()}, BlockState::synced);
  const ByteRange first{0, block_size_min};
  CHECK(map.stale_closure(first) == first);
  map.set(first, BlockState::stale);
  CHECK(map.leaves() == 1);
  const ByteRange other{chunk_size, chunk_size + block_size_min};
  CHECK(map.stale_closure(other) == map.chunk_range(1));
  // A chunk that is mixed or stale already costs nothing.
  CHECK(map.stale_closure({block_size_min, 2 * block_size_min}).length() == block_size_min);
  map.set(map.chunk_range(2), BlockState::stale);
  const ByteRange in_stale{2 * chunk_size, 2 * chunk_size + block_size_min};
  CHECK(map.stale_closure(in_stale) == in_stale);
  static_assert(blocks_per_chunk == 16);
}

}  // namespace nbdferry::mirror
