#include "test/sim/driver.hpp"

#include <array>

namespace nbdferry::sim {

using namespace mirror;
using Link = TargetModel::Link;

void Driver::run(unsigned steps) {
  if (prng_.chance(3, 4)) start();
  for (unsigned i = 0; i < steps; ++i) step();
  // What comes after a pivot deserves as much.
  for (unsigned i = 0; i < steps && w_.serving() == Serving::target; ++i) step();
  finish();
}

// --- what happens next
// ----------------------------------------------------------------------------

void Driver::step() {
  const Setup& s = w_.setup();
  w_.advance(Duration(
      static_cast<std::int64_t>(prng_.below(static_cast<std::uint64_t>(s.step_max.count())))));

  struct Choice {
    unsigned weight;
    void (Driver::*what)();
  };
  std::array<Choice, 18> choices{};
  std::size_t count = 0;
  unsigned total = 0;
  const auto offer = [&](bool possible, unsigned weight, void (Driver::*what)()) {
    if (!possible || weight == 0) return;
    choices[count++] = {weight, what};
    total += weight;
  };
  const bool source = w_.source().busy() && w_.now() >= source_stalled_until_;
  const bool target = w_.target().busy() && w_.now() >= target_stalled_until_;
  offer(w_.guest().open().size() < s.guest_requests_max, s.guest_weight, &Driver::guest);
  offer(source, s.source_weight, &Driver::complete_source);
  offer(source, s.source_weight / 2, &Driver::progress_source);
  offer(w_.target().up() && target, s.target_weight, &Driver::complete_target);
  offer(w_.target().busy(), s.target_weight / 2, &Driver::progress_target);
  offer(w_.target().link_moves(), 8, &Driver::answer_link);
  offer(w_.record_pending(), 8, &Driver::write_record);
  offer(true, s.operator_weight, &Driver::operate);
  offer(s.losses && w_.target().up(), w_.serving() == Serving::target ? 10 : 1, &Driver::lose);
  offer(s.paths && w_.target().up(), 2, &Driver::find_path);
  offer(true, w_.target().link() == Link::refused ? 6 : 1, &Driver::jump);
  offer(true, 1, &Driver::stall);
  offer(true, 2, &Driver::meddle);
  offer(w_.may_grow_journal(), 1, &Driver::grow_journal);
  offer(s.crashes && w_.may_crash(), w_.serving() == Serving::target ? 12 : 1, &Driver::crash);

  std::uint64_t ticket = prng_.below(total);
  for (std::size_t i = 0; i < count; ++i) {
    if (ticket < choices[i].weight) {
      (this->*choices[i].what)();
      w_.check_consistent();
      return;
    }
    ticket -= choices[i].weight;
  }
}

void Driver::complete_source() { w_.complete_source(); }
void Driver::grow_journal() { w_.grow_journal(); }
void Driver::progress_source() { w_.source().progress(); }
void Driver::complete_target() { w_.answer_target(); }
void Driver::progress_target() { w_.target().progress(); }

// The link is on its way up or down.
void Driver::answer_link() {
  TargetModel& t = w_.target();
  switch (t.link()) {
    case Link::opening:
      if (!finishing_ && prng_.chance(1, 16)) {
        w_.apply(t.refuse());
      } else {
        w_.come_up();
      }
      break;
    case Link::dying:
    case Link::closing:
      if (t.busy()) {
        w_.answer_target();
      } else if (t.link() == Link::dying) {
        w_.apply(t.go_down());
      } else {
        w_.apply(t.finish_close());
      }
      break;
    case Link::down:
      if (!finishing_ && prng_.chance(1, 12)) {
        refuse();
      } else if (finishing_ || prng_.chance(1, 4)) {
        w_.come_up();
      }
      break;
    case Link::refused:
    case Link::closed:
    case Link::up:
      break;
  }
}

// It came back as something else, and will not be tried again by itself.
void Driver::refuse() {
  w_.cases().saw(w_.record_pending()               ? Case::refused_during_commit
                 : w_.serving() == Serving::target ? Case::refused_after_pivot
                                                   : Case::refused_after_up);
  w_.apply(w_.target().refuse());
}

void Driver::lose() {
  TargetModel& t = w_.target();
  if (t.can_lose_connection() && prng_.chance(1, 3)) {
    if (w_.setup().paths && prng_.chance(1, 2)) {
      w_.lose_path();
    } else {
      w_.apply(t.lose_connection());
    }
  } else if (t.can_regain_connection() && prng_.chance(1, 2)) {
    w_.apply(t.regain_connection());
  } else if (prng_.chance(1, 2)) {
    if (w_.serving() == Serving::target) w_.cases().saw(Case::pivot_with_loss);
    w_.lose_target();
  }
}

// Another way to the target, or to something else; or one goes before it could be told.
void Driver::find_path() {
  constexpr std::size_t most = 2;
  TargetModel& t = w_.target();
  if (t.found_paths() < most && prng_.chance(2, 3)) {
    w_.apply(t.find_path());
  } else if (t.found_paths() != 0 && prng_.chance(1, 4)) {
    t.lose_found_path();
  }
}

// Time passes, about as long as one of the limits.
void Driver::jump() {
  const Setup& s = w_.setup();
  // A target that was refused after a pivot is opened again after a second.
  const bool refused = w_.target().link() == Link::refused;
  const Duration about =
      prng_.pick({s.sync_timeout, s.downtime_limit, s.quarantine, s.reconnect_delay, s.step_max,
                  refused ? Duration(std::chrono::seconds(1)) : s.step_max});
  w_.advance(about / 8 * static_cast<std::int64_t>(prng_.between(1, 10)));
}

void Driver::stall() {
  const Duration about = w_.setup().sync_timeout / 4;
  const Time until = w_.now() + about * static_cast<std::int64_t>(prng_.between(1, 8));
  (prng_.chance(1, 4) ? source_stalled_until_ : target_stalled_until_) = until;
}

// The process ends, killed or asked to, and is started again.
void Driver::crash() {
  if (w_.serving() == Serving::source && !w_.record_pending() && prng_.chance(1, 4)) {
    w_.cases().saw(Case::suspended);
    w_.command(Suspend{});
    for (unsigned i = 0; i < 200 && w_.target().link() != Link::closed; ++i) (void)mend();
  }
  if (started_ && w_.serving() == Serving::source && prng_.chance(1, 12)) w_.note_another_target();
  w_.crash();
}

void Driver::write_record() {
  TargetModel& t = w_.target();
  if (!finishing_ && w_.setup().losses && t.up() && prng_.chance(1, 3)) {
    // While it is being written the target goes, and is another one when it is back.
    w_.lose_target();
    while (t.link() != Link::down) answer_link();
    refuse();
  } else {
    w_.write_record(finishing_ || !prng_.chance(1, 3));
  }
}

// What nobody asked for.
void Driver::meddle() {
  const Setup& s = w_.setup();
  switch (prng_.below(4)) {
    case 0:
      w_.target().write_back();
      break;
    case 1:
      w_.source().image.write_back({0, w_.source().image.size() / 2});
      break;
    case 2:
      if (s.unreadable) w_.source().break_sector();
      if (s.corruption && w_.target().up()) w_.target().corrupt();
      break;
    default:
      if (w_.serving() != Serving::nobody || w_.target().link() != Link::closed) break;
      w_.target().scribble();  // the disk is another host's now
      scribbled_ = true;
      break;
  }
}

// --- the guest
// ------------------------------------------------------------------------------------

ByteRange Driver::guest_range(bool large) {
  const Setup& s = w_.setup();
  const std::uint64_t size = s.engine.size;
  std::uint64_t grain = s.engine.promised_block_min;
  const bool small = s.small_writes && prng_.chance(1, 2);
  if (!small) {
    grain = std::max(grain, block_size_min);
  } else if (prng_.chance(2, 3)) {
    grain = std::max(grain, unit_size);
  }
  if (size < 2 * grain) grain = s.engine.promised_block_min;
  if (prng_.chance(1, 40)) hot_ = prng_.below(size);
  std::uint64_t begin = prng_.chance(1, 2) ? hot_ : prng_.below(size);
  std::uint64_t length = grain * prng_.between(1, small ? 6 : 4);
  if (large) length = prng_.chance(1, 4) ? size : grain * prng_.between(1, 32);
  begin = begin / grain * grain;
  std::uint64_t end = std::min(begin + length, size);
  if (length >= size) begin = 0;
  return {begin, end};
}

void Driver::guest() {
  GuestRequest r;
  r.id = RequestId{++last_request_};
  const std::uint64_t dice = w_.setup().flushes && prng_.chance(1, 4) ? 90 : prng_.below(100);
  r.command = dice < 50   ? Command::write
              : dice < 68 ? Command::read
              : dice < 78 ? Command::trim
              : dice < 88 ? Command::zero
              : dice < 94 ? Command::flush
              : dice < 95 ? Command::cache
                          : Command::block_status;
  if (r.command != Command::flush) r.range = guest_range(prng_.chance(1, 8));
  if (is_write(r.command)) r.fua = prng_.chance(1, 10);
  if (r.command == Command::zero) {
    r.no_hole = prng_.chance(1, 4);
    r.fast_zero = prng_.chance(1, 4);
  }
  if (r.command == Command::write) {
    Buffer b(r.range.length());
    if (prng_.chance(1, 12)) {
      std::fill(b.bytes().begin(), b.bytes().end(), std::byte{0});
    } else {
      fill_pattern(b.data(), r.range, 100 + last_request_);
    }
    r.payload = std::move(b).freeze();
  }
  w_.guest_request(std::move(r));
}

// --- the operator
// ---------------------------------------------------------------------------------

void Driver::start() {
  MigrateOptions options = make_options(w_.setup(), prng_);
  if (finishing_) options.bandwidth = 0, options.deadline = Duration{0};
  const Phase phase = w_.status().phase;
  const bool accepted =
      w_.serving() == Serving::source && (phase == Phase::idle || phase == Phase::failed ||
                                          phase == Phase::cancelled || phase == Phase::switched);
  if (accepted) {
    w_.cases().saw_if(started_, Case::migrated_again);
    if (started_ && prng_.chance(1, 4)) w_.note_another_target();
    started_ = true;
    w_.start(options, prng_.chance(2, 3));
  } else {
    w_.command(Start{{}, options, {}, false});
  }
}

void Driver::any_command() {
  const SwitchKind kind =
      w_.setup().corruption || prng_.chance(1, 3) ? SwitchKind::release : SwitchKind::pivot;
  switch (prng_.below(12)) {
    case 0:
      w_.command(Pause{});
      break;
    case 1:
      w_.command(Resume{});
      break;
    case 2:
      w_.command(Cancel{});
      break;
    case 3:
      w_.command(Verify{{}, prng_.chance(1, 3)});
      break;
    case 4:
      w_.command(Prepare{});
      break;
    case 5:
      w_.command(Seal{});
      break;
    case 6:
      w_.command(Commit{{}, kind});
      break;
    case 7:
      w_.command(Switch{{}, kind});
      break;
    case 8:
      w_.command(Abort{});
      break;
    case 9:
    case 10:
      change();
      break;
    default:
      if (w_.serving() != Serving::target) w_.command(Unfence{});
      break;
  }
}

// Of a running migration: mostly its mode.
void Driver::change() {
  Set set;
  set.mode = prng_.pick({Mode::sync, Mode::async, Mode::automatic});
  if (prng_.chance(1, 4)) set.bandwidth = prng_.pick({0U, 65536U, 8U << 20});
  if (prng_.chance(1, 8)) set.deadline = std::chrono::milliseconds(prng_.pick({0, 20, 500}));
  w_.command(std::move(set));
}

void Driver::operate() {
  if (prng_.chance(1, 10)) {
    any_command();
    return;
  }
  const SwitchKind kind =
      w_.setup().corruption || prng_.chance(1, 3) ? SwitchKind::release : SwitchKind::pivot;
  const std::uint64_t dice = prng_.below(10);
  switch (w_.status().phase) {
    case Phase::idle:
    case Phase::failed:
    case Phase::cancelled:
      if (w_.serving() == Serving::source) start();
      break;
    case Phase::copying:
    case Phase::interrupted:
      if (dice == 0) w_.command(Pause{});
      if (dice == 1 && prng_.chance(1, 2)) w_.command(Cancel{});
      if (dice >= 8) change();
      break;
    case Phase::paused:
      if (dice < 6) w_.command(Resume{});
      break;
    case Phase::in_sync:
      if (dice < 3) w_.command(Prepare{});
      if (dice == 3 || (dice >= 8 && w_.setup().pivots)) w_.command(Switch{{}, kind});
      if (dice == 4) change();
      if (dice == 6 && w_.setup().corruption) w_.target().corrupt();
      if (dice == 5 || (dice == 6 && w_.setup().corruption)) w_.command(Verify{});
      if (dice == 7 && prng_.chance(1, 4)) w_.command(Cancel{});
      if (dice == 7 && w_.swapped()) w_.command(Verify{});
      break;
    case Phase::prepared:
      if (dice < 4) w_.command(Seal{});
      if (dice == 4) w_.command(Abort{});
      if (dice == 5) w_.command(Switch{{}, kind});
      break;
    case Phase::sealed:
      if (dice < 4) w_.command(Commit{{}, kind});
      if (dice >= 8) {
        w_.cases().saw(Case::abort_while_sealed);
        w_.command(Abort{});
      }
      break;
    case Phase::switched:
      if (w_.serving() == Serving::nobody && dice == 0) w_.command(Unfence{});
      if (w_.serving() == Serving::source) start();
      break;
    case Phase::queued:
    case Phase::connecting:
    case Phase::switching:
      break;
  }
}

}  // namespace nbdferry::sim
