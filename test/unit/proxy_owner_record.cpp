// The ownership record: what a crash, damage or a failing disk may leave of it. The sweeps return
// whether the record's promise held, so that the mutants can be shown to break it.
#include <fstream>
#include <random>
#include <string>

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <doctest/doctest.h>

#include "mirror/assert.hpp"
#include "proxy/owner_record.hpp"
#include "test/unit/proxy_as_nobody.hpp"
#include "test/unit/proxy_disk_fixture.hpp"

namespace nbdferry::proxy::test {

namespace {

constexpr std::size_t slot = 4096;
constexpr std::size_t sector = 512;

struct Place {
  TempDir dir{"/dev/shm"};  // thousands of synchronous writes
  std::string disk = dir / "disk.img";
  std::string record = disk + ".owner";
  Place() { make_file(disk, 1 << 20); }
  [[nodiscard]] OwnerRecord load() const { return OwnerRecord::load(record, disk); }
};

Ownership pivoted(const std::string& uri) {
  Ownership o;
  o.role = Role::pivoted;
  o.uris = {uri, "nbd://second:10809"};
  o.tls = {transport::TlsUse::require, "/etc/pki", "", false};
  o.peer = "host-b";
  o.migration_id = "m-17";
  return o;
}

Ownership with_role(Role role) {
  Ownership o;
  o.role = role;
  return o;
}

void put(const std::string& path, const std::string& contents) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << contents;
}

// `after` in the sectors of slot `index` whose bit is set in `mask`, `before` elsewhere.
std::string torn(const std::string& before, const std::string& after, unsigned index,
                 unsigned mask) {
  std::string mixed = before;
  for (unsigned i = 0; i < slot / sector; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const auto at = index * slot + i * sector;
    mixed.replace(at, sector, after, at, sector);
  }
  return mixed;
}

// Writes a row of records; after each, every way in which power could have failed during it must
// leave the one before or this one. Loading must not depend on luck: all 256 sets of sectors.
bool torn_writes_leave_old_or_new() {
  const Place place;
  auto record = place.load();
  record.write(with_role(Role::incoming));
  constexpr Role roles[] = {Role::owner, Role::pivoted, Role::retired, Role::owner};
  bool held = true;
  char filler = 'a';
  for (const Role role : roles) {
    const auto old = record.current();
    const std::string before = file_contents(place.record);
    // Long and always different, so that every sector of the slot changes.
    auto wanted = with_role(role);
    wanted.uris = {std::string(3700, filler++)};
    record.write(wanted);
    const auto next = record.current();
    const std::string after = file_contents(place.record);
    const unsigned first = record.durable_slot();
    const std::string between = torn(before, after, first, 0xff);
    for (unsigned mask = 0; mask <= 0xff; ++mask) {
      put(place.record, torn(before, after, first, mask));
      const auto early = place.load().current();
      held = held && (early.generation == old.generation
                          ? early.role == old.role
                          : early.generation == next.generation && early.role == next.role);
      // The second slot follows without a promise of its own: the first is durable by then.
      put(place.record, torn(between, after, 1 - first, mask));
      const auto late = place.load().current();
      held = held && late.generation == next.generation && late.role == next.role;
    }
    put(place.record, after);
    record = place.load();
  }
  return held;
}

// Power fails right after write() has returned. None: impossible here (no loop devices).
std::optional<bool> a_written_record_survives_power_failure() {
  const auto fs = MountedFs::make("ext4", 32ULL << 20);
  if (!fs) return std::nullopt;
  const std::string disk = *fs / "disk.img";
  make_file(disk, 1 << 20);
  ::sync();
  auto record = OwnerRecord::load(disk + ".owner", disk);
  for (const Role role : {Role::incoming, Role::owner, Role::pivoted}) {
    record.write(with_role(role));
    const auto later = fs->after_power_failure();
    if (!later) return std::nullopt;
    const auto found = OwnerRecord::load(*later / "disk.img.owner", *later / "disk.img").current();
    if (found.role != role || found.generation != record.current().generation) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("an absent record means owner, and loading creates nothing") {
  const Place place;
  const auto record = place.load();
  CHECK(record.current().role == Role::owner);
  CHECK(record.current().generation == 0);
  CHECK_FALSE(std::filesystem::exists(place.record));
}

TEST_CASE("a record comes back as it was written, with the next generation") {
  const Place place;
  auto record = place.load();
  record.write(pivoted("nbd+unix:///x?socket=/a \"b\"\\c"));
  const auto found = place.load().current();
  CHECK(found.role == Role::pivoted);
  CHECK(found.uris ==
        std::vector<std::string>{"nbd+unix:///x?socket=/a \"b\"\\c", "nbd://second:10809"});
  CHECK(found.tls == pivoted("").tls);
  CHECK(found.peer == "host-b");
  CHECK(found.migration_id == "m-17");
  CHECK(found.generation == 1);
  CHECK(found.disk_id.size() == 32);
  CHECK(found.size == 1 << 20);
  CHECK(std::filesystem::file_size(place.record) == 2 * slot);

  for (std::uint64_t generation = 2; generation < 9; ++generation) {
    auto again = place.load();
    again.write(with_role(Role::retired));
    CHECK(place.load().current().generation == generation);
    CHECK(place.load().current().disk_id == found.disk_id);
  }
  CHECK(place.load().note().empty());
  CHECK_FALSE(std::filesystem::exists(place.record + ".new"));
}

TEST_CASE("a torn write leaves the old record or the new one") {
  CHECK(torn_writes_leave_old_or_new());
}

TEST_CASE("a written record survives a power failure") {
  CHECK(a_written_record_survives_power_failure().value_or(true));
}

#ifdef NBDFERRY_MUTANTS
TEST_CASE("the record's mutants are caught") {
  active_mutant = "record_one_slot";
  bool held = false;
  CHECK_FALSE((error_of([&] { held = torn_writes_leave_old_or_new(); }).empty() && held));
  active_mutant = "record_not_synced";
  CHECK_FALSE(a_written_record_survives_power_failure().value_or(false));
  active_mutant = nullptr;
}
#endif

TEST_CASE("damage to one slot doesn't bring an older role back") {
  const Place place;
  auto record = place.load();
  record.write(with_role(Role::owner));
  record.write(with_role(Role::retired));
  const std::string sound = file_contents(place.record);
  std::mt19937_64 random(7);
  for (const unsigned damaged : {0U, 1U}) {
    for (int i = 0; i < 50; ++i) {
      std::string contents = sound;
      contents[damaged * slot + random() % slot] ^= static_cast<char>(1U << random() % 8);
      put(place.record, contents);
      const auto found = place.load();
      CHECK(found.current().role == Role::retired);
      CHECK(found.note().find("damaged") != std::string::npos);
    }
  }
  // The next write repairs it.
  auto repaired = place.load();
  repaired.write(with_role(Role::owner));
  CHECK(place.load().note().empty());
  CHECK(place.load().current().generation == 3);
}

TEST_CASE("a record with both slots damaged is never taken for an owner") {
  const Place place;
  auto record = place.load();
  record.write(with_role(Role::retired));
  const std::string sound = file_contents(place.record);
  std::string flipped = sound;
  flipped[100] ^= 1;
  flipped[slot + 100] ^= 1;
  for (const std::string& contents : {flipped, std::string(), std::string(2 * slot, '\0'),
                                      sound.substr(0, slot - 1), std::string("owner\n")}) {
    put(place.record, contents);
    const auto error = error_of([&] { (void)place.load(); });
    CHECK(error.find("damaged") != std::string::npos);
    CHECK(error.find("which host") != std::string::npos);
  }
}

TEST_CASE("a copy of disk and record shows") {
  const Place place;
  auto record = place.load();
  record.write(with_role(Role::retired));
  const std::string copy = place.dir / "copy.img";
  std::filesystem::copy_file(place.disk, copy);
  std::filesystem::copy_file(place.record, copy + ".owner");
  const auto found = OwnerRecord::load(copy + ".owner", copy);
  CHECK(found.current().role == Role::retired);
  CHECK(found.current().disk_id == record.current().disk_id);
  CHECK(found.note().find("copied") != std::string::npos);
}

TEST_CASE("a symbolic link or a folder in the record's place is refused") {
  const Place place;
  auto record = place.load();
  const std::string elsewhere = place.dir / "elsewhere";
  put(elsewhere, "precious");
  std::filesystem::create_symlink(elsewhere, place.record);
  CHECK(error_of([&] { (void)place.load(); }).find("symbolic link") != std::string::npos);
  CHECK_FALSE(error_of([&] { record.write(with_role(Role::retired)); }).empty());
  CHECK(file_contents(elsewhere) == "precious");
  std::filesystem::remove(place.record);
  std::filesystem::create_directory(place.record);
  CHECK(error_of([&] { (void)place.load(); }).find("is not a file") != std::string::npos);
}

TEST_CASE("a second name or a pipe in the record's place is refused, and nothing hangs") {
  const Place place;
  auto record = place.load();
  record.write(with_role(Role::owner));
  const std::string sound = file_contents(place.record);
  const std::string other = place.dir / "other";
  std::filesystem::create_hard_link(place.record, other);
  CHECK(error_of([&] { (void)place.load(); }).find("hard link") != std::string::npos);
  CHECK(error_of([&] { record.write(with_role(Role::retired)); }).find("hard link") !=
        std::string::npos);
  CHECK(file_contents(other) == sound);
  std::filesystem::remove(place.record);
  REQUIRE(::mkfifo(place.record.c_str(), 0600) == 0);
  CHECK(error_of([&] { (void)place.load(); }).find("is not a file") != std::string::npos);
  CHECK_FALSE(error_of([&] { record.write(with_role(Role::retired)); }).empty());
}

TEST_CASE("the temporary file of a first record follows no link either") {
  const Place place;
  const std::string elsewhere = place.dir / "elsewhere";
  put(elsewhere, "precious");
  std::filesystem::create_symlink(elsewhere, place.record + ".new");
  auto record = place.load();
  record.write(with_role(Role::retired));
  CHECK(file_contents(elsewhere) == "precious");
  CHECK(std::filesystem::is_regular_file(std::filesystem::symlink_status(place.record)));
  struct stat st {};
  REQUIRE(::stat(place.record.c_str(), &st) == 0);
  CHECK((st.st_mode & 0777) == 0600);
}

TEST_CASE("a temporary file that somebody else has put there is not written to") {
  const Place place;
  const std::string elsewhere = place.dir / "elsewhere";
  put(elsewhere, "precious");
  std::filesystem::permissions(elsewhere, std::filesystem::perms(0666));
  std::filesystem::create_symlink(elsewhere, place.record + ".new");
  // Sticky: only root could remove the link, and the kernel lets links of the folder's owner be
  // followed.
  std::filesystem::permissions(place.dir.path(), std::filesystem::perms(01777));
  std::string failure;
  auto record = place.load();
  if (!as_nobody([&] { failure = error_of([&] { record.write(with_role(Role::retired)); }); })) {
    return;
  }
  CHECK(failure.find("can't be created") != std::string::npos);
  CHECK(file_contents(elsewhere) == "precious");
}

TEST_CASE("a record that a stranger has put there is not believed") {
  if (::geteuid() != 0) {
    MESSAGE("SKIPPED: only root can give a record to another user");
    return;
  }
  const Place place;
  auto record = place.load();
  record.write(with_role(Role::retired));
  REQUIRE(::chown(place.record.c_str(), 65534, 65534) == 0);
  CHECK(error_of([&] { (void)place.load(); }).find("a stranger (uid 65534)") != std::string::npos);
  CHECK_FALSE(error_of([&] { record.write(with_role(Role::owner)); }).empty());
  // The disk's owner may well keep its record.
  REQUIRE(::chown(place.disk.c_str(), 65534, 65534) == 0);
  CHECK(place.load().current().role == Role::retired);
}

TEST_CASE("who may not create a record hears of it at the start, and what to do") {
  const TempDir dir("/dev/shm");
  std::filesystem::permissions(dir.path(), std::filesystem::perms(0755));
  const std::string disk = dir / "disk.img";
  make_file(disk, 1 << 20);
  std::string beside;
  std::string absent;
  std::string failure;
  const bool tried = as_nobody([&] {
    beside = OwnerRecord::load(disk + ".owner", disk).note();
    auto record = OwnerRecord::load(dir / "lib/nbdferry/dm-1.owner", disk);
    absent = record.note();
    failure = error_of([&] { record.write(with_role(Role::retired)); });
  });
  if (!tried) return;
  CHECK(beside.find("no migration could be committed: let uid 65534 write to its folder") !=
        std::string::npos);
  const std::string how = "install -d -o 65534 " + (dir / "lib/nbdferry");
  CHECK(absent.find(how) != std::string::npos);
  CHECK(failure.find(how) != std::string::npos);
  CHECK(OwnerRecord::load(dir / "lib/nbdferry/dm-1.owner", disk).note().empty());
}

TEST_CASE("a record that can't be written is reported, and the old one stands") {
  const Place place;
  auto record = place.load();
  // As nobody: root may write anywhere.
  std::filesystem::permissions(place.dir.path(), std::filesystem::perms(0755));
  const auto as_nobody = [](auto&& f) {
    if (::geteuid() != 0) return error_of(f);
    REQUIRE(::seteuid(65534) == 0);
    auto error = error_of(f);
    REQUIRE(::seteuid(0) == 0);
    return error;
  };
  if (::geteuid() == 0) {
    CHECK(as_nobody([&] { record.write(with_role(Role::retired)); }).find("can't be created") !=
          std::string::npos);
    CHECK_FALSE(std::filesystem::exists(place.record));
    CHECK(record.current().generation == 0);
  }
  record.write(with_role(Role::incoming));
  if (::geteuid() == 0) {
    const auto error = as_nobody([&] { record.write(with_role(Role::owner)); });
    CHECK(error.find("still says incoming") != std::string::npos);
    CHECK(place.load().current().generation == 1);
  }
  // A disk that takes only some of the slot: a limit on the file's size cuts the write short.
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit old{};
  ::getrlimit(RLIMIT_FSIZE, &old);
  CHECK(record.durable_slot() == 0);
  rlimit cut = old;
  cut.rlim_cur = slot + 3 * sector;
  ::setrlimit(RLIMIT_FSIZE, &cut);
  const auto error = error_of([&] { record.write(with_role(Role::owner)); });
  ::setrlimit(RLIMIT_FSIZE, &old);
  ::signal(SIGXFSZ, SIG_DFL);
  CHECK(error.find("can't be written") != std::string::npos);
  CHECK(record.current().role == Role::incoming);
  CHECK(place.load().current().role == Role::incoming);
  // And it works again afterwards.
  record.write(with_role(Role::retired));
  CHECK(place.load().current().role == Role::retired);
  CHECK(place.load().current().generation == 2);
}

TEST_CASE("a record that doesn't fit is refused before anything is written") {
  const Place place;
  auto record = place.load();
  record.write(with_role(Role::owner));
  const std::string before = file_contents(place.record);
  CHECK(error_of([&] { record.write(pivoted(std::string(5000, 'x'))); }).find("longer") !=
        std::string::npos);
  CHECK(file_contents(place.record) == before);
}

TEST_CASE("a leftover of a crash during creation doesn't matter") {
  const Place place;
  put(place.record + ".new", "half");
  auto record = place.load();
  CHECK(record.current().generation == 0);
  record.write(with_role(Role::incoming));
  CHECK(place.load().current().role == Role::incoming);
}

TEST_CASE("a first record that was believed survives a power failure") {
  const auto fs = MountedFs::make("ext4", 32ULL << 20);
  if (!fs) return;
  const std::string disk = *fs / "disk.img";
  const std::string record = disk + ".owner";
  make_file(disk, 1 << 20);
  OwnerRecord::load(record, disk).write(with_role(Role::retired));
  std::filesystem::rename(record, record + ".new");
  ::sync();
  // Killed before it synced the folder.
  std::filesystem::rename(record + ".new", record);
  REQUIRE(OwnerRecord::load(record, disk).current().role == Role::retired);
  const auto later = fs->after_power_failure();
  REQUIRE(later);
  CHECK(OwnerRecord::load(*later / "disk.img.owner", *later / "disk.img").current().role ==
        Role::retired);
}

TEST_CASE("the record lies beside the file, whatever the file is called by") {
  const Place place;
  CHECK(owner_record_place(place.disk).path == place.record);
  std::filesystem::create_symlink(place.disk, place.dir / "alias.img");
  CHECK(owner_record_place(place.dir / "alias.img").path == place.record);
  CHECK(error_of([&] { (void)owner_record_place(place.dir / "none"); }).find("check the path") !=
        std::string::npos);
}

TEST_CASE("a block device's record goes by what is the same after a reboot") {
  const TempDir sysfs;
  const auto device = [&](const std::string& name, const std::string& file,
                          const std::string& contents) {
    const auto path = sysfs.path() / name / file;
    std::filesystem::create_directories(path.parent_path());
    put(path, contents);
    return stable_device_id(sysfs.path() / name);
  };
  CHECK(device("dm-0", "dm/uuid", "LVM-abc/DEF\n") == "dm-LVM-abc_DEF");
  CHECK(device("nvme0n1", "wwid", "eui.0025\n") == "wwid-eui.0025");
  CHECK(device("vda", "serial", "disk 7 \n") == "serial-disk_7");
  CHECK(device("vda/vda2", "partition", "2\n") == "serial-disk_7-part2");
  CHECK(device("loop0", "serial", "\n") == std::nullopt);

  const TempDir dir("/dev/shm");
  make_file(dir / "file", 1 << 20);
  const auto loop = LoopDevice::attach(dir / "file");
  if (!loop) return;
  const auto place = owner_record_place(loop->path(), dir / "devices/deep");
  CHECK(place.path.starts_with(dir / "devices/deep/device-7:"));
  CHECK(place.note.find("no serial number") != std::string::npos);
  auto record = OwnerRecord::load(place.path, loop->path());
  record.write(with_role(Role::retired));  // makes the folder
  const auto again = OwnerRecord::load(place.path, loop->path());
  CHECK(again.current().role == Role::retired);
  CHECK(again.note().empty());
}

}  // namespace nbdferry::proxy::test
