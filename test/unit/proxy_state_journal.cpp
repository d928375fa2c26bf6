// The state file's journal: what a pivoted disk's target may not have flushed.
#include <algorithm>
#include <cstring>
#include <string>

#include <fcntl.h>
#include <sys/stat.h>

#include <doctest/doctest.h>

#include "proxy/state_file.hpp"
#include "test/unit/proxy_disk_fixture.hpp"

namespace nbdferry::proxy::test {

namespace {

constexpr std::size_t page = 4096;
constexpr std::uint64_t disk_bytes = 1 << 20;
constexpr std::size_t memory_bytes = 10'000;  // not a multiple of a page

SavedMigration pivoted(std::uint64_t generation) {
  SavedMigration m;
  m.id = "m-1";
  m.pivot = generation;
  return m;
}

struct Place {
  explicit Place(std::string directory) : state(std::move(directory)) {
    make_file(disk, disk_bytes);
  }
  Place() : Place("") { state = dir / "state"; }
  TempDir dir{"/dev/shm"};
  std::string state;
  std::string disk = dir / "disk.img";

  [[nodiscard]] StateFile create(const SavedMigration& migration) const {
    return StateFile::create(state, disk, disk_bytes, memory_bytes, migration);
  }
  [[nodiscard]] FoundState find(bool serves = false) const {
    return StateFile::find(state, disk, disk_bytes, memory_bytes, serves);
  }
};

bool all_zero(std::span<const std::byte> bytes) {
  return std::ranges::all_of(bytes, [](std::byte b) { return b == std::byte{0}; });
}

}  // namespace

TEST_CASE("journal: it is found again, and stays in place while it grows") {
  const Place place;
  {
    auto file = place.create(pivoted(7));
    CHECK(file.journal().empty());
    file.begin_journal(3 * page);
    const auto first = file.journal();
    CHECK(first.size() == 3 * page);
    CHECK(all_zero(first));
    CHECK(reinterpret_cast<std::uintptr_t>(first.data()) % page == 0);
    CHECK(first.data() >= file.memory().data() + memory_bytes);
    first.front() = std::byte{1};
    file.grow_journal(20 * page);
    CHECK(file.journal().data() == first.data());
    CHECK(file.journal().size() == 20 * page);
    CHECK(all_zero(file.journal().subspan(1)));
    file.journal().back() = std::byte{2};
    file.grow_journal(page);  // it has more
    CHECK(file.journal().size() == 20 * page);
  }
  auto found = place.find();
  REQUIRE(found.file);
  CHECK(found.migration == pivoted(7));
  REQUIRE(found.file->journal().size() == 20 * page);
  CHECK(found.file->journal().front() == std::byte{1});
  CHECK(found.file->journal().back() == std::byte{2});
  CHECK(all_zero(found.file->memory()));

  found.file->begin_journal(2 * page);
  CHECK(found.file->journal().size() == 2 * page);
  CHECK(all_zero(found.file->journal()));
  // Before a pivot there is nothing behind the memory.
  found.file->save(pivoted(0));
  found.file.reset();
  CHECK(place.find().why_not.find("longer than it was") != std::string::npos);
}

TEST_CASE("journal: a disk that does not serve may be written to by others") {
  const Place place;
  place.create(pivoted(7)).begin_journal(page);
  timespec later{};
  ::clock_gettime(CLOCK_REALTIME, &later);
  later.tv_sec += 10;
  const timespec both[] = {later, later};
  REQUIRE(::utimensat(AT_FDCWD, place.disk.c_str(), both, 0) == 0);
  CHECK(place.find(true).why_not.find("is out of date") != std::string::npos);
  CHECK(place.find().file);
}

TEST_CASE("journal: half of a tmpfs stays free, and a full one is an error") {
  const auto fs = MountedFs::make("tmpfs", 512 * 1024);
  if (!fs) return;
  const Place place(*fs / "state");
  auto file = place.create(pivoted(7));
  file.begin_journal(16 * page);
  CHECK(error_of([&] { file.grow_journal(64 * page); }).find("half of its") != std::string::npos);
  CHECK(file.journal().size() == 16 * page);
  file.grow_journal(32 * page);
  CHECK(file.journal().size() == 32 * page);
  CHECK(error_of([&] { file.begin_journal(200 * page); }).find("No space") != std::string::npos);
  CHECK(file.journal().empty());
  CHECK(all_zero(file.memory()));
}

}  // namespace nbdferry::proxy::test
