// The state file: what a kill at any moment leaves of it, and that each doubt about it, taken
// alone, is enough for it not to be trusted. Every refusal starts from a file that is trusted.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <string>

#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <boost/crc.hpp>
#include <boost/json.hpp>
#include <doctest/doctest.h>

#include "proxy/state_file.hpp"
#include "test/unit/proxy_disk_fixture.hpp"

namespace nbdferry::proxy::test {

namespace {

constexpr std::size_t slot = 4096;
constexpr std::size_t heartbeat_at = 2 * slot;
constexpr std::size_t memory_at = 3 * slot;
constexpr std::uint64_t disk_bytes = 1 << 20;
constexpr std::size_t memory_bytes = 10'000;  // not a multiple of a page
constexpr std::int64_t second = 1'000'000'000;

SavedMigration migration(const std::string& id) {
  SavedMigration m;
  m.request = {{"uris", {"nbd+unix:///x?socket=/a \"b\"\\c"}}, {"mode", "auto"}};
  m.id = id;
  m.running = false;
  m.paused = m.incoming = true;
  m.generation = 1ULL << 63;
  return m;
}

struct Place {
  TempDir dir{"/dev/shm"};
  std::string state = dir / "state";
  std::string disk = dir / "disk.img";
  Place() { make_file(disk, disk_bytes); }

  [[nodiscard]] StateFile create(const std::string& id = "m-1") const {
    return StateFile::create(state, disk, disk_bytes, memory_bytes, migration(id));
  }
  [[nodiscard]] FoundState find() const {
    return StateFile::find(state, disk, disk_bytes, memory_bytes);
  }
  // Left behind by a process that ended with nothing in flight.
  [[nodiscard]] std::string leave() const {
    auto file = create();
    file.beat(false);
    return file.path();
  }
};

bool trusted(const FoundState& found) {
  return found.file && found.migration && found.why_not.empty();
}
// One line that names the file, and has `words` in it.
bool says(const FoundState& found, const std::string& words) {
  INFO(found.why_not);
  CHECK(found.why_not.starts_with("state file '/"));
  CHECK(found.why_not.find('\n') == std::string::npos);
  CHECK_MESSAGE(found.why_not.find(words) != std::string::npos, found.why_not);
  return !found.file && found.why_not.find(words) != std::string::npos;
}

void put(const std::string& path, std::size_t at, const std::string& bytes) {
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(static_cast<std::streamoff>(at));
  file << bytes;
}

std::string checksum_line(const std::string& body, const std::string& version = "1") {
  boost::crc_optimal<32, 0x1EDC6F41, 0xFFFFFFFF, 0xFFFFFFFF, true, true> crc;
  crc.process_bytes(body.data(), body.size());
  std::array<char, 32> hex{};
  std::snprintf(hex.data(), hex.size(), "%08x", crc.checksum());
  return "nbdferry-state " + version + " crc32c=" + hex.data() + "\n";
}

// Changes what the header says, soundly, in both slots.
void edit(const std::string& path, const std::function<void(boost::json::object&)>& change) {
  const std::string all = file_contents(path);
  const std::size_t line = checksum_line("").size();
  for (const std::size_t at : {std::size_t{0}, slot}) {
    auto json = boost::json::parse(all.substr(at + line, slot - line)).as_object();
    change(json);
    std::string body = boost::json::serialize(json);
    body.resize(slot - line, ' ');
    put(path, at, checksum_line(body) + body);
  }
}

std::int64_t ns(const timespec& t) { return t.tv_sec * second + t.tv_nsec; }
std::int64_t now() {
  timespec t{};
  ::clock_gettime(CLOCK_REALTIME, &t);
  return ns(t);
}
struct stat stat_of(const std::string& path) {
  struct stat st {};
  REQUIRE(::stat(path.c_str(), &st) == 0);
  return st;
}

void set_heartbeat(const std::string& path, std::int64_t time, bool in_flight) {
  const std::uint64_t word = static_cast<std::uint64_t>(time) << 1 | (in_flight ? 1 : 0);
  std::string bytes(sizeof word, '\0');
  std::memcpy(bytes.data(), &word, sizeof word);
  put(path, heartbeat_at, bytes);
}

struct Child {
  pid_t pid;
  explicit Child(const std::function<void()>& forever) : pid(::fork()) {
    if (pid != 0) return;
    forever();
    ::_exit(0);
  }
  ~Child() {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
};

bool skip_unless_root(const char* what) {
  if (::geteuid() == 0) return false;
  MESSAGE("SKIPPED: not root: ", what);
  return true;
}

template <typename F>
auto as_nobody(F&& f) {
  REQUIRE(::seteuid(65534) == 0);
  auto result = f();
  REQUIRE(::seteuid(0) == 0);
  return result;
}

}  // namespace

TEST_CASE("state file: none means none, and looking for one makes nothing") {
  const Place place;
  for (int i = 0; i < 2; ++i) {
    const auto found = place.find();
    CHECK_FALSE(found.file);
    CHECK_FALSE(found.migration);
    CHECK(found.why_not.empty());
    CHECK(std::filesystem::exists(place.state) == (i == 1));
    std::filesystem::create_directory(place.state);
  }
  CHECK(error_of([&] {
          (void)StateFile::find(place.state, place.dir / "none", 1, 1);
        }).find("check the path") != std::string::npos);
}

TEST_CASE("state file: memory and migration come back") {
  const Place place;
  std::string path;
  {
    auto file = place.create();
    path = file.path();
    const auto memory = file.memory();
    REQUIRE(memory.size() == memory_bytes);
    CHECK(reinterpret_cast<std::uintptr_t>(memory.data()) % slot == 0);
    CHECK(std::ranges::all_of(memory, [](std::byte b) { return b == std::byte{0}; }));
    for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<std::byte>(i * 7);
    file.beat(false);
    auto moved = std::move(file);
    CHECK(moved.memory().data() == memory.data());
  }
  const auto st = stat_of(path);
  CHECK((st.st_mode & 07777) == 0600);
  CHECK((stat_of(place.state).st_mode & 07777) == 0700);
  CHECK(static_cast<std::size_t>(st.st_size) == memory_at + 3 * slot);
  CHECK(std::distance(std::filesystem::directory_iterator(place.state), {}) == 1);
  CHECK(file_contents(path).starts_with("nbdferry-state 1 crc32c="));

  for (int start = 0; start < 5; ++start) {
    auto found = place.find();
    REQUIRE(trusted(found));
    const auto id = start == 0 ? std::string("m-1") : "m-again" + std::to_string(start - 1);
    CHECK(found.migration == migration(id));
    const auto memory = found.file->memory();
    for (std::size_t i = 0; i < memory.size(); ++i) {
      REQUIRE(memory[i] == static_cast<std::byte>(i * 7));
    }
    found.file->save(migration("m-again" + std::to_string(start)));
    found.file->beat(start % 2 == 0);
  }

  auto found = place.find();
  found.file->remove();
  CHECK_FALSE(std::filesystem::exists(path));
  CHECK(found.file->memory()[1] == std::byte{7});
  found.file->remove();
}

TEST_CASE("state file: a new one takes the old one's place, and only itself away") {
  const Place place;
  auto old = place.create("old");
  put(old.path() + ".new", 0, "");
  std::ofstream(old.path() + ".new") << "left by a crash";
  auto next = place.create("next");
  CHECK_FALSE(std::filesystem::exists(old.path() + ".new"));
  old.memory()[0] = std::byte{1};
  CHECK(next.memory()[0] == std::byte{0});
  old.remove();
  CHECK(std::filesystem::exists(next.path()));
  next = place.create("third");
  CHECK(says(place.find(), "in use by another"));  // two must not store in one memory
  { const auto gone = std::move(next); }
  CHECK(place.find().migration == migration("third"));
}

TEST_CASE("state file: disks don't share one, and names of one disk do") {
  const Place place;
  const auto path = place.leave();
  const auto other = place.dir / "other.img";
  make_file(other, disk_bytes);
  CHECK(StateFile::find(place.state, other, disk_bytes, memory_bytes).why_not.empty());
  std::filesystem::create_symlink(place.disk, place.dir / "alias.img");
  CHECK(trusted(StateFile::find(place.state, place.dir / "alias.img", disk_bytes, memory_bytes)));
  const auto its_path =
      StateFile::create(place.state, other, disk_bytes, memory_bytes, migration("other")).path();
  CHECK(its_path != path);

  // A file of another disk under this one's name.
  std::filesystem::rename(its_path, path);
  const auto found = place.find();
  CHECK(says(found, "is not that of"));
  CHECK_FALSE(found.migration);
}

TEST_CASE("state file: killed at any moment, the file is whole and trusted") {
  const Place place;
  std::mt19937_64 random(11);
  constexpr std::size_t saved_at = 0;  // in the memory: the save that has returned
  constexpr std::size_t stored_at = 64;
  const auto store = [](const StateFile& file, std::size_t at, std::uint64_t n) {
    std::memcpy(file.memory().data() + at, &n, sizeof n);
    std::atomic_signal_fence(std::memory_order_seq_cst);
  };
  (void)place.leave();
  int saves = 0;
  for (int round = 0; round < 300; ++round) {
    std::optional<std::uint64_t> before;
    {
      const Child child([&] {
        auto found = place.find();
        if (!found.file) ::_exit(1);
        const UniqueFd disk(::open(place.disk.c_str(), O_WRONLY | O_CLOEXEC));
        std::uint64_t n = 0;
        std::memcpy(&n, found.file->memory().data() + saved_at, sizeof n);
        auto m = migration("m-1");
        for (;;) {
          m.generation = ++n;
          m.id = std::string(n % 3000, 'i');
          found.file->save(m);
          store(*found.file, saved_at, n);
          found.file->beat(true);
          store(*found.file, stored_at, n);
          if (::pwrite(disk.get(), &n, sizeof n, 0) != sizeof n) ::_exit(1);
          found.file->beat(false);
        }
      });
      ::usleep(static_cast<useconds_t>(random() % 3000));
    }
    const auto found = place.find();
    REQUIRE_MESSAGE(trusted(found), found.why_not);
    std::uint64_t saved = 0;
    std::uint64_t stored = 0;
    std::uint64_t written = 0;
    std::memcpy(&saved, found.file->memory().data() + saved_at, sizeof saved);
    std::memcpy(&stored, found.file->memory().data() + stored_at, sizeof stored);
    std::memcpy(&written, file_contents(place.disk).data(), sizeof written);
    const auto seen = found.migration->generation;
    if (saved != 0) {
      CHECK((seen == saved || seen == saved + 1));
      CHECK(found.migration->id.size() == seen % 3000);
      CHECK(stored <= saved);  // each before the next; a life may have skipped one
      CHECK(written <= stored);
    }
    saves = static_cast<int>(saved);
  }
  MESSAGE(saves, " saves in 300 lives");
  CHECK(saves > 300);
}

TEST_CASE("state file: a save that is cut off leaves the old migration or the new one") {
  const Place place;
  const auto path = place.leave();
  std::string before;
  std::string after;
  {
    const auto one_life = [&](const std::string& id, int saves) {
      auto found = place.find();
      REQUIRE(trusted(found));
      for (int i = 0; i < saves; ++i) found.file->save(migration(id));
      return file_contents(path);
    };
    before = one_life("old", 5);
    after = one_life("new", 1);
  }
  for (std::size_t cut = 0; cut <= 2 * slot; cut += 16) {
    put(path, 0, after.substr(0, cut) + before.substr(cut, 2 * slot - cut));
    const auto found = place.find();
    REQUIRE(trusted(found));
    CHECK(found.migration->id ==
          (cut < slot - 1 && after.compare(cut, slot - cut, before, cut, slot - cut) != 0 ? "old"
                                                                                          : "new"));
  }
}

TEST_CASE("state file: one damaged slot brings nothing older back, two are the end") {
  const Place place;
  std::string path;
  {
    auto file = place.create("old");
    file.save(migration("new"));
    file.beat(false);
    path = file.path();
  }
  const std::string sound = file_contents(path);
  std::mt19937_64 random(7);
  const auto flip = [&](std::string& bytes, std::size_t at) {
    bytes[at + random() % slot] ^= static_cast<char>(1U << random() % 8);
  };
  for (int i = 0; i < 100; ++i) {
    for (const std::size_t damaged : {std::size_t{0}, slot}) {
      std::string bytes = sound;
      flip(bytes, damaged);
      put(path, 0, bytes);
      auto found = place.find();
      REQUIRE(trusted(found));
      CHECK(found.migration == migration("new"));
      found.file->save(migration("newer"));  // and it is whole again
      CHECK(file_contents(path).substr(0, slot) == file_contents(path).substr(slot, slot));
    }
    std::string bytes = sound;
    flip(bytes, 0);
    flip(bytes, slot);
    put(path, 0, bytes);
    const auto found = place.find();
    CHECK_FALSE(found.file);
    CHECK_FALSE(found.migration);
  }
  put(path, 0, std::string(2 * slot, '\0'));
  CHECK(says(place.find(), "is damaged"));
}

TEST_CASE("state file: one of another version of nbdferry") {
  const Place place;
  const auto path = place.leave();
  const std::string sound = file_contents(path);
  const auto body = sound.substr(checksum_line("").size(), slot - checksum_line("").size());
  for (const std::size_t at : {std::size_t{0}, slot})
    put(path, at, checksum_line(body, "2") + body);
  auto found = place.find();
  CHECK(says(found, "another version"));
  CHECK_FALSE(found.migration);

  put(path, 0, sound);
  edit(path, [](boost::json::object& header) { header.erase("running"); });
  found = place.find();
  CHECK(says(found, "another version"));
  CHECK_FALSE(found.migration);
}

TEST_CASE("state file: one of another boot, another size of disk or map") {
  const Place place;
  const auto path = place.leave();
  const std::string sound = file_contents(path);
  for (const char* boot : {"00000000-1111-2222-3333-444444444444", ""}) {
    edit(path, [&](boost::json::object& header) { header["boot"] = boot; });
    const auto found = place.find();
    CHECK(says(found, "another boot"));
    CHECK(found.migration == migration("m-1"));
  }
  put(path, 0, sound);
  REQUIRE(trusted(place.find()));

  const auto grown = StateFile::find(place.state, place.disk, disk_bytes + 4096, memory_bytes);
  CHECK(says(grown, "is not that of"));
  CHECK_FALSE(grown.migration);
  // The same pages, another map.
  const auto map = StateFile::find(place.state, place.disk, disk_bytes, memory_bytes + 1);
  CHECK(says(map, "another size"));
  CHECK(map.migration == migration("m-1"));

  for (const char* field : {"device", "inode", "sequence", "block_device"}) {
    edit(path, [&](boost::json::object& header) {
      auto& value = header["source"].as_object()[field];
      if (value.is_bool()) {
        value = !value.as_bool();
      } else {
        value = value.to_number<std::uint64_t>() + 1;
      }
    });
    const auto found = place.find();
    CHECK(says(found, "is not that of"));
    CHECK_FALSE(found.migration);
    put(path, 0, sound);
  }
  REQUIRE(trusted(place.find()));
}

TEST_CASE("state file: a truncated one") {
  const Place place;
  const auto path = place.leave();
  const auto whole = std::filesystem::file_size(path);
  for (const auto bytes : {whole + 4096, whole - 1, whole - 4096}) {
    std::filesystem::resize_file(path, bytes);
    const auto found = place.find();
    CHECK(says(found, "is truncated"));
    CHECK(found.migration == migration("m-1"));
  }
  for (const auto bytes : {memory_at, heartbeat_at, slot}) {
    std::filesystem::resize_file(path, bytes);
    const auto found = place.find();
    CHECK(says(found, "is truncated"));
    CHECK(found.migration == migration("m-1"));
  }
  for (const auto bytes : {slot - 1, std::size_t{1}, std::size_t{0}}) {
    std::filesystem::resize_file(path, bytes);
    const auto found = place.find();
    CHECK(says(found, "is truncated"));
    CHECK_FALSE(found.migration);
  }
}

TEST_CASE("state file: a foreign write shows by the disk's times") {
  const Place place;
  const auto path = place.leave();
  // Until the first beat anything may be in flight.
  { const auto fresh = place.create(); }
  const auto made = now();
  while (ns(stat_of(place.disk).st_mtim) <= made) put(place.disk, 0, "ours");
  CHECK(trusted(place.find()));

  const auto written = ns(stat_of(place.disk).st_ctim);
  CHECK(written == ns(stat_of(place.disk).st_mtim));

  set_heartbeat(path, written, false);
  CHECK(trusted(place.find()));
  set_heartbeat(path, written - 1, false);  // exact: nothing was in flight
  const auto found = place.find();
  CHECK(says(found, "was written since"));
  CHECK(found.migration == migration("m-1"));

  set_heartbeat(path, written - second, true);
  CHECK(trusted(place.find()));
  set_heartbeat(path, written - second - 1, true);
  CHECK(says(place.find(), "was written since"));

  put(path, heartbeat_at, std::string(8, '\0'));
  CHECK(says(place.find(), "was written since"));
}

TEST_CASE("state file: a foreign write after the last beat, for real") {
  const Place place;
  std::string path;
  {
    auto file = place.create();
    path = file.path();
    // Our own, looked at in between: its stamp is a fine one, where there are such.
    for (int i = 0; i < 50; ++i) {
      (void)stat_of(place.disk);
      put(place.disk, 0, "ours");
      file.beat(false);
    }
  }
  REQUIRE(trusted(place.find()));
  // Somebody else's, in a later tick of the clock.
  const auto before = ns(stat_of(place.disk).st_mtim);
  while (now() < before + second / 10) ::usleep(1000);
  put(place.disk, 0, "theirs");
  CHECK(says(place.find(), "was written since"));

  // The time of the write set back, as tools do that copy files with their times.
  const timespec times[2] = {{1, 0}, {1, 0}};
  REQUIRE(::utimensat(AT_FDCWD, place.disk.c_str(), times, 0) == 0);
  CHECK(says(place.find(), "was written since"));
  // Only mtime is late.
  set_heartbeat(path, ns(stat_of(place.disk).st_ctim), false);
  REQUIRE(trusted(place.find()));
  const timespec late[2] = {{1, 0}, {now() / second + 3600, 0}};
  REQUIRE(::utimensat(AT_FDCWD, place.disk.c_str(), late, 0) == 0);
  set_heartbeat(path, ns(stat_of(place.disk).st_ctim), false);
  CHECK(says(place.find(), "was written since"));
}

TEST_CASE("state file: a heartbeat from the future, and a disk with another machine's clock") {
  const Place place;
  const auto path = place.leave();
  set_heartbeat(path, now() + 3600 * second, false);
  const auto found = place.find();
  CHECK(says(found, "the clock was set back"));
  CHECK(found.migration == migration("m-1"));

  // sysfs stands in for a file system that we know nothing of.
  const std::string strange = "/sys/kernel/uevent_seqnum";
  struct statfs fs {};
  if (::statfs(strange.c_str(), &fs) != 0 || fs.f_type != SYSFS_MAGIC) {
    MESSAGE("SKIPPED: no sysfs");
    return;
  }
  StateFile::create(place.state, strange, 4096, memory_bytes, migration("m-1")).beat(false);
  CHECK(says(StateFile::find(place.state, strange, 4096, memory_bytes), "by another clock"));
}

TEST_CASE("state file: one that others could have made or could change is not even looked into") {
  const Place place;
  const auto path = place.leave();
  const auto refused = [&](const std::string& words) {
    const auto found = place.find();
    CHECK(says(found, words));
    CHECK_FALSE(found.migration);
  };
  for (const mode_t mode : {0640U, 0604U, 0620U, 0700U, 04600U}) {
    REQUIRE(::chmod(path.c_str(), mode) == 0);
    refused("its mode is not 0600");
  }
  REQUIRE(::chmod(path.c_str(), 0600) == 0);
  REQUIRE(trusted(place.find()));

  const auto second_name = place.dir / "second-name";
  std::filesystem::create_hard_link(path, second_name);
  refused("hard links");
  std::filesystem::remove(path);
  std::filesystem::create_symlink(second_name, path);
  refused("is a symbolic link");
  // And none of these is written through.
  const auto before = file_contents(second_name);
  (void)place.leave();
  CHECK(file_contents(second_name) == before);
  CHECK(std::filesystem::is_regular_file(std::filesystem::symlink_status(path)));
  std::filesystem::create_symlink(second_name, path + ".new");
  (void)place.leave();
  CHECK(file_contents(second_name) == before);
  REQUIRE(trusted(place.find()));

  std::filesystem::remove(path);
  REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
  refused("is not a regular file");
  std::filesystem::remove(path);
  std::filesystem::create_directory(path);
  refused("is not a regular file");
  CHECK_FALSE(error_of([&] { (void)place.create(); }).empty());
  CHECK_FALSE(std::filesystem::exists(path + ".new"));
}

TEST_CASE("state file: what another user has put in its way in a sticky directory") {
  if (skip_unless_root("other users' files")) return;
  const Place place;
  const auto path = place.leave();
  std::filesystem::remove(path);
  std::filesystem::permissions(place.dir.path(), std::filesystem::perms(0755));
  REQUIRE(::chmod(place.state.c_str(), 01777) == 0);
  std::ofstream(path + ".new") << "theirs";
  REQUIRE(::chmod((path + ".new").c_str(), 0666) == 0);
  const auto error = as_nobody([&] { return error_of([&] { (void)place.create(); }); });
  CHECK(error.find("File exists") != std::string::npos);
  CHECK(file_contents(path + ".new") == "theirs");
}

TEST_CASE("state file: another user's, or one that we may not read") {
  if (skip_unless_root("other users' files")) return;
  const Place place;
  const auto path = place.leave();
  std::filesystem::permissions(place.dir.path(), std::filesystem::perms(0755));
  std::filesystem::permissions(place.state, std::filesystem::perms(0755));
  const auto unreadable = as_nobody([&] { return place.find(); });
  CHECK(says(unreadable, "can't be read: Permission denied"));
  CHECK_FALSE(unreadable.migration);
  const auto error = as_nobody([&] { return error_of([&] { (void)place.create(); }); });
  CHECK(error.find("Permission denied") != std::string::npos);

  REQUIRE(::chown(path.c_str(), 65534, 0) == 0);
  const auto foreign = place.find();
  CHECK(says(foreign, "belongs to another user"));
  CHECK_FALSE(foreign.migration);
  REQUIRE(::chown(path.c_str(), 0, 0) == 0);
  REQUIRE(trusted(place.find()));

  REQUIRE(::chown(place.state.c_str(), 65534, 0) == 0);
  CHECK(says(place.find(), "its directory belongs to another user"));
  CHECK(error_of([&] { (void)place.create(); }).find("belongs to another user") !=
        std::string::npos);
}

TEST_CASE("state file: a directory that others may write to, unless it is sticky") {
  const Place place;
  (void)place.leave();
  for (const mode_t mode : {0770U, 0707U}) {
    REQUIRE(::chmod(place.state.c_str(), mode) == 0);
    const auto found = place.find();
    CHECK(says(found, "its directory may be written to by others"));
    CHECK_FALSE(found.migration);
    CHECK(error_of([&] { (void)place.create(); }).find("may be written to by others") !=
          std::string::npos);
    REQUIRE(::chmod(place.state.c_str(), mode | 01000U) == 0);
    CHECK(trusted(place.find()));
  }
  const std::string deep = place.dir / "none/deep";
  CHECK(error_of([&] {
          (void)StateFile::create(deep, place.disk, 1, 1, migration("m-1"));
        }).find("can't be made") != std::string::npos);
}

TEST_CASE("state file: a directory on a disk is refused") {
  const TempDir on_disk("/var/tmp");
  struct statfs fs {};
  REQUIRE(::statfs(on_disk.path().c_str(), &fs) == 0);
  if (fs.f_type == TMPFS_MAGIC) {
    MESSAGE("SKIPPED: /var/tmp is in memory");
    return;
  }
  const Place place;
  const auto create = [&] {
    (void)StateFile::create(on_disk.path(), place.disk, disk_bytes, memory_bytes, migration("m"));
  };
  CHECK(error_of(create) ==
        "state directory '" + on_disk.path().string() +
            "': is not in memory (tmpfs): a restart will copy everything; give --state a directory "
            "of your own on a tmpfs, e.g. under /run or /dev/shm");
  CHECK(std::filesystem::is_empty(on_disk.path()));
  const auto path = std::filesystem::path(place.leave());
  std::filesystem::copy_file(path, on_disk.path() / path.filename());
  CHECK(
      says(StateFile::find(on_disk.path(), place.disk, disk_bytes, memory_bytes), "not in memory"));
}

TEST_CASE("state file: a full tmpfs is an error, and never a SIGBUS") {
  const auto fs = MountedFs::make("tmpfs", 512 * 1024);
  if (!fs) return;
  const Place place;
  const std::string state = *fs / "state";
  constexpr std::size_t large = 256 * 1024;
  const auto fill = [&] { return shell("head -c 1M /dev/zero >> " + (*fs / "filler")) != 0; };
  const auto find = [&] { return StateFile::find(state, place.disk, disk_bytes, large); };
  const auto too_large = [&] {
    (void)StateFile::create(state, place.disk, disk_bytes, 2 * large, migration("large"));
  };
  std::string path;
  {
    auto file = StateFile::create(state, place.disk, disk_bytes, large, migration("m-1"));
    path = file.path();
    CHECK(error_of(too_large).find("No space left") != std::string::npos);
    CHECK_FALSE(std::filesystem::exists(path + ".new"));
    REQUIRE(fill());
    std::ranges::fill(file.memory(), std::byte{0xff});
    file.save(migration("m-2"));
    file.beat(false);
  }
  REQUIRE(trusted(find()));
  CHECK(error_of(too_large).find("No space left") != std::string::npos);
  CHECK(find().migration == migration("m-2"));

  // A hole that somebody has made.
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  REQUIRE(::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, memory_at, 65536) == 0);
  {
    const auto found = find();
    CHECK(trusted(found));
    if (found.file) CHECK(found.file->memory()[0] == std::byte{0});
  }
  REQUIRE(::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, memory_at, 65536) == 0);
  REQUIRE(fill());
  const auto found = find();
  CHECK(says(found, "No space left"));
  CHECK(found.migration == migration("m-2"));
}

TEST_CASE("state file: a migration that doesn't fit is refused, and the old one stands") {
  const Place place;
  auto file = place.create();
  file.beat(false);
  auto large = migration("large");
  large.request["uris"] = {std::string(5000, 'x')};
  const auto before = file_contents(file.path());
  CHECK(error_of([&] { file.save(large); }).find("use shorter URIs") != std::string::npos);
  CHECK(file_contents(file.path()) == before);
  CHECK_FALSE(error_of([&] {
                (void)StateFile::create(place.state, place.disk, disk_bytes, memory_bytes, large);
              }).empty());
  CHECK_FALSE(std::filesystem::exists(file.path() + ".new"));
  CHECK(file_contents(file.path()) == before);
}

TEST_CASE("state file: a block device goes by its number and its use") {
  const Place place;
  const TempDir disks("/dev/shm");
  make_file(disks / "a", disk_bytes);
  make_file(disks / "b", disk_bytes);
  std::string device;
  const auto find = [&] { return StateFile::find(place.state, device, disk_bytes, memory_bytes); };
  std::string path;
  {
    const auto loop = LoopDevice::attach(disks / "a");
    if (!loop) return;
    device = loop->path();
    const auto source = SourceIdentity::of(device, disk_bytes);
    CHECK(source.block_device);
    CHECK(source.device == stat_of(device).st_rdev);
    auto file = StateFile::create(place.state, device, disk_bytes, memory_bytes, migration("m-1"));
    file.beat(false);
    path = file.path();
    { const auto gone = std::move(file); }
    CHECK(trusted(find()));
    // Its node's times mean nothing.
    set_heartbeat(path, second, false);
    CHECK(trusted(find()));
    // Device numbers of another boot mean nothing either: no start over.
    const auto sound = file_contents(path);
    edit(path, [](boost::json::object& header) { header["boot"] = "other"; });
    const auto found = find();
    CHECK(says(found, "another boot"));
    CHECK_FALSE(found.migration);
    put(path, 0, sound);
    const auto node = std::filesystem::path(device).filename().string();
    if (!std::filesystem::exists("/sys/block/" + node + "/diskseq")) {
      MESSAGE("SKIPPED: this kernel has no diskseq");
      return;
    }
  }
  const auto loop = LoopDevice::attach(disks / "b");
  if (!loop || loop->path() != device) {
    MESSAGE("SKIPPED: the loop device was taken by somebody else");
    return;
  }
  const auto found = find();
  CHECK(says(found, "is not that of"));
  CHECK_FALSE(found.migration);
}

TEST_CASE("state file: the default directory is the first one that we can have") {
  const TempDir memory("/dev/shm");
  const TempDir runtime("/dev/shm");
  const TempDir on_disk("/var/tmp");
  const char* const old = std::getenv("XDG_RUNTIME_DIR");
  const std::string kept = old != nullptr ? old : "";
  ::setenv("XDG_RUNTIME_DIR", runtime.path().c_str(), 1);

  CHECK(default_state_directory(memory / "a").path == memory / "a");
  CHECK((stat_of(memory / "a").st_mode & 07777) == 0700);
  CHECK_FALSE(std::filesystem::exists(runtime / "nbdferry"));
  CHECK(default_state_directory(memory / "none/deep").path == runtime / "nbdferry");
  std::ofstream(memory / "file") << "x";
  CHECK(default_state_directory(memory / "file").path == runtime / "nbdferry");
  if (!skip_unless_root("a directory of root's")) {
    std::filesystem::permissions(memory.path(), std::filesystem::perms(0755));
    std::filesystem::create_directory(memory / "roots");
    REQUIRE(::chown(runtime.path().c_str(), 65534, 0) == 0);
    std::filesystem::remove(runtime / "nbdferry");
    CHECK(as_nobody([&] { return default_state_directory(memory / "roots").path; }) ==
          runtime / "nbdferry");
    REQUIRE(::chown(runtime.path().c_str(), 0, 0) == 0);
  }

  ::setenv("XDG_RUNTIME_DIR", "relative", 1);
  const auto none = default_state_directory(memory / "none/deep");
  CHECK(none.path.empty());
  CHECK(none.why_not.find(memory / "none/deep' can't be made") != std::string::npos);
  CHECK(none.why_not.find("relative") == std::string::npos);
  CHECK(none.why_not.find("give --state") != std::string::npos);
  if (kept.empty()) {
    ::unsetenv("XDG_RUNTIME_DIR");
  } else {
    ::setenv("XDG_RUNTIME_DIR", kept.c_str(), 1);
  }
}

}  // namespace nbdferry::proxy::test
