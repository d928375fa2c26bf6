// LocalDisk where things go wrong or end: full and failing disks, files cut short, read-only disks,
// refused zeroing, destruction with operations in the kernel.
#include <chrono>
#include <string>
#include <vector>

#include <sys/stat.h>
#include <unistd.h>

#include <doctest/doctest.h>

#include "test/unit/proxy_disk_fixture.hpp"

namespace nbdferry::proxy::test {

namespace {

using std::chrono::milliseconds;

constexpr std::uint64_t mib = 1 << 20;

mirror::DiskOp make_op(Command command, std::uint64_t begin, std::uint64_t end) {
  mirror::DiskOp op;
  op.command = command;
  op.range = {begin, end};
  if (command == Command::write) op.payload = Payload::zeroes(op.range.length());
  return op;
}

// Writes mebibytes until one fails, or all are written.
IoError fill(DrivenDisk& driven, std::uint64_t step) {
  const std::string data(step, 'x');
  for (std::uint64_t at = 0; at + step <= driven.disk->size(); at += step) {
    const auto error = driven.write(at, data).error;
    if (error != IoError::none) return error;
  }
  return IoError::none;
}

}  // namespace

TEST_CASE("a full file system is ENOSPC, inline and on the ring, and room helps again") {
  for (const std::string type : {"tmpfs", "ext4"}) {
    const auto fs = MountedFs::make(type, 16 * mib);
    if (!fs) continue;
    for (const std::uint64_t step : {mib / 16, mib}) {  // inline; ring
      CAPTURE(type);
      CAPTURE(step);
      const std::string path = *fs / "disk";
      make_file(path, 64 * mib);
      {
        DrivenDisk driven({.path = path});
        CHECK(fill(driven, step) == IoError::no_space);
        CHECK(driven.write(0, "still writable").error == IoError::none);
        CHECK(text(driven.read(0, 14)) == "still writable");
        CHECK(driven.trim(0, 8 * mib).changed);
        CHECK(driven.write(4 * mib, std::string(mib, 'y')).error == IoError::none);
        CHECK(driven.flush().error == IoError::none);
      }
      std::filesystem::remove(path);
    }
  }
}

TEST_CASE("a device that fails gives EIO and goes on") {
  const TempDir dir("/dev/shm");
  const std::string file = dir / "file";
  make_file(file, 8 * mib);
  const auto loop = LoopDevice::attach(file);
  if (!loop) return;
  REQUIRE(::truncate(file.c_str(), 4 * mib) == 0);  // what lies beyond can't be read any more
  for (const bool direct : {false, true}) {
    CAPTURE(direct);
    DrivenDisk driven({.path = loop->path(), .direct = direct});
    CHECK(driven.read(6 * mib, 6 * mib + 4096).error == IoError::io);
    CHECK(driven.read(6 * mib, 7 * mib).error == IoError::io);
    CHECK(driven.write(mib, std::string(4096, 'a')).error == IoError::none);
    CHECK(text(driven.read(mib, mib + 4096)) == std::string(4096, 'a'));
    CHECK(driven.flush().error == IoError::none);
  }
}

TEST_CASE("a flush reports what couldn't be written back") {
  const auto fs = MountedFs::make("tmpfs", 2 * mib);
  if (!fs) return;
  make_file(*fs / "file", 8 * mib);
  const auto loop = LoopDevice::attach(*fs / "file");
  if (!loop) return;
  DrivenDisk driven({.path = loop->path()});
  (void)fill(driven, 256 * 1024);  // into the page cache: nothing fails yet, or it already does
  const auto error = driven.flush().error;
  CHECK((error == IoError::no_space || error == IoError::io));
  // FUA has no page cache to hide in.
  CHECK(driven.write(7 * mib, std::string(4096, 'b'), true).error != IoError::none);
}

TEST_CASE("a file cut short behind our back reads as EIO") {
  for (const char* parent : {"/tmp", "/dev/shm"}) {
    const TempDir dir(parent);
    make_file(dir / "disk", 4 * mib);
    DrivenDisk driven({.path = dir / "disk"});
    REQUIRE(::truncate((dir / "disk").c_str(), mib + 100) == 0);
    CHECK(driven.read(2 * mib, 2 * mib + 4096).error == IoError::io);
    CHECK(driven.read(mib, mib + 4096).error == IoError::io);
    CHECK(driven.read(0, 4 * mib).error == IoError::io);
    CHECK(driven.read(0, mib).error == IoError::none);
  }
}

TEST_CASE("a read-only disk takes no write of any sort") {
  const TempDir dir;
  make_file(dir / "disk", mib);
  DrivenDisk driven({.path = dir / "disk", .read_only = true});
  for (const Command command : {Command::write, Command::trim, Command::zero}) {
    CHECK(driven.run(make_op(command, 0, 4096)).error == IoError::not_permitted);
  }
  CHECK(driven.flush().error == IoError::none);
  CHECK(driven.read(0, 4096).error == IoError::none);
  CHECK(driven.run(make_op(Command::block_status, 0, mib)).extents ==
        std::vector<Extent>{{mib, true, true}});
}

TEST_CASE("the last bytes of an odd disk are served exactly") {
  const TempDir dir;
  make_file(dir / "disk", 4096 + 77);
  for (const bool direct : {false, true}) {
    DrivenDisk driven({.path = dir / "disk", .direct = direct});
    CHECK(driven.disk->align() == (direct ? 4096 : 1));
    CHECK(driven.write(4096, std::string(77, 'z')).error == IoError::none);
    CHECK(text(driven.read(4000, 4173)) == std::string(96, '\0') + std::string(77, 'z'));
    CHECK(driven.run(make_op(Command::zero, 4100, 4173)).error == IoError::none);
    CHECK(text(driven.read(4096, 4173)) == "zzzz" + std::string(73, '\0'));
    CHECK(std::filesystem::file_size(dir / "disk") == 4173);
  }
}

TEST_CASE("the longest request there is goes through whole") {
  const TempDir dir;
  make_file(dir / "disk", 40 * mib);
  std::string data(32 * mib, '\0');
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<char>(i * 7 + (i >> 12));
  for (const bool direct : {false, true}) {
    for (const std::uint64_t begin : {4 * mib, 4 * mib + 3}) {
      DrivenDisk driven({.path = dir / "disk", .direct = direct});
      CHECK(driven.write(begin, data, true).error == IoError::none);
      CHECK(text(driven.read(begin, begin + data.size())) == data);
    }
  }
}

TEST_CASE("zeroes: allocated if asked for, quick or refused") {
  const auto fs = MountedFs::make("ext4", 64 * mib);
  if (!fs) return;
  make_file(*fs / "disk", 4 * mib);
  DrivenDisk driven({.path = *fs / "disk"});
  const auto allocated = [&] {
    CHECK(driven.flush().error == IoError::none);
    struct stat st {};
    REQUIRE(::stat((*fs / "disk").c_str(), &st) == 0);
    return static_cast<std::uint64_t>(st.st_blocks) * 512;
  };
  CHECK(driven.write(0, std::string(4 * mib, 'x')).error == IoError::none);
  auto op = make_op(Command::zero, 0, 4 * mib);
  op.may_hole = false;
  op.fast_only = true;
  CHECK(driven.run(std::move(op)).error == IoError::none);
  CHECK(allocated() >= 4 * mib);
  CHECK(text(driven.read(mib, mib + 10)) == std::string(10, '\0'));
  CHECK(driven.run(make_op(Command::zero, 0, 4 * mib)).error == IoError::none);
  CHECK(allocated() == 0);
}

TEST_CASE("a TRIM that the device refuses changes nothing, unwritten data included") {
  // A loop device over tmpfs offers to make zeroes, and withdraws it at the first request to do so
  // without a hole. The kernel drops the dirty pages of the range before it finds out.
  const TempDir dir("/dev/shm");
  make_file(dir / "file", mib);
  const auto loop = LoopDevice::attach(dir / "file");
  if (!loop) return;
  DrivenDisk driven({.path = loop->path()});
  CHECK(driven.write(0, std::string(8192, 'a')).error == IoError::none);
  CHECK(driven.flush().error == IoError::none);
  auto zero = make_op(Command::zero, 65536, 69632);
  zero.may_hole = false;
  CHECK(driven.run(std::move(zero)).error == IoError::none);
  CHECK(driven.write(0, std::string(8192, 'b')).error == IoError::none);
  const auto trimmed = driven.trim(0, 8192);
  CHECK(trimmed.error == IoError::none);
  CHECK_FALSE(driven.trim(12288, 12800).changed);  // part of a page: not even tried
  CHECK(text(driven.read(0, 8192)) == std::string(8192, trimmed.changed ? '\0' : 'b'));
  CHECK(driven.flush().error == IoError::none);
  CHECK(text(driven.read(0, 8192)) == std::string(8192, trimmed.changed ? '\0' : 'b'));
}

TEST_CASE("what was flushed or written with FUA survives a power failure") {
  for (const std::string type : {"ext4", "xfs", "btrfs"}) {
    const auto fs = MountedFs::make(type, 320 * mib);
    if (!fs) continue;
    for (const bool direct : {false, true}) {
      CAPTURE(type);
      CAPTURE(direct);
      const std::string name = direct ? "direct" : "buffered";
      make_file(*fs / name, 4 * mib);
      DrivenDisk driven({.path = *fs / name, .direct = direct});
      const auto survivor = [&] {
        const auto later = fs->after_power_failure();
        return later ? file_contents(*later / name) : std::string();
      };
      CHECK(driven.write(0, std::string(mib, 'a')).error == IoError::none);
      CHECK(driven.write(mib + 5, std::string(5000, 'b')).error == IoError::none);
      CHECK(driven.flush().error == IoError::none);
      std::string expected(4 * mib, '\0');
      expected.replace(0, mib, mib, 'a');
      expected.replace(mib + 5, 5000, 5000, 'b');
      CHECK(survivor() == expected);
      // Each sort of write alone, without a flush after it.
      CHECK(driven.write(2 * mib, std::string(4096, 'c'), true).error == IoError::none);
      expected.replace(2 * mib, 4096, 4096, 'c');
      CHECK(survivor() == expected);
      auto trim = make_op(Command::trim, 4096, 65536);
      trim.fua = true;
      CHECK(driven.run(std::move(trim)).changed);
      expected.replace(4096, 61440, 61440, '\0');
      CHECK(survivor() == expected);
      auto zero = make_op(Command::zero, 131072, 135268);
      zero.fua = true;
      zero.may_hole = false;
      CHECK(driven.run(std::move(zero)).error == IoError::none);
      expected.replace(131072, 4196, 4196, '\0');
      CHECK(survivor() == expected);
    }
  }
}

TEST_CASE("a destroyed disk waits for the kernel and answers nothing more") {
  const TempDir dir;
  make_file(dir / "disk", 64 * mib);
  for (const bool allow_io_uring : {true, false}) {
    for (const bool turn : {false, true}) {  // queued only; in the kernel
      DrivenDisk driven({.path = dir / "disk", .direct = true}, allow_io_uring);
      for (std::uint64_t i = 0; i < 400; ++i) {  // more than the ring's depth
        const auto at = i * 128 * 1024;
        (void)driven.submit(make_op(i % 2 ? Command::read : Command::write, at, at + 65536));
      }
      (void)driven.submit(make_op(Command::block_status, 0, 64 * mib));
      (void)driven.submit(make_op(Command::trim, 60 * mib, 64 * mib));
      CHECK(driven.disk->in_flight() == 402);
      if (turn) driven.io.poll_one();
      driven.disk.reset();
      const auto answered = driven.answers.size();
      driven.io.restart();
      driven.io.run();
      CHECK(driven.answers.size() == answered);
    }
  }
}

TEST_CASE("an idle disk doesn't keep the loop running") {
  const TempDir dir;
  make_file(dir / "disk", mib);
  DrivenDisk driven({.path = dir / "disk", .direct = true});
  for (std::uint64_t i = 0; i < 600; ++i) (void)driven.submit(make_op(Command::read, 0, 4096));
  (void)driven.submit(make_op(Command::block_status, 0, mib));
  driven.io.run();
  CHECK(driven.answers.size() == 601);
  CHECK(driven.disk->in_flight() == 0);
}

TEST_CASE("after slow inline writes the ring is used for a while, longer if it repeats") {
  using Clock = InlineGate::Clock;
  InlineGate gate;
  auto now = Clock::now();
  const auto write = [&](milliseconds took) {
    gate.ran(now, now + took);
    now += took;
  };
  const auto quick = [&] {
    for (int i = 0; i < 100; ++i) write(milliseconds(0));
  };
  quick();
  write(milliseconds(3));  // once may be the processor
  CHECK(gate.is_open(now));
  quick();
  write(milliseconds(3));
  CHECK(gate.is_open(now));

  std::vector<Clock::duration> closed;
  for (int i = 0; i < 12; ++i) {
    write(milliseconds(3));
    const auto from = now;
    while (!gate.is_open(now)) now += milliseconds(1);
    closed.push_back(now - from);
  }
  CHECK(closed.front() == milliseconds(20));
  CHECK(closed[1] == milliseconds(40));
  CHECK(closed.back() == milliseconds(10000));

  now += milliseconds(30000);  // long quiet: begins small again
  quick();
  write(milliseconds(60));  // no processor is busy for that long
  CHECK_FALSE(gate.is_open(now + milliseconds(19)));
  CHECK(gate.is_open(now + milliseconds(20)));
}

}  // namespace nbdferry::proxy::test
