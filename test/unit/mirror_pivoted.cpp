// A pivoted disk across restarts of its process, with a journal and without one.
#include <deque>
#include <optional>
#include <vector>

#include <doctest/doctest.h>

#include "mirror/engine.hpp"
#include "mirror/journal.hpp"

namespace nbdferry::mirror {
namespace {

constexpr std::uint64_t kib = 1024;
constexpr std::uint64_t size = 64 * 1024 * kib;

// A process whose disk had been pivoted, at its start.
class Life {
 public:
  Life(std::span<std::byte> journal, bool journaled, MigrateOptions options = {})
      : engine_({.size = size, .serving = Serving::target, .limits = {}}) {
    if (!journal.empty()) apply(KeepJournal{journal});
    apply(ServeTarget{options, {}, journaled});
    up();
  }

  void apply(Event&& event) {
    Actions out;
    engine_.apply(std::move(event), Time{1}, out);
    for (auto& a : out) {
      if (auto* op = std::get_if<SubmitTarget>(&a)) asked_.push_back(std::move(op->op));
      if (auto* reply = std::get_if<Reply>(&a)) replies_.push_back(reply->error);
    }
  }
  void up() {
    TargetUp event;
    event.info.size = size;
    event.info.can_flush = event.info.can_zero = true;
    event.window_bytes = size;
    apply(std::move(event));
  }
  void ask(Command command, ByteRange range = {}, std::byte byte = {}) {
    GuestRequest r;
    r.id = RequestId{++last_};
    r.command = command;
    r.range = range;
    if (command == Command::write) {
      Buffer b(range.length());
      std::fill(b.bytes().begin(), b.bytes().end(), byte);
      r.payload = std::move(b).freeze();
    }
    apply(std::move(r));
  }
  // The oldest that the target was asked and has not answered.
  std::optional<DiskOp> answer(IoError error = IoError::none) {
    if (asked_.empty()) return std::nullopt;
    DiskOp op = std::move(asked_.front());
    asked_.pop_front();
    TargetDone done{op.id, error, {}, {}};
    if (op.command == Command::read) done.data = Payload::zeroes(op.range.length());
    apply(std::move(done));
    return op;
  }
  std::vector<Command> answer_all() {
    std::vector<Command> out;
    while (const auto op = answer()) out.push_back(op->command);
    return out;
  }
  [[nodiscard]] const std::vector<IoError>& replies() const { return replies_; }
  [[nodiscard]] Status status() const { return engine_.status(); }

 private:
  Engine engine_;
  std::deque<DiskOp> asked_;
  std::vector<IoError> replies_;
  std::uint64_t last_ = 0;
};

struct Memory {
  explicit Memory(std::uint64_t slots) : pages((1 + slots) * Journal::slot_bytes) {}
  std::span<std::byte> span() { return pages; }
  std::vector<std::byte> pages;
};

using Commands = std::vector<Command>;
using Replies = std::vector<IoError>;

}  // namespace

TEST_CASE("pivoted: what was answered and not flushed is written again by the next process") {
  Memory journal(16);
  {
    Life first(journal.span(), true);
    first.ask(Command::write, {0, 8 * kib}, std::byte{1});
    first.ask(Command::write, {16 * kib, 20 * kib}, std::byte{2});
    CHECK(first.answer_all() == Commands{Command::write, Command::write});
    first.ask(Command::flush);
    CHECK(first.answer_all() == Commands{Command::flush});
    first.ask(Command::write, {4 * kib, 8 * kib}, std::byte{3});
    CHECK(first.answer_all() == Commands{Command::write});
    first.ask(Command::write, {6 * kib, 12 * kib}, std::byte{4});
    first.ask(Command::zero, {512 * kib, 1024 * kib});
    first.answer_all();
    CHECK(first.replies() == Replies(6, IoError::none));
  }
  Life next(journal.span(), true);
  next.ask(Command::read, {0, 4 * kib});
  CHECK(next.status().buffered_bytes != 0);
  std::vector<ByteRange> ranges;
  for (int i = 0; i < 4; ++i) ranges.push_back(next.answer()->range);
  CHECK(ranges ==
        std::vector<ByteRange>{
            {4 * kib, 8 * kib}, {6 * kib, 8 * kib}, {8 * kib, 12 * kib}, {512 * kib, 1024 * kib}});
  CHECK(next.replies().empty());
  CHECK(next.answer_all() == Commands{Command::read});
  CHECK(next.replies() == Replies{IoError::none});
  // It may have died with the target: that is no error any more.
  next.apply(TargetLost{"gone"});
  next.up();
  next.ask(Command::flush);
  CHECK(next.answer_all() ==
        Commands{Command::write, Command::write, Command::write, Command::zero, Command::flush});
  CHECK(next.replies().back() == IoError::none);
  CHECK(next.status().buffered_bytes == 0);
  CHECK(Life(journal.span(), true).answer_all().empty());
}

TEST_CASE("pivoted: a write that is larger than the journal goes in pieces, and flushes") {
  Memory journal(16);
  Life life(journal.span(), true);
  life.ask(Command::write, {0, 1024 * kib}, std::byte{1});
  std::uint64_t written = 0;
  std::uint64_t flushes = 0;
  while (const auto op = life.answer()) {
    CHECK(op->range.length() <= 16 * kib);
    written += op->range.length();
    flushes += op->command == Command::flush;
  }
  CHECK(written == 1024 * kib);
  CHECK(flushes >= 1024 / 64 - 1);
  CHECK(life.replies() == Replies{IoError::none});
  // It has grown meanwhile.
  Memory larger(128);
  Life other(larger.span().first(17 * Journal::slot_bytes), true);
  other.ask(Command::write, {0, 128 * kib}, std::byte{1});
  other.apply(KeepJournal{larger.span()});
  other.ask(Command::write, {128 * kib, 256 * kib}, std::byte{1});
  other.answer_all();
  CHECK(other.replies() == Replies(2, IoError::none));
}

TEST_CASE(
    "pivoted: without a journal the target is flushed first, and a loss before that is told") {
  for (const bool lost : {false, true}) {
    Life life({}, false);
    life.ask(Command::write, {0, 4 * kib}, std::byte{1});
    if (lost) {
      CHECK(life.answer(IoError::lost)->command == Command::flush);
      CHECK(life.answer(IoError::lost)->command == Command::write);
      life.apply(TargetLost{"gone"});
      life.up();
    }
    life.answer_all();
    life.ask(Command::flush);
    life.ask(Command::flush);
    life.answer_all();
    CHECK(life.replies() ==
          Replies{IoError::none, lost ? IoError::io : IoError::none, IoError::none});
  }
}

}  // namespace nbdferry::mirror
