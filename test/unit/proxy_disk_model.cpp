// LocalDisk against a naive twin in memory: random operations, many in flight, on each kind of
// backend; at the end the file itself, read by other means, equals the twin.
#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "proxy/checksum.hpp"
#include "test/unit/proxy_disk_fixture.hpp"

namespace nbdferry::proxy::test {

namespace {

constexpr std::uint64_t odd_size = 4 * 1024 * 1024 + 1234;  // not a multiple of any block
constexpr std::uint64_t even_size = 4 * 1024 * 1024;

struct Counts {
  std::uint64_t trims_done = 0;
  std::uint64_t trims_ignored = 0;
  std::uint64_t zeroes_refused = 0;
  std::uint64_t holes_seen = 0;
  unsigned in_flight_max = 0;
  std::uint64_t transfers_at_once = 0;  // reads and writes that didn't need the ring
};

class Model {
 public:
  Model(const LocalDiskOptions& options, std::uint64_t seed, bool allow_io_uring)
      : random_(seed), driven_(options, allow_io_uring), twin_(driven_.disk->size(), '\0') {}

  void run(unsigned operations, unsigned depth) {
    for (unsigned i = 0; i < operations; ++i) {
      while (open_.size() >= depth) settle();
      if (auto op = make_operation()) {
        counts.in_flight_max = std::max(counts.in_flight_max, driven_.disk->in_flight() + 1);
        const mirror::DiskOp copy = *op;
        const OpId id = driven_.submit(std::move(*op));
        const bool transfer = copy.command == Command::read || copy.command == Command::write;
        if (transfer && driven_.answers.contains(id)) ++counts.transfers_at_once;
        open_.emplace(id, copy);
      }
      settle_answered();
    }
    while (!open_.empty()) settle();
    CHECK(driven_.flush().error == IoError::none);
    for (std::uint64_t at = 0; at < twin_.size(); at += 1 << 20) {
      const auto end = std::min<std::uint64_t>(at + (1 << 20), twin_.size());
      CHECK(text(driven_.read(at, end)) == twin_.substr(at, end - at));
    }
    CHECK(driven_.disk->in_flight() == 0);
  }

  [[nodiscard]] const std::string& twin() const { return twin_; }
  Counts counts;

 private:
  std::uint64_t below(std::uint64_t n) { return random_() % n; }

  // Sizes that matter: within a sector, within a page, several pages, past the inline limit.
  ByteRange make_range() {
    static constexpr std::uint64_t longest[] = {512, 4096, 20000, 65536, 400000};
    std::uint64_t length = 1 + below(longest[below(5)]);
    std::uint64_t begin = below(twin_.size());
    static constexpr std::uint64_t units[] = {1, 512, 4096};
    const auto unit = units[below(3)];
    begin -= begin % unit;
    length += (unit - length % unit) % unit;
    return {begin, std::min<std::uint64_t>(begin + length, twin_.size())};
  }

  std::optional<mirror::DiskOp> make_operation() {
    mirror::DiskOp op;
    op.range = make_range();
    const auto wide = op.range.widened(driven_.disk->align());
    for (const auto& [id, other] : open_) {
      if (wide.overlaps(other.range.widened(driven_.disk->align()))) return std::nullopt;
    }
    static constexpr Command commands[] = {Command::read,  Command::read,  Command::write,
                                           Command::write, Command::write, Command::write,
                                           Command::trim,  Command::zero,  Command::block_status,
                                           Command::cache, Command::flush, Command::checksum};
    op.command = commands[below(std::size(commands))];
    op.fua = is_write(op.command) && below(8) == 0;
    op.may_hole = below(2) == 0;
    op.fast_only = below(4) == 0;
    if (op.command == Command::flush) op.range = {};
    if (op.command == Command::write) {
      // Sometimes a slice, as the rest of a longer payload: unaligned memory.
      const std::size_t skip = below(2) == 0 ? 0 : below(600);
      std::string data(op.range.length() + skip, '\0');
      for (auto& c : data) c = static_cast<char>(random_());
      op.payload = Payload::copy_of(std::as_bytes(std::span(data))).slice(skip, op.range.length());
    }
    return op;
  }

  void settle() {
    driven_.io.restart();
    if (driven_.answers.empty()) REQUIRE(driven_.io.run_one_for(std::chrono::seconds(60)) == 1);
    settle_answered();
  }

  void settle_answered() {
    for (auto& [id, done] : std::exchange(driven_.answers, {})) {
      auto node = open_.extract(id);
      REQUIRE_FALSE(node.empty());
      check(node.mapped(), done);
    }
  }

  void check(const mirror::DiskOp& op, const mirror::SourceDone& done) {
    INFO(to_string(op.command), " ", op.range.begin, "-", op.range.end, ": ",
         to_string(done.error));
    const auto begin = op.range.begin;
    const auto length = op.range.length();
    if (op.command == Command::zero && op.fast_only && done.error == IoError::not_supported) {
      ++counts.zeroes_refused;
      return;  // and nothing changed: later reads tell
    }
    CHECK(done.error == IoError::none);
    switch (op.command) {
      case Command::read:
        CHECK(text(done) == twin_.substr(begin, length));
        break;
      case Command::write:
        std::memcpy(&twin_[begin], op.payload.data(), length);
        break;
      case Command::trim:
        ++(done.changed ? counts.trims_done : counts.trims_ignored);
        if (done.changed) std::memset(&twin_[begin], 0, length);
        break;
      case Command::zero:
        std::memset(&twin_[begin], 0, length);
        break;
      case Command::block_status:
        check_extents(op.range, done.extents);
        break;
      case Command::checksum:
        CHECK(done.checksum == checksum_of(std::as_bytes(std::span(twin_).subspan(begin, length))));
        break;
      case Command::flush:
      case Command::cache:
        break;
    }
  }

  void check_extents(ByteRange range, const std::vector<Extent>& extents) {
    CHECK_FALSE(extents.empty());
    for (const auto& e : extents) {
      CHECK(e.length > 0);
      CHECK(e.length <= range.length());
      if (e.zero) {
        ++counts.holes_seen;
        CHECK(twin_.find_first_not_of('\0', range.begin) >= range.begin + e.length);
      }
      range.begin += e.length;
    }
  }

  std::mt19937_64 random_;
  DrivenDisk driven_;
  std::string twin_;
  std::map<OpId, mirror::DiskOp> open_;
};

void compare(const std::string& path, const std::string& twin) {
  // A device's page cache is shared, so this sees the same bytes; drop nothing, compare all.
  const std::string contents = file_contents(path);
  REQUIRE(contents.size() == twin.size());
  CHECK(contents == twin);
}

Counts check_backend(const std::string& path, bool direct, bool allow_io_uring = true,
                     std::uint64_t seed = 1) {
  CAPTURE(path);
  CAPTURE(direct);
  CAPTURE(seed);
  Counts counts;
  std::string twin;
  {
    Model model({.path = path, .direct = direct}, seed, allow_io_uring);
    model.run(2000, 24);
    twin = model.twin();
    counts = model.counts;
    CHECK((model.counts.transfers_at_once > 0) == !direct);
  }
  compare(path, twin);
  CHECK(counts.in_flight_max > 4);
  return counts;
}

}  // namespace

TEST_CASE("the disk behaves like its twin on tmpfs") {
  const TempDir dir("/dev/shm");
  for (const bool allow_io_uring : {true, false}) {
    const std::string path = dir / (allow_io_uring ? "ring" : "threads");
    make_file(path, odd_size);
    const auto counts = check_backend(path, false, allow_io_uring);
    CHECK(counts.trims_done > 0);
    CHECK(counts.zeroes_refused > 0);  // no ZERO_RANGE there
    CHECK(counts.holes_seen > 0);
  }
}

TEST_CASE("the disk behaves like its twin on file systems") {
  for (const std::string type : {"ext4", "xfs", "btrfs"}) {
    const auto fs = MountedFs::make(type, 512ULL << 20);
    if (!fs) continue;
    CAPTURE(type);
    for (const bool direct : {false, true}) {
      const std::string path = *fs / (direct ? "direct" : "buffered");
      make_file(path, odd_size);
      const auto counts = check_backend(path, direct);
      CHECK(counts.trims_done > 0);
      CHECK(counts.trims_ignored == 0);
      CHECK(counts.zeroes_refused == 0);
      CHECK(counts.holes_seen > 0);
    }
  }
}

TEST_CASE("the disk behaves like its twin on a block device") {
  for (const char* parent : {"/tmp", "/dev/shm"}) {
    const TempDir dir(parent);
    for (const bool direct : {false, true}) {
      const std::string file = dir / (direct ? "direct" : "buffered");
      make_file(file, even_size);
      const auto loop = LoopDevice::attach(file);
      if (!loop) return;
      CAPTURE(parent);
      const auto counts = check_backend(loop->path(), direct);
      CHECK(counts.trims_ignored > 0);   // those of less than a page
      CHECK(counts.zeroes_refused > 0);  // fast zeroes that must not make holes
      // On tmpfs the first zeroing without a hole makes the loop driver forget that it can punch:
      // a device that refuses what it offered, which must cost nothing but the trims.
      if (std::string(parent) == "/tmp") CHECK(counts.trims_done > 0);
    }
  }
}

}  // namespace nbdferry::proxy::test
