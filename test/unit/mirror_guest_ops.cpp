// GuestOps: the one order of the guest's overlapping writes (rule 4).
#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

#include <doctest/doctest.h>

#include "mirror/guest_ops.hpp"

namespace nbdferry::mirror {
namespace {

constexpr std::uint64_t kib = 1024;
constexpr std::uint64_t align = 4 * kib;

GuestRequest request(std::uint64_t begin, std::uint64_t end, Command command = Command::write) {
  GuestRequest r;
  r.id = RequestId{begin};
  r.command = command;
  r.range = {begin, end};
  return r;
}

// Operations numbered by the test, beside what they do.
class Ops {
 public:
  GuestOps ops;

  // True: it could be admitted at once, and was.
  bool add(std::uint64_t id, std::uint64_t begin, std::uint64_t end,
           Command command = Command::write, std::uint64_t alignment = align) {
    GuestOp& op = ops.add(OpId{id}, request(begin, end, command), alignment);
    if (!GuestOps::runnable(op)) return false;
    if (is_write(command)) ops.admit(op, Time{0});
    return true;
  }
  // Ends one and admits those that waited for it; returns them.
  std::vector<std::uint64_t> end(std::uint64_t id) {
    std::vector<std::uint64_t> out;
    for (const OpId next : ops.remove(OpId{id})) {
      ops.admit(*ops.find(next), Time{0});
      out.push_back(static_cast<std::uint64_t>(next));
    }
    ops.check_invariants();
    return out;
  }
};

using Ids = std::vector<std::uint64_t>;

}  // namespace

TEST_CASE("guest ops: disjoint writes run together, overlapping ones in order of arrival") {
  Ops o;
  CHECK(o.add(1, 0, 8 * kib));
  CHECK(o.add(2, 8 * kib, 12 * kib));
  CHECK_FALSE(o.add(3, 4 * kib, 12 * kib));  // behind both
  CHECK_FALSE(o.add(4, 0, 8 * kib));         // behind 1 and 3
  CHECK(o.ops.running() == 2);
  CHECK(o.end(1).empty());
  CHECK(o.end(2) == Ids{3});
  CHECK(o.end(3) == Ids{4});
  CHECK(o.end(4).empty());
  CHECK(o.ops.size() == 0);
  CHECK(o.ops.running() == 0);
}

TEST_CASE("guest ops: a write waits for one that waits itself, though nothing that runs overlaps") {
  Ops o;
  CHECK(o.add(1, 0, 4 * kib));
  CHECK_FALSE(o.add(2, 0, 8 * kib));
  CHECK_FALSE(o.add(3, 4 * kib, 8 * kib));  // only behind 2: it must not overtake it
  CHECK(o.add(4, 8 * kib, 12 * kib));
  CHECK(o.end(1) == Ids{2});
  CHECK(o.end(2) == Ids{3});
}

TEST_CASE("guest ops: two sub-block writes in one block overlap, as its read-modify-writes do") {
  Ops o;
  CHECK(o.add(1, 0, 512));
  CHECK_FALSE(o.add(2, 512, 1024));
  CHECK(o.ops.find(OpId{1})->span == ByteRange{0, align});
  CHECK(o.ops.find(OpId{2})->range == ByteRange{512, 1024});  // the write itself is not widened
  // The last byte of one block and the first of the next: both blocks.
  CHECK_FALSE(o.add(3, align - 1, align + 1));
  CHECK(o.ops.find(OpId{3})->span == ByteRange{0, 2 * align});
  CHECK(o.end(1) == Ids{2});
  CHECK(o.end(2) == Ids{3});
  // A disk that takes single bytes runs them side by side.
  Ops fine;
  CHECK(fine.add(1, 0, 512, Command::write, 1));
  CHECK(fine.add(2, 512, 1024, Command::write, 1));
}

TEST_CASE("guest ops: trim and zero are writes, all else runs at once and blocks nobody") {
  Ops o;
  CHECK(o.add(1, 0, align, Command::trim));
  CHECK(o.add(2, 0, align, Command::read));
  CHECK(o.add(3, 0, 0, Command::flush));
  CHECK_FALSE(o.add(4, 0, align, Command::zero));
  CHECK_FALSE(o.add(5, 0, align));
  CHECK(o.end(2).empty());
  CHECK(o.end(3).empty());
  CHECK(o.end(1) == Ids{4});
  CHECK(o.end(4) == Ids{5});
}

TEST_CASE("guest ops: one that ends unblocks all that waited for it, in order of arrival") {
  Ops o;
  CHECK(o.add(1, 0, 64 * kib));
  for (std::uint64_t i = 0; i < 16; ++i) CHECK_FALSE(o.add(2 + i, i * align, (i + 1) * align));
  Ids all;
  for (std::uint64_t i = 0; i < 16; ++i) all.push_back(2 + i);
  CHECK(o.end(1) == all);
  CHECK(o.ops.running() == 16);
}

TEST_CASE("guest ops: a waiting write that is taken out frees those behind it") {
  Ops o;
  CHECK(o.add(1, 0, align));
  CHECK_FALSE(o.add(2, 0, 2 * align));
  CHECK_FALSE(o.add(3, align, 2 * align));
  CHECK(o.end(2) == Ids{3});
  CHECK(o.end(1).empty());
}

TEST_CASE("guest ops: what was admitted before is known, by range and as a whole") {
  Ops o;
  CHECK(o.add(1, 0, 512));
  CHECK(o.add(2, 2 * align, 3 * align));
  const auto before = o.ops.last_admission();
  CHECK(before == 2);
  CHECK(o.add(3, 4 * align, 5 * align));
  // Rule 3 asks about the block, the write touched a part of it.
  CHECK(o.ops.source_busy({512, align}, before));
  CHECK_FALSE(o.ops.source_busy({align, 2 * align}, before));
  CHECK_FALSE(o.ops.source_busy({4 * align, 5 * align}, before));  // admitted later
  CHECK(o.ops.source_busy({4 * align, 5 * align}, o.ops.last_admission()));
  // Done on the source, still open on the target: it no longer disturbs a read of the source.
  o.ops.find(OpId{1})->source_done = true;
  CHECK_FALSE(o.ops.source_busy({0, align}, before));
  CHECK(o.ops.any_running(before));
  (void)o.end(1);
  (void)o.end(2);
  CHECK_FALSE(o.ops.any_running(before));
  CHECK(o.ops.any_running(o.ops.last_admission()));
}

TEST_CASE("guest ops: those that run in a range are found, the one that began before it included") {
  Ops o;
  CHECK(o.add(1, 0, 8 * align));
  CHECK(o.add(2, 8 * align, 9 * align));
  CHECK(o.add(3, 10 * align, 11 * align));
  Ids found;
  o.ops.for_each_running({7 * align, 10 * align}, [&](const GuestOp& op) {
    found.push_back(static_cast<std::uint64_t>(op.id));
  });
  CHECK(found == Ids{1, 2});
}

// The naive twin: every write in order of arrival; one may run when no earlier one that overlaps it
// is left.
TEST_CASE("guest ops: as the naive twin has it, over random writes") {
  std::mt19937 random(7);
  for (int round = 0; round < 50; ++round) {
    Ops o;
    std::map<std::uint64_t, ByteRange> open;  // by arrival
    std::set<std::uint64_t> running;
    const auto may_run = [&](std::uint64_t id) {
      return std::none_of(open.begin(), open.find(id),
                          [&](const auto& e) { return e.second.overlaps(open.at(id)); });
    };
    for (std::uint64_t id = 1; id < 200; ++id) {
      const std::uint64_t begin = random() % (64 * kib);
      const std::uint64_t end = begin + 1 + random() % (12 * kib);
      open[id] = ByteRange{begin, end}.widened(align);
      const bool runs = o.add(id, begin, end);
      REQUIRE(runs == may_run(id));
      if (runs) running.insert(id);
      while (running.size() > 3) {
        const auto ended = *std::next(running.begin(), random() % running.size());
        running.erase(ended);
        open.erase(ended);
        Ids expected;
        for (const auto& [other, range] : open) {
          if (!running.contains(other) && may_run(other)) expected.push_back(other);
        }
        REQUIRE(o.end(ended) == expected);
        running.insert(expected.begin(), expected.end());
      }
    }
    o.ops.check_invariants();
  }
}

}  // namespace nbdferry::mirror
