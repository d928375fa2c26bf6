// Lists of ranges, what is in flight on the target, what is unflushed, suspects.
#include <random>
#include <vector>

#include <doctest/doctest.h>

#include "mirror/flush_tracker.hpp"
#include "mirror/ranges.hpp"
#include "mirror/suspects.hpp"
#include "mirror/target_ops.hpp"

namespace nbdferry::mirror {

TEST_CASE("widening moves both ends outwards") {
  CHECK(ByteRange{1, 2}.widened(4096) == ByteRange{0, 4096});
  CHECK(ByteRange{4096, 8192}.widened(4096) == ByteRange{4096, 8192});
  CHECK(ByteRange{4095, 4097}.widened(4096) == ByteRange{0, 8192});
  CHECK(ByteRange{5, 9}.widened(1) == ByteRange{5, 9});
}

TEST_CASE("lists of ranges agree with a bit for each byte") {
  std::mt19937 random(5);
  for (int round = 0; round < 300; ++round) {
    std::vector<bool> twin(64, true);
    Ranges list{{0, 64}};
    for (int step = 0; step < 12; ++step) {
      const std::uint64_t begin = random() % 64;
      const ByteRange hole{begin, begin + random() % 10};
      bool taken = false;
      for (std::uint64_t at = hole.begin; at < std::min<std::uint64_t>(hole.end, 64); ++at) {
        taken = taken || twin[at];
        twin[at] = false;
      }
      if (hole.empty()) continue;
      REQUIRE(subtract(list, hole) == taken);
      std::vector<bool> now(64, false);
      std::uint64_t end = 0;
      for (const auto& r : list) {
        REQUIRE(!r.empty());
        REQUIRE(r.begin >= end);
        end = r.end;
        for (std::uint64_t at = r.begin; at < r.end; ++at) now[at] = true;
      }
      REQUIRE(now == twin);
      REQUIRE(total(intersection(list, {10, 20})) ==
              static_cast<std::uint64_t>(std::count(twin.begin() + 10, twin.begin() + 20, true)));
    }
  }
}

TEST_CASE("operations on the target conflict when their blocks do") {
  TargetOps ops;
  ops.set_window(3, 10'000);
  ops.set_alignment(4096);
  const auto op = [](std::uint64_t id, ByteRange r) {
    TargetOp o;
    o.id = OpId{id};
    o.range = r;
    o.window_bytes = r.length();
    return o;
  };
  ops.add(op(1, {512, 1024}));
  CHECK(ops.conflict({2048, 2560}) == OpId{1});  // the same 4 KiB
  CHECK_FALSE(ops.conflict({4096, 8192}));
  ops.add(op(2, {8192, 12288}));
  CHECK(ops.conflict({0, 1 << 20}).has_value());
  CHECK(ops.conflict({12287, 12289}) == OpId{2});
  CHECK(ops.has_room(5'000));
  CHECK_FALSE(ops.has_room(6'000));  // bytes
  TargetOp flush;
  flush.id = OpId{3};
  flush.kind = OpKind::flush;
  flush.command = Command::flush;
  ops.add(flush);
  CHECK_FALSE(ops.has_room(0));  // operations
  CHECK(ops.remove(OpId{1}).range.begin == 512);
  CHECK_FALSE(ops.conflict({0, 4096}));
  ops.check_invariants();
}

TEST_CASE("an operation larger than the window goes alone") {
  TargetOps ops;
  ops.set_window(4, 1000);
  CHECK(ops.has_room(5000));
  ops.set_window(0, 0);
  CHECK_FALSE(ops.has_room(0));
}

TEST_CASE("a flush covers what was acknowledged before its submission, and no more") {
  BlockMap map(chunk_size * 4, 100);
  FlushTracker tracker;
  tracker.written(map, map.chunk_range(0));
  tracker.begin();
  tracker.written(map, map.chunk_range(1));
  tracker.written(map, map.chunk_range(0));  // again, after the flush had been sent
  tracker.succeeded(map);
  CHECK_FALSE(tracker.clean());
  const auto lost = tracker.failed(map);
  CHECK(lost == Ranges{map.chunk_range(1), map.chunk_range(0)});
  CHECK(tracker.clean());
}

TEST_CASE("a failed flush gives back both epochs") {
  BlockMap map(chunk_size * 4, 100);
  FlushTracker tracker;
  tracker.written(map, map.chunk_range(3));
  tracker.begin();
  tracker.written(map, map.chunk_range(2));
  CHECK(tracker.failed(map) == Ranges{map.chunk_range(3), map.chunk_range(2)});
  tracker.written(map, map.chunk_range(3));
  CHECK(tracker.unflushed_runs() == 1);
}

TEST_CASE("what the target was found to hold is unflushed, too; neighbours are one run") {
  const std::uint64_t size = chunk_size * 4 - 4096;
  BlockMap map(size, 100);
  FlushTracker tracker;
  tracker.found(map, {0, chunk_size + 1});
  tracker.written(map, {chunk_size, chunk_size + 4096});
  tracker.found(map, {chunk_size, size});
  CHECK(tracker.unflushed_runs() == 1);
  CHECK(tracker.unflushed_bytes() == 4096);
  CHECK(tracker.failed(map) == Ranges{{0, size}});
  CHECK_FALSE(map.any_flag({0, size}, ChunkFlag::unflushed_even));
}

TEST_CASE("suspects end when their time comes, and count each byte once") {
  Suspects suspects;
  suspects.add({0, 8192}, Time{100});
  suspects.add({4096, 12288}, Time{200});
  CHECK(suspects.bytes() == 12288);
  CHECK(suspects.any({8192, 8193}));
  CHECK(suspects.expire(Time{99}).empty());
  CHECK(suspects.expire(Time{100}).size() == 1);
  CHECK(suspects.bytes() == 8192);
  CHECK_FALSE(suspects.any({0, 4096}));
  CHECK(suspects.expire(Time{1000}).size() == 1);
  CHECK(suspects.empty());
}

}  // namespace nbdferry::mirror
