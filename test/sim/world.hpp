// World: the core between its disks and its guest. Carries events in and actions out, keeps virtual
// time, and checks after each event what can be seen from outside.
//
// What happens next is the Driver's to choose; what may happen is checked here and in the models.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>

#include "mirror/engine.hpp"
#include "test/sim/coverage.hpp"
#include "test/sim/guest_view.hpp"
#include "test/sim/setup.hpp"
#include "test/sim/source_model.hpp"
#include "test/sim/target_model.hpp"
#include "test/sim/trace.hpp"

namespace nbdferry::sim {

class World {
  struct OpenCommand {
    std::size_t kind;  // index in Event
    Time at;
    std::uint64_t event;
  };

 public:
  World(std::uint64_t seed, Trace& trace);

  // --- moving it
  void apply(mirror::Event&& event);
  void advance(Duration by);
  void guest_request(mirror::GuestRequest&& request);
  template <typename E>
  CommandId command(E&& event) {
    event.command = CommandId{++last_command_};
    commands_.emplace(event.command, OpenCommand{mirror::Event(event).index(), now_, event_});
    const CommandId id = event.command;
    if constexpr (std::is_same_v<std::decay_t<E>, mirror::Set>) {
      set(std::forward<E>(event));
    } else {
      apply(std::forward<E>(event));
    }
    return id;
  }
  void complete_source();
  void answer_target();
  void come_up();
  void write_record(bool ok);
  [[nodiscard]] bool may_crash() const;
  // The process is killed, and started again: with what the record says, the state and the journal.
  void crash();
  [[nodiscard]] bool may_grow_journal() const {
    return serving_ == mirror::Serving::target && journal_bytes_ < setup_.journal_bytes_max;
  }
  void grow_journal();
  void lose_target() { apply(target_.lose_all(now_)); }
  void lose_path();
  void heal();

  // --- looking at it
  [[nodiscard]] Prng& prng() { return prng_; }
  [[nodiscard]] const Setup& setup() const { return setup_; }
  [[nodiscard]] SourceModel& source() { return source_; }
  [[nodiscard]] TargetModel& target() { return target_; }
  [[nodiscard]] GuestView& guest() { return guest_; }
  [[nodiscard]] Cases& cases() { return cases_; }
  [[nodiscard]] const mirror::Status& status() const { return status_; }
  [[nodiscard]] mirror::Serving serving() const { return serving_; }
  [[nodiscard]] Time now() const { return now_; }
  [[nodiscard]] std::uint64_t events() const { return event_; }
  [[nodiscard]] bool record_pending() const { return record_.has_value(); }
  [[nodiscard]] bool command_open(CommandId id) const { return commands_.contains(id); }
  [[nodiscard]] bool any_command_open() const { return !commands_.empty(); }
  [[nodiscard]] bool last_command_ok() const { return last_command_ok_; }
  [[nodiscard]] const std::string& last_message() const { return last_message_; }

  // The target holds what the source holds; on its medium too, if `durable`. Open writes are left
  // out if `but_open`.
  void check_identical(const char* when, bool durable, bool but_open);
  // The serving disk holds what the guest has written.
  void check_authority(const char* when);
  // So does its medium.
  void check_medium(const char* when);
  // With --consistency crash in force: the target holds what a power cut could have left.
  void check_consistent();
  void check_quiet();
  void count_cases();

  // Starts a migration with these options, from the driver; one that goes on from the state, if it can.
  CommandId start(const mirror::MigrateOptions& options, bool resumed);
  [[nodiscard]] bool may_resume() const { return kept_; }
  void note_another_target() { another_target_ = true; }
  [[nodiscard]] bool swapped() const { return swapped_; }

 private:
  void act(mirror::SubmitSource& a);
  void act(mirror::SubmitTarget& a);
  void act(mirror::Reply& a);
  void act(mirror::OpenTarget&) { target_.open(std::exchange(another_target_, false)); }
  void act(mirror::CloseTarget&) { target_.close(now_); }
  void act(mirror::UsePath& a);
  void act(mirror::RefusePath& a);
  void act(mirror::LeavePath& a);
  void act(mirror::WriteRecord& a);
  void act(mirror::CommandDone& a);
  void act(mirror::Ended&) { running_ = false; }
  void act(mirror::LetGo& a);
  void act(mirror::Notice& a) { verified(a.text); }

  void switched_over(mirror::SwitchKind kind);
  void keep_journal();
  void set(mirror::Set&& event);
  void limit_bandwidth(std::uint64_t rate);
  void verified(const std::string& text);
  void check_status();
  void check_sync_entry(mirror::Mode before);
  void check_times();
  [[nodiscard]] bool excused(std::uint64_t unit) const;

  Prng prng_;
  Setup setup_;
  Trace& trace_;
  Cases cases_;
  SourceModel source_;
  TargetModel target_;
  GuestView guest_;
  std::unique_ptr<mirror::Engine> engine_;
  mirror::Actions actions_;
  mirror::Status status_;

  Time now_{0};
  Time next_tick_{0};
  std::uint64_t event_ = 0;
  mirror::Serving serving_ = mirror::Serving::source;
  std::optional<mirror::SwitchKind> record_;
  std::vector<std::uint64_t> state_;       // what outlives the process; none, if empty
  std::vector<std::uint64_t> next_state_;  // of a migration that waits for the end of another one
  std::vector<std::uint64_t> journal_;     // so does this, after a pivot …
  std::uint64_t journal_bytes_ = 0;        // … of which there is so much so far
  mirror::MigrateOptions options_;         // of the last migration
  bool running_ = false;                   // the state says that it is to go on by itself
  bool kept_ = false;                // of a migration that has ended: another one may go on from it
  bool swapped_ = false;             // a migration was resumed to another target than it had
  bool target_failed_ = false;       // since the pivot
  std::uint64_t losses_before_ = 0;  // of connections, at the pivot
  bool skip_unreadable_ = false;     // in the last migration
  bool another_target_ = false;
  std::uint64_t buffer_bytes_ = 0;
  Duration max_delay_{0};
  std::uint64_t bandwidth_ = 0;  // 0: no limit, or not known
  Time limited_since_{0};
  std::uint64_t sent_since_ = 0;

  std::uint64_t last_command_ = 0;
  std::map<CommandId, OpenCommand> commands_;
  std::uint64_t mismatched_ = 0;  // by the verification, so far
  bool unacknowledged_ = false;   // a difference that nobody has seen: nothing is switched over
  bool unproven_ = false;         // resumed, to a target of which nothing but a sample is known
  bool last_command_ok_ = false;
  std::string last_message_;
  std::optional<Time> hold_since_;
  std::optional<Time> prepared_since_;
};

}  // namespace nbdferry::sim
