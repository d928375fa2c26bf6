// The end of a history: faults cease, the guest is quiet, and the core has to get everything level,
// in bounded steps. Then both sides are compared.
#include "test/sim/driver.hpp"

namespace nbdferry::sim {

using namespace mirror;
namespace {
constexpr unsigned steps_max = 20'000;
}

// One thing that helps; false when there is nothing but to let time pass.
bool Driver::mend() {
  w_.advance(Duration(static_cast<std::int64_t>(prng_.below(20'000))));
  TargetModel& t = w_.target();
  const bool link = t.link_moves();
  if (w_.record_pending()) {
    write_record();
  } else if (w_.source().busy() && (prng_.chance(1, 2) || !t.busy())) {
    complete_source();
  } else if (link) {
    answer_link();
  } else if (t.busy()) {
    complete_target();
  } else {
    return false;
  }
  return true;
}

template <typename Done>
void Driver::settle(const char* what, Done&& done) {
  for (unsigned i = 0; !done(); ++i) {
    if (i == steps_max) {
      const Status& s = w_.status();
      fail("no progress: {} ({}, stale {}, armed {}, buffered {}, suspect {}, unreadable {})", what,
           to_string(s.phase), s.stale_bytes, s.copying_bytes, s.buffered_bytes, s.suspect_bytes,
           s.unreadable_bytes);
    }
    if (!mend()) w_.advance(std::chrono::milliseconds(5));
  }
}

bool Driver::issue_and_settle(CommandId id, const char* what) {
  settle(what, [&] { return !w_.command_open(id); });
  return w_.last_command_ok();
}

void Driver::finish() {
  finishing_ = true;
  w_.heal();
  settle("the guest's requests", [&] { return w_.guest().open().empty(); });
  if (w_.serving() == Serving::source) finish_source();
  if (w_.serving() == Serving::target) finish_target();
  if (w_.serving() == Serving::nobody) finish_nobody();
  settle("the disks' operations", [&] { return !w_.source().busy() && !w_.target().busy(); });
  w_.check_quiet();
  w_.check_authority("at the end");
}

// In sync, whatever it takes.
void Driver::level() {
  settle("to get in sync", [&] {
    if (w_.serving() != Serving::source) return true;
    const Status& s = w_.status();
    if (s.phase == Phase::paused) w_.command(Resume{});
    if (w_.any_command_open() || w_.record_pending()) return false;
    switch (s.phase) {
      case Phase::idle:
      case Phase::failed:
      case Phase::cancelled:
      case Phase::switched:
        start();
        return false;
      case Phase::prepared:
      case Phase::sealed:
        w_.command(Abort{});
        return false;
      default:
        return s.phase == Phase::in_sync && s.stale_bytes == s.unreadable_bytes &&
               s.copying_bytes == 0 && s.buffered_bytes == 0 && s.suspect_bytes == 0 &&
               (s.unreadable_bytes == 0 || w_.setup().stays_unreadable);
    }
  });
}

// In peace a verification must see a corrupt byte, and have it sent again.
void Driver::find_corruption() {
  settle("the disks' operations", [&] { return !w_.source().busy() && !w_.target().busy(); });
  w_.target().corrupt();
  // What is still to be copied, or sent, may go over it before the verification comes by.
  const auto status = w_.status();
  const bool all_held =
      status.stale_bytes == 0 && status.copying_bytes == 0 && status.buffered_bytes == 0;
  const bool ok = issue_and_settle(w_.command(Verify{}), "to verify");
  const bool complete = w_.last_message().find("compared") != std::string::npos &&
                        w_.last_message().find("can't be read") == std::string::npos &&
                        w_.last_message().find("begun earlier") == std::string::npos;
  require(!all_held || !complete || !ok, "verify missed a difference: {}", w_.last_message());
  level();
}

// What a refused switchover asks for: a verification, and an operator who has seen its result.
void Driver::clear_doubts() {
  const std::string why = w_.last_message();
  if (why.find("acknowledge") != std::string::npos) w_.command(Verify{{}, true});
  if (why.find("verify first") == std::string::npos &&
      why.find("not verified") == std::string::npos) {
    return;
  }
  (void)issue_and_settle(w_.command(Verify{}), "to verify");
  level();
}

void Driver::finish_source() {
  // A limit of ours is no obstacle of the world's.
  Set unlimited;
  unlimited.bandwidth = 0;
  unlimited.deadline = Duration{0};
  w_.command(std::move(unlimited));
  level();
  if (w_.setup().paths && w_.target().up()) w_.apply(w_.target().find_path());
  // Where nothing can be read no block is to spare.
  settle("a path's proof",
         [&] { return w_.target().found_paths() == 0 || w_.status().unreadable_bytes != 0; });
  level();
  if (w_.serving() == Serving::source && w_.setup().corruption) find_corruption();
  // By --switch it may already be under way; else it is ours to do.
  bool prepared = false;
  for (int tries = 0; tries < 12 && !prepared && w_.serving() == Serving::source; ++tries) {
    settle("to be in sync again", [&] {
      return w_.serving() != Serving::source || w_.status().phase == Phase::in_sync ||
             w_.status().phase == Phase::prepared;
    });
    if (w_.serving() != Serving::source) return;
    prepared = issue_and_settle(w_.command(Prepare{}), "to prepare");
    if (!prepared) clear_doubts();
  }
  if (w_.serving() != Serving::source) return;
  require(prepared, "cannot prepare in peace: {}", w_.last_message());
  w_.check_identical("prepared in peace", false, false);
  if (prng_.chance(1, 3)) return;
  // A pivot is refused to a target that does not keep what was promised; a release never is.
  if (prng_.chance(1, 2) && !w_.setup().corruption) {
    (void)issue_and_settle(w_.command(Switch{{}, SwitchKind::pivot}), "to pivot");
  }
  if (w_.serving() != Serving::source) return;
  const bool released = issue_and_settle(w_.command(Switch{{}, SwitchKind::release}), "to release");
  require(released, "cannot release in peace: {}", w_.last_message());
}

void Driver::read_everything() {
  const std::uint64_t size = w_.setup().engine.size;
  const std::uint64_t step = 64 * 1024;
  for (std::uint64_t at = 0; at < size; at += step) {
    GuestRequest r;
    r.id = RequestId{++last_request_};
    r.command = Command::read;
    r.range = {at, std::min(at + step, size)};
    w_.guest_request(std::move(r));
  }
  settle("the last reads", [&] { return w_.guest().open().empty(); });
}

void Driver::finish_target() {
  settle("the target's return", [&] { return w_.target().up(); });
  read_everything();
  settle("the end of the quarantine",
         [&] { return w_.status().suspect_bytes == 0 && !w_.target().haunted(); });
  // A flush may have to report an earlier failure; then it must succeed.
  for (int i = 0; i < 3; ++i) {
    GuestRequest r;
    r.id = RequestId{++last_request_};
    r.command = Command::flush;
    w_.guest_request(std::move(r));
    settle("the last flush", [&] { return w_.guest().open().empty() && !w_.target().busy(); });
  }
  read_everything();
  w_.check_medium("after the last flush");
}

void Driver::finish_nobody() {
  if (!scribbled_ && w_.setup().target.can_flush) w_.check_identical("released", true, false);
  for (const Command c : {Command::read, Command::zero, Command::flush}) {
    GuestRequest r;
    r.id = RequestId{++last_request_};
    r.command = c;
    if (c != Command::flush) r.range = {0, w_.setup().engine.size};
    w_.guest_request(std::move(r));
  }
  settle("the last refusals", [&] { return w_.guest().open().empty(); });
}

}  // namespace nbdferry::sim
