// The journal against a naive twin: a list of what was added and not removed; also of a process that is
// killed at any instruction.
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <doctest/doctest.h>

#include "mirror/journal.hpp"

namespace nbdferry::mirror {

namespace {

constexpr std::uint64_t page = Journal::slot_bytes;
constexpr std::uint64_t disk = 1ULL << 40;

// Shared with children.
class Memory {
 public:
  explicit Memory(std::uint64_t bytes)
      : bytes_(bytes),
        at_(static_cast<std::byte*>(
            ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {
    REQUIRE(at_ != MAP_FAILED);
  }
  ~Memory() { ::munmap(at_, bytes_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  [[nodiscard]] std::span<std::byte> span() const { return {at_, bytes_}; }
  [[nodiscard]] std::span<std::byte> first(std::uint64_t pages) const {
    return span().first(pages * page);
  }

 private:
  std::uint64_t bytes_;
  std::byte* at_;
};

std::string text(const Journal::Record& r) {
  std::string bytes(reinterpret_cast<const char*>(r.payload.data()), r.payload.size());
  return std::to_string(r.range.begin) + "+" + std::to_string(r.range.length()) +
         (r.command == Command::write ? " write "
          : r.may_hole                ? " zero"
                                      : " zero, no hole") +
         bytes;
}

std::vector<std::string> texts(const Journal& journal) {
  std::vector<std::string> out;
  for (const auto& r : journal.records()) out.push_back(text(r));
  return out;
}

Journal opened(std::span<std::byte> memory) {
  Journal journal;
  journal.use(memory, disk);
  return journal;
}

// Adds and removes by the dice, and knows what is there.
class Twin {
 public:
  Twin(std::span<std::byte> memory, unsigned seed) : random_(seed) { journal_.use(memory, disk); }

  void step() {
    ++steps_;
    changed_ = {};
    if (!kept_.empty() && random_() % 5 < 2) {
      auto it = kept_.begin();
      std::advance(it, random_() % kept_.size());
      journal_.remove(it->slots);
      changed_ = *it;
      kept_.erase(it);
    } else {
      add();
    }
  }

  // What is there, and after the last step but one was; `optional`: only one of the two.
  struct Part {
    std::string text;
    bool optional;
  };
  [[nodiscard]] std::vector<std::string> parts() const {
    std::vector<std::string> out;
    for (const auto& k : kept_) out.insert(out.end(), k.parts.begin(), k.parts.end());
    return out;
  }
  [[nodiscard]] std::vector<Part> parts_around_last_step() const {
    std::vector<Part> out;
    bool seen = changed_.parts.empty();
    const auto put = [&](const Kept& k, bool optional) {
      for (const auto& p : k.parts) out.push_back({p, optional});
      seen = seen || optional;
    };
    for (const auto& k : kept_) {
      if (!seen && k.number > changed_.number) put(changed_, true);
      put(k, k.number == changed_.number);
    }
    if (!seen) put(changed_, true);
    return out;
  }
  [[nodiscard]] Journal& journal() { return journal_; }

 private:
  struct Kept {
    std::uint64_t number = 0;
    Journal::Slots slots;
    std::vector<std::string> parts;
  };

  void add() {
    Journal::Record r;
    r.command = random_() % 4 == 0 ? Command::zero : Command::write;
    r.may_hole = random_() % 2 == 0;
    const bool write = r.command == Command::write;
    r.range.begin = random_() % 64 * 512;
    // No two zeroes are alike.
    r.range.end = r.range.begin + (write ? 512 * (1 + random_() % 40) : steps_);
    if (Journal::slots_for(r.command, r.range) > journal_.free_slots()) return;
    std::vector<std::byte> bytes(write ? r.range.length() : 0);
    for (std::size_t i = 0; i + 8 <= bytes.size(); i += 8) {
      std::memcpy(&bytes[i], &steps_, 8);
    }
    Kept k;
    k.number = steps_;
    for (std::uint64_t at = r.range.begin; at < r.range.end;) {
      Journal::Record part = r;
      part.range = {at, write ? std::min((at / page + 1) * page, r.range.end) : r.range.end};
      if (write)
        part.payload =
            Payload::copy_of({&bytes[at - r.range.begin], std::size_t{part.range.length()}});
      k.parts.push_back(text(part));
      at = part.range.end;
    }
    k.slots = journal_.add(r.command, r.range, r.may_hole, write ? bytes.data() : nullptr);
    changed_ = k;
    kept_.push_back(std::move(k));
  }

  Journal journal_;
  std::mt19937 random_;
  std::uint64_t steps_ = 0;
  std::list<Kept> kept_;
  Kept changed_;  // by the last step; no parts: nothing was
};

}  // namespace

TEST_CASE("journal: without memory nothing is kept") {
  const Journal journal;
  CHECK_FALSE(journal.kept());
  CHECK(journal.records().empty());
}

TEST_CASE("journal: it has the size that was asked for") {
  for (const std::uint64_t pages : {1, 127, 128, 129, 1000}) {
    Memory memory(Journal::bytes_for(pages * page));
    const Journal journal = opened(memory.span());
    CHECK(journal.slots() >= pages);
    CHECK(journal.slots() < pages + 128);
    CHECK(journal.free_slots() == journal.slots());
  }
}

TEST_CASE("journal: another one finds what was added, in order, block by block") {
  Memory memory(Journal::bytes_for(64 * page));
  Journal journal = opened(memory.span());
  const std::vector<std::byte> ones(3 * page, std::byte{1});
  const auto first = journal.add(Command::write, {512, 2 * page + 512}, true, ones.data());
  (void)journal.add(Command::zero, {0, disk}, false, nullptr);
  (void)journal.add(Command::write, {page, page + 512}, true, ones.data());
  CHECK(first.size() == 3);
  const auto records = opened(memory.span()).records();
  REQUIRE(records.size() == 5);
  CHECK(records[0].range == ByteRange{512, page});
  CHECK(records[1].range == ByteRange{page, 2 * page});
  CHECK(records[2].range == ByteRange{2 * page, 2 * page + 512});
  CHECK(records[3].range == ByteRange{0, disk});
  CHECK((records[3].command == Command::zero && !records[3].may_hole));
  CHECK(records[4].payload.size() == 512);
  Journal next = opened(memory.span());
  next.remove(first);
  CHECK(opened(memory.span()).records().size() == 2);
  CHECK(next.free_slots() == next.slots() - 2);
}

TEST_CASE("journal: it grows, and keeps what it has") {
  Memory memory(Journal::bytes_for(1000 * page));
  Journal journal = opened(memory.first(3));
  CHECK(journal.slots() == 2);
  std::uint64_t number = 0;
  for (const std::uint64_t pages : {3, 4, 129, 130, 131, 300}) {
    journal.use(memory.first(pages), disk);
    for (; journal.free_slots() != 0; ++number) {
      (void)journal.add(Command::zero, {number, number + 1}, true, nullptr);
    }
    CHECK(journal.slots() == number);
  }
  const auto records = opened(memory.first(300)).records();
  REQUIRE(records.size() == number);
  for (std::uint64_t i = 0; i < number; ++i) CHECK(records[i].range.begin == i);
}

TEST_CASE("journal: what makes no sense, in memory that was tampered with, is none") {
  Memory memory(Journal::bytes_for(64 * page));
  std::mt19937_64 random(7);
  for (int round = 0; round < 200; ++round) {
    auto* words = reinterpret_cast<std::uint64_t*>(memory.span().data());
    for (std::size_t i = 0; i < page / 8; ++i) words[i] = random() >> random() % 64;
    Journal journal;
    journal.use(memory.span(), 100 * page);
    const auto records = journal.records();
    for (const auto& r : records) CHECK((!r.range.empty() && r.range.end <= 100 * page));
    CHECK(journal.free_slots() + records.size() == journal.slots());
  }
}

TEST_CASE("journal: agrees with a list of what was added") {
  for (unsigned seed = 0; seed < 30; ++seed) {
    Memory memory(Journal::bytes_for((seed % 3 + 1) * 128 * page));
    Twin twin(memory.span(), seed);
    for (int step = 0; step < 300; ++step) {
      twin.step();
      if (step % 10 == 0) CHECK(texts(opened(memory.span())) == twin.parts());
    }
    const Journal next = opened(memory.span());
    CHECK(next.free_slots() == twin.journal().free_slots());
  }
}

TEST_CASE("journal: a process that is killed at any instruction leaves what it had added") {
  Memory memory(Journal::bytes_for(128 * page));
  Memory shared(page);
  auto& done = *new (shared.span().data()) std::atomic<std::uint64_t>;
  std::mt19937_64 random(11);
  std::uint64_t half_done = 0;
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::memset(memory.span().data(), 0, memory.span().size());
    done = 0;
    const pid_t child = ::fork();
    if (child == 0) {
      for (Twin twin(memory.span(), seed);; ++done) twin.step();
    }
    const std::uint64_t until = random() % 300;
    while (done < until) {
    }
    for (std::uint64_t i = random() % 5000; i > 0; --i) {
      std::atomic_signal_fence(std::memory_order_seq_cst);  // some nanoseconds
    }
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);

    Memory again(memory.span().size());
    Twin twin(again.span(), seed);
    for (std::uint64_t i = 0; i < done; ++i) twin.step();
    const std::size_t before = twin.parts().size();
    twin.step();  // this one may be done, or not, or in part
    const auto found = texts(opened(memory.span()));
    std::size_t at = 0;
    bool good = true;
    for (const auto& part : twin.parts_around_last_step()) {
      if (at < found.size() && found[at] == part.text) {
        ++at;
      } else {
        good = good && part.optional;
      }
    }
    CHECK(good);
    CHECK(at == found.size());
    const std::size_t after = twin.parts().size();
    half_done += found.size() > std::min(before, after) && found.size() < std::max(before, after);
  }
  MESSAGE("killed in the middle of a step: ", half_done);
}

}  // namespace nbdferry::mirror
