// Verification: by checksums where the target tells them, and what of it outlives the process.
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include "mirror/engine.hpp"
#include "mirror/resume_map.hpp"

namespace nbdferry::mirror {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr std::uint64_t mib = 1024 * 1024;
constexpr std::uint64_t disk_bytes = 8 * mib;

// What outlives the process: the state, and the target's bad blocks.
struct World {
  std::vector<std::uint64_t> words =
      std::vector<std::uint64_t>(ResumeMap::bytes_for(disk_bytes) / sizeof(std::uint64_t));
  std::set<std::uint64_t> bad;  // blocks of 4 KiB
  unsigned flushes_fail = 0;    // the next so many
};

// A life of the process: both disks answer at once, as far as the test lets them.
class Life {
 public:
  Life(World& world, bool resumed, TargetInfo info, MigrateOptions options = {})
      : world_(world), engine_(config()) {
    apply(Start{CommandId{1}, options, std::as_writable_bytes(std::span(world_.words)), resumed});
    info.size = disk_bytes;
    info.can_flush = info.can_zero = true;
    apply(TargetUp{info});
    level();
  }

  // Copied, and flushed.
  void level() {
    for (int i = 0; i < 20; ++i) tick(milliseconds(100));
    REQUIRE(status().in_sync);
  }
  void tick(Duration by) {
    answer();
    now_ += by;
    apply(Tick{});
    answer();
  }
  template <typename E>
  const CommandDone& run(E&& event, int ticks = 50) {
    done_ = {};
    event.command = CommandId{7};
    apply(std::forward<E>(event));
    for (int i = 0; i < ticks; ++i) tick(milliseconds(20));
    CAPTURE(done_.message);
    return done_;
  }
  [[nodiscard]] Status status() const { return engine_.status(); }

  std::uint64_t read = 0;               // bytes, of the target
  std::uint64_t summed = 0;             // likewise
  std::uint64_t written = 0;            // likewise
  std::uint64_t sums_max = UINT64_MAX;  // then it is silent
  bool refuses_sums = false;

 private:
  static EngineConfig config() {
    EngineConfig c;
    c.size = disk_bytes;
    return c;
  }
  void apply(Event&& event) {
    Actions out;
    engine_.apply(std::move(event), now_, out);
    for (auto& a : out) {
      if (auto* source = std::get_if<SubmitSource>(&a)) source_.push_back(std::move(source->op));
      if (auto* target = std::get_if<SubmitTarget>(&a)) target_.push_back(std::move(target->op));
      if (auto* done = std::get_if<CommandDone>(&a)) done_ = std::move(*done);
      if (std::get_if<WriteRecord>(&a) != nullptr) record_ = true;
    }
  }
  void answer() {
    while (!source_.empty() || !target_.empty() || record_) {
      for (auto& op : std::exchange(source_, {})) apply(source_answer(op));
      if (std::exchange(record_, false)) apply(RecordWritten{true, {}});
      bool any = false;
      for (auto& op : std::exchange(target_, {})) {
        if (op.command == Command::checksum && summed >= sums_max) {
          target_.push_back(std::move(op));
        } else {
          any = true;
          apply(target_answer(op));
        }
      }
      if (!any && source_.empty() && !record_) return;
    }
  }
  static Payload filled(std::uint64_t length) {
    Buffer b(length);
    std::fill(b.bytes().begin(), b.bytes().end(), std::byte{2});
    return std::move(b).freeze();
  }
  static SourceDone source_answer(const DiskOp& op) {
    SourceDone done;
    done.id = op.id;
    if (op.command == Command::read) done.data = filled(op.range.length());
    if (op.command == Command::block_status) done.extents = {{op.range.length(), false, false}};
    return done;
  }
  TargetDone target_answer(const DiskOp& op) {
    TargetDone done;
    done.id = op.id;
    const auto from = world_.bad.lower_bound(op.range.begin / block_size_min);
    const auto to = world_.bad.lower_bound(op.range.end / block_size_min);
    if (op.command == Command::checksum) {
      summed += op.range.length();
      if (refuses_sums) done.error = IoError::not_supported;
      done.checksum = from == to ? 0 : 1;
    } else if (op.command == Command::read) {
      read += op.range.length();
      Buffer b(op.range.length());
      std::fill(b.bytes().begin(), b.bytes().end(), std::byte{2});
      for (auto it = from; it != to; ++it) {
        b.data()[*it * block_size_min - op.range.begin] = std::byte{3};
      }
      done.data = std::move(b).freeze();
    } else if (is_write(op.command)) {
      world_.bad.erase(from, to);
      written += op.range.length();
    } else if (op.command == Command::flush && world_.flushes_fail != 0) {
      --world_.flushes_fail;
      done.error = IoError::io;
    }
    return done;
  }

  World& world_;
  Engine engine_;
  Time now_ = seconds(1);
  std::vector<DiskOp> source_;
  std::vector<DiskOp> target_;
  bool record_ = false;
  CommandDone done_;
};

TargetInfo summing(bool proven = true) {
  TargetInfo info;
  info.can_checksum = true;
  info.incoming = info.fenced = info.proven = proven;
  return info;
}

bool says(const CommandDone& done, const std::string& text) {
  CAPTURE(done.message);
  return done.message.find(text) != std::string::npos;
}

}  // namespace

TEST_CASE("verify: by checksums nothing is read of what is alike, and little of what is not") {
  World world;
  Life life(world, false, summing());
  CHECK(life.run(Verify{}).ok);
  CHECK(life.read == 0);
  CHECK(life.summed == disk_bytes);

  world.bad = {100, 1000};
  const CommandDone& done = life.run(Verify{});
  CHECK_FALSE(done.ok);
  CHECK(says(done, std::to_string(disk_bytes) + " bytes compared, 8192 differed"));
  CHECK(life.read == 2 * Limits{}.checksum_bytes);
  CHECK(world.bad.empty());  // healed
  CHECK(says(life.run(Switch{}), "acknowledge"));
  CHECK(life.run(Verify{{}, true}).ok);
  CHECK(life.run(Switch{}).ok);
}

TEST_CASE("verify: what the target refuses to sum up is read, and all of it where it has no sums") {
  World world;
  world.bad = {7};
  SUBCASE("refused") {
    Life life(world, false, summing());
    world.bad = {7};
    life.refuses_sums = true;
    CHECK(says(life.run(Verify{}, 200), "4096 differed"));
    CHECK(life.read == disk_bytes);
  }
  SUBCASE("not offered") {
    Life life(world, false, {});
    world.bad = {7};
    CHECK(says(life.run(Verify{}), "4096 differed"));
    CHECK(life.read == disk_bytes);
    CHECK(life.summed == 0);
  }
}

TEST_CASE("verify: a difference holds up a switchover after a restart, too, until acknowledged") {
  World world;
  {
    Life life(world, false, summing());
    world.bad = {5};
    CHECK_FALSE(life.run(Verify{}).ok);
  }
  {
    Life life(world, true, summing());
    CHECK(life.status().resumed_bytes > 0);
    CHECK(says(life.run(Switch{}), "acknowledge"));
    CHECK(life.run(Verify{{}, true}).ok);
  }
  Life life(world, true, summing());
  CHECK(life.run(Switch{}).ok);
}

// It may be another one, which reads the same, and has not flushed it.
TEST_CASE("after a restart a target that can't prove itself has to flush what it holds") {
  World world;
  { Life life(world, false, summing()); }
  bool proven = false;
  SUBCASE("it can't") {}
  SUBCASE("it can") { proven = true; }
  SUBCASE("its flush is good") {
    Life life(world, true, summing(false));
    CHECK(life.written == 0);
    return;
  }
  world.flushes_fail = 1;
  Life life(world, true, summing(proven));
  CHECK(life.status().resumed_bytes == disk_bytes);
  CHECK(life.written == (proven ? 0 : disk_bytes));
}

TEST_CASE("verify: one that a restart interrupts goes on, if the target proves itself") {
  World world;
  {
    Life life(world, false, summing());
    life.sums_max = disk_bytes / 2;
    CHECK(life.run(Verify{}).command == CommandId{});  // it hangs
    CHECK(life.status().verified_bytes == disk_bytes / 2);
  }
  SUBCASE("it does") {
    Life life(world, true, summing());
    CHECK(life.status().verified_bytes == disk_bytes / 2);
    const CommandDone& done = life.run(Verify{});
    CHECK(done.ok);
    CHECK(says(done, "begun earlier"));
    CHECK(life.summed == disk_bytes / 2);
    SUBCASE("and the next one compares all of it") {
      CHECK(life.run(Verify{}).ok);
      CHECK(life.summed == disk_bytes / 2 + disk_bytes);
    }
  }
  SUBCASE("it does not") {
    MigrateOptions options;
    options.quarantine = milliseconds(1);
    Life life(world, true, summing(false), options);
    const CommandDone& done = life.run(Verify{});
    CHECK(done.ok);
    CHECK_FALSE(says(done, "begun earlier"));
    CHECK(life.summed == disk_bytes);
  }
}

TEST_CASE("verify: one that found a difference begins anew after a restart") {
  World world;
  {
    Life life(world, false, summing());
    world.bad = {5};
    life.sums_max = disk_bytes - mib;
    (void)life.run(Verify{});
    CHECK(life.status().mismatched_bytes == 4096);
  }
  Life life(world, true, summing());
  CHECK(life.status().verified_bytes == 0);
  CHECK(says(life.run(Switch{}), "acknowledge"));
}

TEST_CASE("--verify: what was verified before a restart is, if the target proves itself") {
  World world;
  MigrateOptions options;
  options.verify = true;
  {
    Life life(world, false, summing(), options);
    CHECK(life.status().verified_bytes == disk_bytes);  // by itself
  }
  Life life(world, true, summing(), options);
  CHECK(life.run(Switch{}).ok);
  CHECK(life.summed == 0);
}

}  // namespace nbdferry::mirror
