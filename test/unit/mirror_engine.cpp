// The core between two disks that answer when the test says so: what it sends, and in which order.
#include <map>
#include <vector>

#include <doctest/doctest.h>

#include "mirror/engine.hpp"

namespace nbdferry::mirror {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr std::uint64_t kib = 1024;
constexpr std::uint64_t mib = 1024 * kib;

class Rig {
 public:
  explicit Rig(std::uint64_t size, const MigrateOptions& options, Limits limits = {})
      : engine_(config(size, limits)) {
    apply(Start{CommandId{1}, options});
    apply(TargetUp{usual(size)});
  }
  explicit Rig(std::uint64_t size) : engine_(config(size, {})) {}

  static TargetInfo usual(std::uint64_t size) {
    TargetInfo info;
    info.size = size;
    info.can_flush = info.can_zero = true;
    return info;
  }

  void apply(Event&& event) {
    Actions out;
    engine_.apply(std::move(event), now_, out);
    for (auto& a : out) {
      if (auto* source = std::get_if<SubmitSource>(&a)) source_.push_back(std::move(source->op));
      if (auto* target = std::get_if<SubmitTarget>(&a)) {
        target_.push_back(target->op);
        sent_.push_back(std::move(target->op));
        if (sent_.back().range.length() > 64 * kib) sent_.back().payload = {};
      }
      if (std::get_if<Reply>(&a) != nullptr) ++replies_;
      if (auto* path = std::get_if<LeavePath>(&a)) left_.push_back(path->path);
      if (auto* done = std::get_if<CommandDone>(&a)) done_ = std::move(*done);
    }
  }
  void tick(Duration by) {
    now_ += by;
    apply(Tick{});
  }
  void write(ByteRange range, bool fua = false) {
    GuestRequest r;
    r.id = RequestId{++last_};
    r.command = Command::write;
    r.range = range;
    r.fua = fua;
    Buffer b(range.length());
    std::fill(b.bytes().begin(), b.bytes().end(), std::byte{1});
    r.payload = std::move(b).freeze();
    apply(std::move(r));
  }
  void read(ByteRange range) {
    GuestRequest r;
    r.id = RequestId{++last_};
    r.command = Command::read;
    r.range = range;
    apply(std::move(r));
  }
  void flush() {
    GuestRequest r;
    r.id = RequestId{++last_};
    r.command = Command::flush;
    apply(std::move(r));
  }
  // Everything that the source was asked; returns whether there was any.
  bool answer_source() {
    const auto ops = std::exchange(source_, {});
    for (const auto& op : ops) {
      SourceDone done;
      done.id = op.id;
      if (op.command == Command::read) {
        Buffer b(op.range.length());
        std::fill(b.bytes().begin(), b.bytes().end(), std::byte{2});
        done.data = std::move(b).freeze();
      } else if (op.command == Command::block_status) {
        done.extents = {Extent{op.range.length(), false, false}};
      }
      apply(std::move(done));
    }
    return !ops.empty();
  }
  bool answer_target(std::size_t at_most = SIZE_MAX) {
    std::size_t n = 0;
    while (n < at_most && !target_.empty()) {
      const DiskOp op = std::move(target_.front());
      target_.erase(target_.begin());
      apply(TargetDone{op.id, IoError::none, {}, {}});
      ++n;
    }
    return n != 0;
  }
  void answer_all() {
    while (answer_source() || answer_target()) {
    }
  }
  [[nodiscard]] Status status() const { return engine_.status(); }
  [[nodiscard]] const Counters& counters() const { return engine_.counters(); }
  [[nodiscard]] std::vector<DiskOp>& sent() { return sent_; }      // to the target, ever
  [[nodiscard]] const CommandDone& done() const { return done_; }  // the last command's end
  // The command is refused, for this reason.
  template <typename E>
  [[nodiscard]] bool refuses(E&& event, const std::string& why) {
    done_ = {};
    event.command = CommandId{99};
    apply(std::forward<E>(event));
    CAPTURE(done_.message);
    return done_.command == CommandId{99} && !done_.ok &&
           done_.message.find(why) != std::string::npos;
  }
  [[nodiscard]] std::size_t replies() const { return replies_; }
  [[nodiscard]] const std::vector<PathId>& left() const { return left_; }
  // Everything but what is read by a path that is not used.
  void answer_but_proofs() {
    for (bool any = true; any;) {
      any = answer_source();
      const auto next = std::find_if(target_.begin(), target_.end(),
                                     [](const DiskOp& op) { return op.path == PathId{}; });
      if (next == target_.end()) continue;
      const OpId id = next->id;
      target_.erase(next);
      apply(TargetDone{id, IoError::none, {}, {}});
      any = true;
    }
  }
  // As transport/ does with a path that is left.
  void lose_proofs() {
    for (const auto& op : std::exchange(target_, {})) {
      REQUIRE(op.path != PathId{});
      apply(TargetDone{op.id, IoError::lost, {}, {}});
    }
  }

 private:
  static EngineConfig config(std::uint64_t size, Limits limits) {
    EngineConfig c;
    c.size = size;
    c.limits = limits;
    return c;
  }
  Engine engine_;
  Time now_ = seconds(1);
  std::vector<DiskOp> source_;
  std::vector<DiskOp> target_;
  std::vector<DiskOp> sent_;
  std::uint64_t last_ = 0;
  std::size_t replies_ = 0;
  std::vector<PathId> left_;
  CommandDone done_;
};

MigrateOptions async_mode() {
  MigrateOptions o;
  o.mode = Mode::async;
  return o;
}

}  // namespace

TEST_CASE("a hot place is copied last, and is copied although it stays hot") {
  MigrateOptions options = async_mode();
  options.bandwidth = 64 * mib;  // so that the copy takes a while
  Limits limits;
  limits.copy_window_bytes = mib;
  Rig rig(32 * mib, options, limits);
  std::uint64_t last_new = 0;
  std::size_t seen = 0;
  const auto copied = [&] { return rig.status().stale_bytes + rig.status().copying_bytes == 0; };
  for (int i = 0; i < 4000 && !(i > 100 && copied()); ++i) {
    rig.write({20 * mib + 4096, 20 * mib + 8192});
    rig.answer_all();
    for (; seen < rig.sent().size(); ++seen) {
      const DiskOp& op = rig.sent()[seen];
      if (op.range.length() > 4096) last_new = op.range.begin;
    }
    rig.tick(milliseconds(1));
  }
  CHECK(copied());
  CHECK(last_new / mib == 20);
  CHECK(rig.counters().hot_left_for_last > 0);
}

TEST_CASE("adjacent writes in the queue go as one request, up to a limit; others do not") {
  Limits limits;
  limits.merge_bytes = 64 * kib;
  Rig narrow(mib, async_mode(), limits);
  narrow.answer_all();
  REQUIRE(narrow.status().stale_bytes == 0);
  // One in flight keeps the others in the queue.
  narrow.apply(TargetWindow{1, mib});
  const std::size_t before = narrow.sent().size();
  narrow.write({512 * kib, 516 * kib});
  for (std::uint64_t at = 0; at < 100 * kib; at += 4 * kib) narrow.write({at, at + 4 * kib});
  narrow.write({200 * kib, 204 * kib});
  narrow.answer_source();
  CHECK(narrow.sent().size() == before + 1);
  narrow.answer_all();
  std::vector<ByteRange> ranges;
  std::map<std::uint64_t, std::uint64_t> covered;
  for (std::size_t i = before + 1; i < narrow.sent().size(); ++i) {
    if (narrow.sent()[i].command != Command::write) continue;
    ranges.push_back(narrow.sent()[i].range);
    CHECK(narrow.sent()[i].payload.size() == ranges.back().length());
    CHECK(ranges.back().length() <= 64 * kib);
  }
  std::uint64_t sum = 0;
  for (const auto& r : ranges) sum += r.length();
  CHECK(sum == 104 * kib);
  CHECK(ranges.back() == ByteRange{200 * kib, 204 * kib});
}

TEST_CASE("a stale chunk that is overwritten whole is mirrored, and not copied") {
  MigrateOptions options = async_mode();
  options.bandwidth = 64 * kib;  // the copy stands still
  Rig rig(64 * mib, options);
  rig.answer_all();
  const Status before = rig.status();
  REQUIRE(before.stale_bytes > 8 * mib);
  rig.write({60 * mib + 4 * kib, 60 * mib + 200 * kib});  // two chunks whole, two in part
  CHECK(rig.status().stale_bytes == before.stale_bytes - 128 * kib);
  rig.answer_source();
  CHECK(rig.status().buffered_bytes == 128 * kib);
  CHECK(rig.counters().overwritten == 1);  // one run
}

TEST_CASE("--consistency crash: a flush is a barrier between what is sent") {
  MigrateOptions options = async_mode();
  options.consistency = Consistency::crash;
  Rig rig(mib, options);
  rig.answer_all();
  rig.tick(milliseconds(10));
  rig.answer_all();
  REQUIRE(rig.status().consistent);
  const std::size_t before = rig.sent().size();
  rig.write({0, 4 * kib});
  rig.write({64 * kib, 68 * kib});
  rig.answer_source();
  rig.flush();
  rig.answer_source();
  rig.write({128 * kib, 132 * kib});
  rig.write({0, 4 * kib});  // supersedes nothing of before the flush
  rig.answer_source();
  CHECK(rig.replies() == 5);  // the guest waits for none of it
  CHECK(rig.sent().size() == before + 2);
  CHECK(rig.status().consistent);
  CHECK(rig.answer_target(1));
  CHECK(rig.sent().size() == before + 2);
  CHECK(rig.answer_target(1));
  CHECK(rig.sent().size() == before + 4);
  // A FUA write is one, too.
  rig.write({256 * kib, 260 * kib}, true);
  rig.answer_source();
  rig.write({300 * kib, 304 * kib});
  rig.answer_source();
  CHECK(rig.sent().size() == before + 5);
  rig.answer_all();
  CHECK(rig.status().buffered_bytes == 0);
  CHECK(rig.counters().epochs_waited == 3);
}

TEST_CASE(
    "--consistency crash: debt suspends it, and it returns when all that came before is there") {
  MigrateOptions options = async_mode();
  options.consistency = Consistency::crash;
  Rig rig(mib, options);
  CHECK_FALSE(rig.status().consistent);
  rig.answer_all();
  CHECK(rig.status().consistent);
  rig.apply(Pause{CommandId{2}});
  CHECK_FALSE(rig.status().consistent);
  rig.write({0, 4 * kib});
  rig.answer_source();
  rig.apply(Resume{CommandId{3}});
  CHECK_FALSE(rig.status().consistent);
  rig.answer_all();
  CHECK(rig.status().consistent);
}

TEST_CASE("a deadline holds the copier back to what it needs") {
  MigrateOptions options = async_mode();
  options.deadline = seconds(40);
  Rig rig(256 * mib, options);
  const auto copied_until = [&](Duration until) {
    static Duration at{0};
    for (; at < until; at += milliseconds(10)) {
      rig.answer_source();
      rig.answer_target(2);  // 512 KiB in 10 ms at most: 50 MiB/s
      rig.tick(milliseconds(10));
    }
    return rig.status().copied_bytes;
  };
  const std::uint64_t trial = copied_until(seconds(2));
  CHECK(trial > 80 * mib);
  const std::uint64_t later = copied_until(seconds(12));
  CHECK(later - trial < 70 * mib);                  // 160 MiB in 34 s: 4.7 MiB/s
  CHECK(rig.status().bytes_per_second > 30 * mib);  // what the target takes is not forgotten
  CHECK(rig.status().deadline_left == seconds(28));
  copied_until(seconds(37));
  CHECK(rig.status().in_sync);
}

TEST_CASE("pacing delays writes, never reads or flushes, and no longer than its limit") {
  MigrateOptions options = async_mode();
  options.buffer_bytes = mib;
  options.max_delay = milliseconds(40);
  Rig rig(4 * mib, options);
  rig.answer_all();
  const auto answered = [&] { return rig.replies(); };
  for (std::uint64_t at = 0; at < 700 * kib; at += 4 * kib) rig.write({at, at + 4 * kib});
  rig.answer_source();
  for (int i = 0; i < 20; ++i) rig.tick(milliseconds(10));
  const Duration delay = rig.status().pacing_delay;
  CHECK(delay > milliseconds(10));
  CHECK(delay <= milliseconds(40));
  std::size_t before = answered();
  rig.read({0, 4 * kib});
  rig.flush();
  rig.answer_source();
  CHECK(answered() == before + 2);
  rig.write({3 * mib, 3 * mib + 4 * kib});
  rig.answer_source();
  CHECK(answered() == before + 2);
  rig.tick(milliseconds(5));
  CHECK(answered() == before + 2);
  for (int i = 0; i < 4; ++i) rig.tick(milliseconds(10));
  CHECK(answered() == before + 3);
  // It is over as soon as the buffer drains: what waits is answered then.
  rig.write({3 * mib, 3 * mib + 4 * kib});
  rig.answer_source();
  before = answered();
  rig.answer_target();
  for (int i = 0; i < 10 && rig.status().pacing_delay != Duration{0}; ++i)
    rig.tick(milliseconds(10));
  rig.tick(milliseconds(1));
  CHECK(rig.status().pacing_delay == Duration{0});
  CHECK(answered() == before + 1);
}

TEST_CASE("the copier has its share, however much the guest writes") {
  MigrateOptions options = async_mode();
  options.max_delay = Duration{0};
  Rig rig(64 * mib, options);
  std::uint64_t at = 0;
  for (int i = 0; i < 4000 && rig.status().stale_bytes > mib; ++i) {
    for (int n = 0; n < 8; ++n, at = (at + 4 * kib) % (64 * mib)) rig.write({at, at + 4 * kib});
    rig.answer_source();
    rig.answer_target(2);
    rig.tick(milliseconds(1));
  }
  CHECK(rig.status().stale_bytes <= mib);
}

TEST_CASE("a target that can't be one is refused, with the reason") {
  const auto failed = [](std::uint64_t size, const TargetInfo& info) {
    Rig rig(size);
    rig.apply(Start{CommandId{1}, async_mode()});
    rig.apply(TargetUp{info});
    CHECK(rig.status().phase == Phase::failed);
    CHECK_FALSE(rig.done().ok);
    return rig.status().last_error;
  };
  TargetInfo info = Rig::usual(mib);
  info.read_only = true;
  CHECK(failed(mib, info).find("read-only") != std::string::npos);
  info = Rig::usual(mib - 1);
  CHECK(failed(mib, info).find("smaller") != std::string::npos);
  info = Rig::usual(mib);
  info.block_min = 4096;
  CHECK(failed(mib - 512, info).find("not a multiple") != std::string::npos);
  info.block_min = 128 * kib;
  CHECK(failed(mib, info).find("larger than 64 KiB") != std::string::npos);
}

TEST_CASE("a target that comes back as another one is refused") {
  for (const bool no_flush : {true, false}) {
    Rig rig(mib, async_mode());
    rig.answer_all();
    rig.apply(TargetWindow{0, 0});
    rig.apply(TargetLost{"gone"});
    CHECK(rig.status().phase == Phase::interrupted);
    TargetInfo info = Rig::usual(mib);
    if (no_flush) {
      info.can_flush = false;
    } else {
      info.block_min = 4096;
    }
    rig.apply(TargetUp{info});
    CHECK(rig.status().phase == Phase::failed);
  }
}

TEST_CASE("commands that make no sense are refused, with the reason") {
  Rig idle(mib);
  CHECK(idle.refuses(Pause{}, "no migration is running"));
  CHECK(idle.refuses(Resume{}, "no migration is running"));
  CHECK(idle.refuses(Cancel{}, "no migration is running"));
  CHECK(idle.refuses(Verify{}, "no migration is running"));
  CHECK(idle.refuses(Set{}, "no migration is running"));
  CHECK(idle.refuses(Prepare{}, "no migration is running"));
  CHECK(idle.refuses(Seal{}, "no migration is running"));
  CHECK(idle.refuses(Commit{}, "no migration is running"));
  CHECK(idle.refuses(Abort{}, "no migration is running"));
  // What comes late from a target that nobody knows any more changes nothing.
  idle.apply(TargetUp{Rig::usual(mib)});
  idle.apply(TargetWindow{});
  idle.apply(TargetLost{"gone"});
  idle.apply(TargetRefused{"no"});
  idle.apply(TargetClosed{});
  idle.apply(Tick{});
  CHECK(idle.status().phase == Phase::idle);

  Rig rig(mib, async_mode());
  CHECK(rig.refuses(Start{}, "a migration is running"));
  rig.answer_all();
  rig.apply(Switch{CommandId{5}, SwitchKind::release});
  rig.answer_all();
  rig.apply(RecordWritten{true, {}});
  rig.answer_all();
  CHECK(rig.status().phase == Phase::switched);
  CHECK(rig.refuses(Start{}, "fenced"));
  rig.apply(TargetClosed{});
  rig.apply(Unfence{CommandId{6}});
  CHECK(rig.status().serving == Serving::source);

  Rig pivot(mib, async_mode());
  pivot.answer_all();
  pivot.apply(Switch{CommandId{5}, SwitchKind::pivot});
  pivot.answer_all();
  pivot.apply(RecordWritten{true, {}});
  CHECK(pivot.status().serving == Serving::target);
  CHECK(pivot.refuses(Start{}, "pivoted"));
  CHECK(pivot.refuses(Unfence{}, "the target serves"));
  CHECK(pivot.refuses(Set{}, "no migration is running"));
}

TEST_CASE(
    "a migration that waits for the earlier one's connections is queued, and can be cancelled") {
  Rig rig(mib, async_mode());
  rig.answer_all();
  rig.apply(Cancel{CommandId{2}});
  rig.apply(Start{CommandId{3}, async_mode()});
  CHECK(rig.status().phase == Phase::queued);
  rig.apply(Cancel{CommandId{4}});
  CHECK(rig.status().phase == Phase::cancelled);
  rig.apply(Start{CommandId{5}, async_mode()});
  rig.apply(TargetClosed{});
  CHECK(rig.status().phase == Phase::connecting);
}

TEST_CASE("pivoted: a target that was promoted meanwhile is another guest's") {
  for (const bool incoming : {false, true}) {
    TargetInfo info = Rig::usual(mib);
    info.incoming = incoming;
    Rig rig(mib);
    rig.apply(Start{CommandId{1}, async_mode()});
    rig.apply(TargetUp{info});
    rig.answer_all();
    rig.apply(Switch{CommandId{5}, SwitchKind::pivot});
    rig.answer_all();
    rig.apply(RecordWritten{true, {}});
    rig.apply(TargetWindow{0, 0});
    rig.apply(TargetLost{"fenced"});
    info.incoming = false;
    rig.apply(TargetUp{info});
    const std::size_t before = rig.sent().size();
    rig.write({0, 4096});
    CHECK((rig.sent().size() == before) == incoming);
    CHECK((rig.status().last_error.find("promoted") != std::string::npos) == incoming);
  }
}

TEST_CASE("a path that does not answer the proof's read does not hold up a switchover") {
  Rig rig(mib, async_mode());
  rig.answer_all();
  rig.tick(milliseconds(600));
  rig.answer_all();
  rig.apply(PathFound{PathId{1}, {}, false});
  for (int i = 0; i < 50; ++i) {
    rig.tick(milliseconds(10));
    rig.answer_but_proofs();
  }
  REQUIRE(rig.sent().back().path == PathId{1});
  rig.apply(Prepare{CommandId{7}});
  CHECK(rig.left() == std::vector{PathId{1}});
  rig.lose_proofs();
  for (int i = 0; i < 100; ++i) {
    rig.answer_all();
    rig.tick(milliseconds(10));
  }
  CHECK(rig.done().command == CommandId{7});
  CHECK(rig.done().ok);
}

TEST_CASE(
    "a switchover lets the last of the copy go before writes wait for the target, but not for "
    "long") {
  MigrateOptions options = async_mode();
  options.downtime_limit = milliseconds(100);
  Rig rig(64 * kib, options);
  while (rig.answer_source()) {
  }
  REQUIRE(rig.status().copying_bytes == 64 * kib);
  rig.tick(milliseconds(1));
  rig.apply(Prepare{CommandId{7}});
  REQUIRE(rig.status().mode == Mode::async);
  SUBCASE("the target answers") {
    rig.answer_target(1);
    CHECK(rig.status().mode == Mode::sync);
    CHECK(rig.done().command != CommandId{7});
    rig.answer_all();
    CHECK(rig.done().command == CommandId{7});
    CHECK(rig.done().ok);
  }
  SUBCASE("it does not, for a tenth of the downtime limit") {
    rig.tick(milliseconds(9));
    CHECK(rig.status().mode == Mode::async);
    rig.tick(milliseconds(1));
    CHECK(rig.status().mode == Mode::sync);
  }
  SUBCASE("it is given up meanwhile") {
    rig.apply(Abort{CommandId{8}});
    rig.answer_all();
    rig.tick(milliseconds(100));
    CHECK(rig.status().mode == Mode::async);
  }
}

TEST_CASE("everything has a name") {
  for (int i = 0; i <= static_cast<int>(IoError::lost); ++i)
    CHECK_FALSE(to_string(static_cast<IoError>(i)).empty());
  for (int i = 0; i <= static_cast<int>(Command::checksum); ++i)
    CHECK_FALSE(to_string(static_cast<Command>(i)).empty());
  for (int i = 0; i <= static_cast<int>(Mode::automatic); ++i)
    CHECK_FALSE(to_string(static_cast<Mode>(i)).empty());
}

}  // namespace nbdferry::mirror
