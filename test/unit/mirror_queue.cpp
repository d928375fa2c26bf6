// MirrorQueue against a naive twin: for each byte, what the target is to get.
#include "mirror/mirror_queue.hpp"

#include <cstring>
#include <map>
#include <random>
#include <vector>

#include <doctest/doctest.h>

namespace nbdferry::mirror {

namespace {

MirrorEntry write_of(ByteRange range, int value) {
  Buffer b(range.length());
  std::memset(b.data(), value, b.size());
  MirrorEntry e;
  e.range = range;
  e.payload = std::move(b).freeze();
  return e;
}

MirrorQueue plain_queue() {
  return MirrorQueue([](OpId, int) { FAIL("nobody waits"); });
}

}  // namespace

TEST_CASE("what is queued later supersedes what it covers, in the oldest one's place") {
  MirrorQueue q = plain_queue();
  CHECK_FALSE(q.push(write_of({0, 4096}, 1)));
  CHECK_FALSE(q.push(write_of({8192, 12288}, 2)));
  CHECK(q.push(write_of({0, 4096}, 3)));
  CHECK(q.size() == 2);
  CHECK(q.bytes() == 8192);
  CHECK(q.superseded_bytes() == 4096);
  const MirrorEntry first = q.take_next();
  CHECK(first.range == ByteRange{0, 4096});
  CHECK(first.payload.data()[0] == std::byte{3});
  CHECK(q.take_next().range.begin == 8192);
  CHECK(q.next() == nullptr);
}

TEST_CASE("what a guest waits for goes out first") {
  MirrorQueue q = plain_queue();
  q.push(write_of({0, 4096}, 1));
  MirrorEntry waited = write_of({8192, 12288}, 2);
  waited.waiter = OpId{7};
  q.push(std::move(waited));
  CHECK(q.take_next().waiter == OpId{7});
  CHECK(q.take_next().range.begin == 0);
}

TEST_CASE("a waiter is told when its entry is split or dropped") {
  std::map<OpId, int> pieces;
  MirrorQueue q([&](OpId waiter, int delta) { pieces[waiter] += delta; });
  MirrorEntry e = write_of({0, 16384}, 1);
  e.waiter = OpId{3};
  pieces[OpId{3}] = 1;
  q.push(std::move(e));
  q.discard({4096, 8192});
  CHECK(pieces[OpId{3}] == 2);
  q.discard({0, 4096});
  CHECK(pieces[OpId{3}] == 1);
  q.discard({0, 1 << 20});
  CHECK(pieces[OpId{3}] == 0);
  CHECK(q.empty());
  CHECK(q.bytes() == 0);
}

TEST_CASE("an epoch is sent and answered before the next is offered, and not superseded by it") {
  MirrorQueue q = plain_queue();
  q.close_epoch();
  CHECK(q.open_epoch() == 0);  // nothing is in it
  q.push(write_of({0, 4096}, 1));
  q.push(write_of({8192, 12288}, 2));
  q.close_epoch();
  q.close_epoch();
  CHECK(q.open_epoch() == 1);
  CHECK_FALSE(q.push(write_of({0, 4096}, 3)));
  CHECK(q.push(write_of({0, 4096}, 4)));
  CHECK(q.size() == 3);
  CHECK(q.overlaps({0, 1}));
  CHECK(q.take_next().payload.data()[0] == std::byte{1});
  CHECK(q.take_next().range.begin == 8192);
  CHECK(q.next() == nullptr);
  q.answered();
  CHECK(q.next() == nullptr);
  q.answered();
  CHECK(q.first_epoch() == 1);
  CHECK(q.take_next().payload.data()[0] == std::byte{4});
  q.answered();
  q.check_invariants();
}

TEST_CASE("an epoch does not end while an entry of it is still to come, or when it is discarded") {
  MirrorQueue q = plain_queue();
  q.expect(0);
  q.close_epoch();
  q.push(write_of({0, 4096}, 2));
  CHECK(q.next() == nullptr);
  q.push(write_of({4096, 8192}, 1), 0);
  q.expected_came(0);
  CHECK(q.next()->range.begin == 4096);
  CHECK(q.beyond(0).front().begin == 4096);  // the older epoch first
  q.discard({4096, 8192});
  CHECK(q.next()->range.begin == 0);
  q.check_invariants();
}

TEST_CASE("a parked entry waits for its operation, its rests too") {
  MirrorQueue q = plain_queue();
  q.push(write_of({0, 16384}, 1));
  q.park_next(OpId{9});
  CHECK(q.next() == nullptr);
  q.discard({4096, 8192});
  CHECK(q.next() == nullptr);
  q.unpark(OpId{8});
  CHECK(q.next() == nullptr);
  q.unpark(OpId{9});
  CHECK(q.take_next().range == ByteRange{0, 4096});
  CHECK(q.take_next().range == ByteRange{8192, 16384});
  q.check_invariants();
}

TEST_CASE("beyond: the younger entries, past the bytes that are kept") {
  MirrorQueue q = plain_queue();
  for (std::uint64_t i = 0; i < 4; ++i) q.push(write_of({i * 8192, i * 8192 + 4096}, 1));
  CHECK(q.beyond(4 * 4096).empty());
  const auto over = q.beyond(2 * 4096);
  REQUIRE(over.size() == 2);
  CHECK(over[0].begin == 2 * 8192);
  CHECK(q.beyond(0).size() == 4);
}

TEST_CASE("the queue agrees with a value for each byte") {
  std::mt19937 random(4);
  constexpr std::uint64_t size = 64 * 1024;
  constexpr int nothing = -1;
  MirrorQueue q = plain_queue();
  std::vector<int> twin(size, nothing);
  std::vector<OpId> parked;
  std::uint64_t last_op = 0;
  for (int step = 0; step < 20'000; ++step) {
    const std::uint64_t begin = random() % size;
    const ByteRange r{begin, std::min<std::uint64_t>(size, begin + random() % 6000 + 1)};
    switch (random() % 6) {
      case 0:
      case 1:
      case 2: {
        const int value = step % 251;
        q.push(write_of(r, value));
        std::fill(twin.begin() + static_cast<std::ptrdiff_t>(r.begin),
                  twin.begin() + static_cast<std::ptrdiff_t>(r.end), value);
        break;
      }
      case 3:
        q.discard(r);
        std::fill(twin.begin() + static_cast<std::ptrdiff_t>(r.begin),
                  twin.begin() + static_cast<std::ptrdiff_t>(r.end), nothing);
        break;
      case 4:
        if (q.next() == nullptr) break;
        if (random() % 2 == 0) {
          parked.push_back(OpId{++last_op});
          q.park_next(parked.back());
          break;
        } else {
          const MirrorEntry e = q.take_next();
          for (std::uint64_t at = e.range.begin; at < e.range.end; ++at) {
            REQUIRE(static_cast<int>(e.payload.data()[at - e.range.begin]) == twin[at]);
            twin[at] = nothing;
          }
        }
        break;
      default:
        if (parked.empty()) break;
        q.unpark(parked.back());
        parked.pop_back();
        break;
    }
    REQUIRE(q.overlaps({begin, begin + 1}) == (twin[begin] != nothing));
    if (step % 200 == 0) q.check_invariants();
  }
  std::uint64_t bytes = 0;
  for (const int value : twin) bytes += value == nothing ? 0 : 1;
  CHECK(q.bytes() == bytes);
}

TEST_CASE("a small rest does not keep a large write's memory") {
  MirrorQueue q = plain_queue();
  q.push(write_of({0, 1 << 20}, 1));
  CHECK(q.storage_bytes() == 1 << 20);
  q.discard({4096, 1 << 20});
  CHECK(q.bytes() == 4096);
  CHECK(q.storage_bytes() == 4096);
  CHECK(q.next()->payload.storage_bytes() == 4096);
}

}  // namespace nbdferry::mirror
