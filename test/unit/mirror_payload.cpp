// Payload and Buffer: sharing, slices, alignment, reuse of storage.
#include <cstring>
#include <fstream>
#include <random>
#include <vector>

#include <malloc.h>

#include <doctest/doctest.h>

#include "mirror/payload.hpp"

namespace nbdferry {

namespace {

Buffer filled(std::size_t size, int seed) {
  Buffer b(size);
  for (std::size_t i = 0; i < size; ++i) {
    b.data()[i] = static_cast<std::byte>(seed + static_cast<int>(i));
  }
  return b;
}

}  // namespace

TEST_CASE("an empty payload has no bytes and no storage") {
  const Payload p;
  CHECK(p.empty());
  CHECK(p.data() == nullptr);
  CHECK(p.storage_bytes() == 0);
  CHECK(Payload::copy_of({}).empty());
}

TEST_CASE("freezing keeps the bytes where they are and empties the buffer") {
  Buffer b = filled(5000, 1);
  const std::byte* at = b.data();
  const Payload p = std::move(b).freeze(4000);
  CHECK(p.data() == at);
  CHECK(p.size() == 4000);
  CHECK(b.data() == nullptr);  // NOLINT: the state after a move is the point
}

TEST_CASE("slices share storage and outlive what they were cut from") {
  Payload rest;
  {
    const Payload whole = filled(8192, 7).freeze();
    rest = whole.slice(4096, 100).slice(10, 20);
    CHECK(rest.data() == whole.data() + 4106);
    CHECK(rest.storage_bytes() == whole.storage_bytes());
  }
  REQUIRE(rest.size() == 20);
  for (std::size_t i = 0; i < rest.size(); ++i) {
    CHECK(rest.data()[i] == static_cast<std::byte>(7 + 4106 + static_cast<int>(i)));
  }
}

TEST_CASE("storage is aligned for what O_DIRECT needs") {
  for (const std::size_t size : {1, 512, 513, 4096, 5000, 16384, 16385, 262144, 1 << 20}) {
    CAPTURE(size);
    std::vector<Buffer> several;
    for (int i = 0; i < 5; ++i) {
      several.emplace_back(size);
      const auto address = reinterpret_cast<std::uintptr_t>(several.back().data());
      CHECK(address % (size >= 4096 ? 4096 : 512) == 0);
    }
  }
}

TEST_CASE("zeroes are zeroes, in reused storage as well") {
  { const Payload dirt = filled(4096, 1).freeze(); }
  const Payload p = Payload::zeroes(4096);
  for (const std::byte b : p.bytes()) REQUIRE(b == std::byte{0});
}

TEST_CASE("storage exceeds what is asked for by a quarter or a page at most") {
  for (std::size_t size = 1; size <= 64UL << 20; size += 1 + size / 37) {
    CAPTURE(size);
    const Payload p = Buffer(size).freeze();
    REQUIRE(p.storage_bytes() >= size);
    REQUIRE(p.storage_bytes() < std::max(size + size / 4 + 1, size + 4096));
    REQUIRE(p.compact_bytes() == p.storage_bytes());
  }
}

TEST_CASE("a compact payload keeps no more than it needs") {
  const Payload whole = filled(1 << 20, 3).freeze();
  CHECK(whole.compact().data() == whole.data());
  const Payload part = whole.slice(70'000, 5'000);
  CHECK(part.storage_bytes() == 1 << 20);
  const Payload alone = part.compact();
  CHECK(part.compact_bytes() == 8192);
  CHECK(alone.storage_bytes() == 8192);
  CHECK(std::memcmp(alone.data(), part.data(), part.size()) == 0);
  CHECK(whole.slice(7, 0).compact().storage_bytes() == 0);
}

// Memory that is resident, from /proc/self/statm; with the heap as the program sets it (the address
// sanitizer's keeps what is freed), and from the start as there: what the other test cases free while it is
// otherwise stays in the heap, and counts here.
#ifndef __SANITIZE_ADDRESS__
const int heap_set = mallopt(M_MMAP_THRESHOLD, 36 * 1024);

TEST_CASE("what a burst of every size leaves behind is small") {
  REQUIRE(heap_set == 1);
  std::vector<Payload> burst;
  for (const std::size_t size : {512, 4096, 10'000, 30'000, 65'536, 262'144, 5'000'000}) {
    for (std::size_t bytes = 0; bytes < 32UL << 20; bytes += size) {
      burst.push_back(Payload::zeroes(size));
    }
    burst.clear();
  }
  burst.shrink_to_fit();
  std::size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages >> pages;
  CHECK(pages * 4096 < 64UL << 20);
}
#endif

// Against a naive twin: every payload has a plain copy of what it must hold.
TEST_CASE("payloads stay as they were, whatever happens to others") {
  std::mt19937 random(1);
  struct Held {
    Payload payload;
    std::vector<std::byte> twin;
  };
  std::vector<Held> held;
  for (int step = 0; step < 20'000; ++step) {
    const auto dice = random() % 4;
    if (dice == 0 || held.empty()) {
      const std::size_t size = random() % (random() % 8 == 0 ? 100'000 : 5'000);
      Payload p = filled(size, static_cast<int>(random() % 256)).freeze();
      held.push_back({p, {p.bytes().begin(), p.bytes().end()}});
      continue;
    }
    const std::size_t i = random() % held.size();
    const std::size_t size = held[i].payload.size();
    if (dice == 1 && size > 0) {
      const std::size_t from = random() % size;
      const std::size_t n = random() % (size - from + 1);
      const auto begin = held[i].twin.begin() + static_cast<std::ptrdiff_t>(from);
      std::vector<std::byte> twin(begin, begin + static_cast<std::ptrdiff_t>(n));
      held.push_back({held[i].payload.slice(from, n), std::move(twin)});
    } else if (dice == 2) {
      held[i] = held[random() % held.size()];
    } else {
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (held.size() > 200) held.erase(held.begin(), held.begin() + 100);
    if (step % 500 != 0) continue;
    for (const auto& h : held) {
      REQUIRE(h.payload.size() == h.twin.size());
      REQUIRE((h.twin.empty() || std::memcmp(h.payload.data(), h.twin.data(), h.twin.size()) == 0));
    }
  }
}

}  // namespace nbdferry
