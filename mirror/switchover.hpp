// Switchover: prepare -> seal -> commit (rule 10), each idempotent, abort until the record is
// written.
//
//   none --prepare--> preparing --lock-step, flushed--> prepared --seal--> sealing --drained,
//   flushed--> sealed --commit--> committing --record written--> committed
//
// Any debt, a lost target or a limit leads back to none, with the reason, and the guest goes on.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "mirror/context.hpp"

namespace nbdferry::mirror {

class Migration;

class Switchover {
 public:
  enum class State : std::uint8_t {
    none,
    preparing,
    prepared,
    sealing,
    sealed,
    committing,
    committed,
  };

  explicit Switchover(Migration& migration) : m_(migration) {}

  void prepare(CommandId command);
  void seal(CommandId command);
  void commit(CommandId command, SwitchKind kind);
  void all(CommandId command, SwitchKind kind);
  void abort(CommandId command);
  void record_written(const RecordWritten& event);

  // Debt arose, the target is gone, or the migration ends: back to none, unless it is too late.
  void debt(const char* why);
  void give_up(const std::string& why);

  // After each event: the next step, where its condition holds.
  void advance();
  // A flush of the target was answered.
  void flushed(OpId flush, bool good);
  void tick();

  [[nodiscard]] State state() const { return state_; }
  [[nodiscard]] SwitchKind kind() const { return kind_; }
  [[nodiscard]] bool holds_writes() const {
    return state_ == State::sealing || state_ == State::sealed || state_ == State::committing;
  }
  [[nodiscard]] bool decided() const {
    return state_ == State::committing || state_ == State::committed;
  }

 private:
  enum class Goal : std::uint8_t { prepare, seal, commit };

  [[nodiscard]] std::string obstacle() const;  // to prepare
  [[nodiscard]] std::string pivot_obstacle(SwitchKind kind) const;
  [[nodiscard]] bool busy(CommandId command);
  void start_prepare();
  void start_seal();
  void start_commit();
  void reached(State state);
  void answer(bool ok, const std::string& message);
  void leave(const std::string& answer_text);  // back to none
  void maybe_auto_switch();

  Migration& m_;
  State state_ = State::none;
  Goal goal_ = Goal::prepare;
  SwitchKind kind_ = SwitchKind::pivot;
  std::optional<CommandId> command_;
  Time since_{0};  // of preparing, or prepared
  Time hold_since_{0};
  std::optional<OpId> flush_;  // the flush that would complete the current step
  Time auto_again_at_{0};
};

}  // namespace nbdferry::mirror
