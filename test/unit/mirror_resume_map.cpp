// What a restart may still believe of the target.
#include <map>
#include <random>
#include <vector>

#include <doctest/doctest.h>

#include "mirror/resume_map.hpp"

namespace nbdferry::mirror {

namespace {

struct Memory {
  explicit Memory(std::uint64_t size)
      : words(ResumeMap::bytes_for(size) / sizeof(std::uint64_t)), map(bytes(), size) {}
  std::span<std::byte> bytes() { return std::as_writable_bytes(std::span(words)); }
  std::vector<std::uint64_t> words;
  ResumeMap map;
};

std::uint64_t chunks(std::uint64_t n) { return n * chunk_size; }

Ranges clean_runs(const ResumeMap& map) {
  Ranges out;
  map.for_each_clean([&](ByteRange run) { out.push_back(run); });
  return out;
}

}  // namespace

TEST_CASE("resume map: without memory nothing is kept") {
  ResumeMap map;
  map.send({0, 1});
  map.trust({0, chunk_size});
  CHECK_FALSE(map.kept());
  CHECK(clean_runs(map).empty());
  CHECK(map.sent().empty());
  CHECK(map.recent().empty());
  CHECK_FALSE(map.is_clean({0, 1}));
  map.set_differing(1);
  map.set_verified(1);
  CHECK(map.differing() + map.verified() == 0);
}

TEST_CASE("resume map: it is in its memory, and another one finds it there") {
  const std::uint64_t size = chunks(130) + 5;
  Memory m(size);
  m.map.trust({chunks(2), chunks(5)});
  m.map.trust({chunks(129), size});
  m.map.send({chunks(3) + 7, chunks(3) + 8});
  const ResumeMap next(m.bytes(), size);
  CHECK(clean_runs(next) ==
        Ranges{{chunks(2), chunks(3)}, {chunks(4), chunks(5)}, {chunks(129), size}});
  CHECK(next.sent() == Ranges{{chunks(3), chunks(4)}});
  CHECK(next.recent() == Ranges{{chunks(4), chunks(5)}, {chunks(130), size}});
  CHECK(next.is_in(m.bytes()));
}

TEST_CASE("resume map: what became clean last is remembered, as long as it is") {
  Memory m(chunks(1000));
  for (std::uint64_t c = 0; c < 200; ++c) m.map.trust({chunks(c), chunks(c + 1)});
  m.map.touch({chunks(199), chunks(199) + 1});
  const Ranges recent = m.map.recent();
  CHECK(recent.size() == 62);
  for (const auto& r : recent) CHECK((r.begin >= chunks(137) && r.end <= chunks(199)));
}

TEST_CASE("resume map: what verifications have found is in it, apart from the chunks") {
  const std::uint64_t size = chunks(130) + 5;
  Memory m(size);
  CHECK(m.map.differing() == 0);
  CHECK(m.map.verified() == 0);
  m.map.set_differing(4096);
  m.map.set_verified(chunks(7));
  m.map.touch({0, size});
  const ResumeMap next(m.bytes(), size);
  CHECK(next.differing() == 4096);
  CHECK(next.verified() == chunks(7));
  CHECK(clean_runs(next).empty());
  CHECK(next.sent().empty());
  CHECK(next.recent().empty());
}

TEST_CASE("resume map: bits beyond the disk's end, in memory that was tampered with, are none") {
  Memory m(chunks(3));
  for (auto& word : m.words) word = ~std::uint64_t{0};
  CHECK(clean_runs(m.map) == Ranges{{0, chunks(3)}});
  CHECK(m.map.sent() == Ranges{{0, chunks(3)}});
  CHECK(m.map.recent().empty());
  CHECK(m.map.verified() == chunks(3));
}

TEST_CASE("resume map: agrees with a bit for each chunk") {
  std::mt19937_64 random(3);
  for (int round = 0; round < 50; ++round) {
    const std::uint64_t count = 1 + random() % 200;
    const std::uint64_t size = chunks(count) - random() % chunk_size;
    Memory m(size);
    std::map<std::uint64_t, bool> clean;
    std::map<std::uint64_t, bool> sent;
    for (int step = 0; step < 60; ++step) {
      const std::uint64_t first = random() % count;
      const std::uint64_t end = std::min(count, first + 1 + random() % 80);
      const ByteRange range{chunks(first), std::min(size, chunks(end))};
      const auto what = random() % 4;
      if (what == 0) m.map.touch(range);
      if (what == 1) m.map.send(range);
      if (what == 2) m.map.settle(range);
      if (what == 3) m.map.trust(range);
      for (std::uint64_t c = first; c < end; ++c) {
        if (what != 2) clean[c] = what == 3;
        if (what == 1 || what == 2) sent[c] = what == 1;
      }
    }
    const auto covered = [](const Ranges& runs, std::uint64_t chunk) {
      return !intersection(runs, {chunks(chunk), chunks(chunk) + 1}).empty();
    };
    for (std::uint64_t c = 0; c < count; ++c) {
      CHECK(covered(clean_runs(m.map), c) == clean[c]);
      CHECK(covered(m.map.sent(), c) == sent[c]);
      CHECK(m.map.is_clean({chunks(c), chunks(c) + 1}) == clean[c]);
    }
  }
}

}  // namespace nbdferry::mirror
