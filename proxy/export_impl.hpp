// ExportImpl: the one thread's loop around the core. Events go in, actions come out and are carried
// out: on the local disk, on the target, towards the sessions, on the ownership record.
//
// What must hold: the core is never re-entered (completions that come at once are queued); every
// action is carried out in order; nothing here decides what becomes of a request.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>

#include "proxy/export.hpp"
#include "proxy/guest_meter.hpp"
#include "proxy/local_disk.hpp"
#include "proxy/owner_record.hpp"
#include "proxy/state_file.hpp"
#include "transport/target.hpp"

namespace nbdferry::proxy {

class ExportImpl final : public Export {
 public:
  ExportImpl(boost::asio::io_context& io, const ExportOptions& options, ProbedDisk disk,
             OwnerRecord record);
  ~ExportImpl() override;

  // Front
  const ExportInfo& info() const override { return info_; }
  std::uint32_t attach(ReplySink& sink, const Migrant& migrant) override;
  void detach(std::uint32_t session) override;
  bool knows_migration(std::string_view migration) const override;
  bool holds_migration(std::string_view migration) const override;
  bool knows_session(std::string_view session) const override;
  bool may_write(std::uint32_t session) const override;
  void submit(mirror::GuestRequest&& request) override;

  // Export
  void migrate(MigrateRequest request, CommandHandler done) override;
  void set(mirror::Set request, CommandHandler done) override;
  void command(Verb verb, CommandHandler done) override;
  ExportStatus status() const override;
  void stop(std::function<void(std::string)> done) override;

 private:
  // Requests of our own, through the core like a guest's.
  static constexpr std::uint32_t internal_session = 0;

  // Of a copy: an answer, or what is to be read.
  using Step = std::variant<mirror::Event, mirror::DiskOp>;

  struct Session {
    ReplySink* sink = nullptr;
    std::string migration;
    std::string session;
  };

  void post(mirror::Event&& event);
  void enqueue(mirror::Event&& event);
  void later(Step&& step);
  void post_turn();
  void turn();
  void drain();
  void perform();
  void on(mirror::SubmitSource&& a);
  void on(mirror::SubmitTarget&& a);
  void on(mirror::Reply&& a);
  void on(mirror::OpenTarget&& a);
  void on(mirror::CloseTarget&& a);
  void on(mirror::UsePath&& a);
  void on(mirror::RefusePath&& a);
  void on(mirror::LeavePath&& a);
  void on(mirror::WriteRecord&& a);
  void on(mirror::Ended&& a);
  void on(mirror::LetGo&& a);
  void on(mirror::CommandDone&& a);
  void on(mirror::Notice&& a);
  void target_event(mirror::Event&& event);

  // --- what outlives the process (export_state.cpp)
  void restore();
  void serve_target(FoundState found);
  void renew_state();
  void begin_journal(std::function<void()> done);
  void keep_journal();
  void grow_journal();
  void shrink_journal() noexcept;
  void resume(const SavedMigration& saved, bool trusted);
  [[nodiscard]] bool goes_on(const MigrateRequest& request) const;
  [[nodiscard]] std::optional<StateFile> create_state(std::string_view otherwise) const;
  void log_unjournaled(std::string_view why) const;
  void save_state();
  void save_request();
  void remember_changes(const mirror::Set& changes);
  void remember_pause(bool paused);
  void remember_abort();
  void start(MigrateRequest request, CommandHandler done, bool go_on);

  [[nodiscard]] Time now() const;
  void arm_ticks();
  void measure_progress();
  CommandId remember(CommandHandler done);
  // Writes the record off the loop; then calls done(error text or empty) on it.
  void write_record(Ownership next, std::function<void(std::string)> done);
  void record_claim();
  void promote(CommandHandler done);
  void unfence(CommandHandler done);
  void fence_migrations(const Migrant& except);

  void stop_when_quiet();
  void stop_flushed(IoError error);
  void stop_when_flushed();
  void stop_when_closed();

  boost::asio::io_context& io_;
  ExportOptions options_;
  OwnerRecord record_;
  Ownership ownership_;  // as recorded last; record_ itself may be at work off the loop
  ExportInfo info_;
  std::unique_ptr<LocalDisk> disk_;
  std::unique_ptr<mirror::Engine> engine_;
  std::unique_ptr<transport::Target> target_;
  MigrateRequest request_;  // of the migration that runs or is to start
  std::string migration_id_;

  std::string state_directory_;   // empty: nothing outlives the process …
  std::string no_state_because_;  // … and why
  std::optional<StateFile> state_;
  std::optional<StateFile> next_state_;  // of a migration that waits for the end of another one
  SavedMigration saved_;                 // what state_, or next_state_, says
  bool state_kept_ = false;  // of a migration that has ended: another one may go on from it
  bool resuming_ = false;    // by itself, after a restart: the target may come later
  bool wrote_ = false;       // to the local disk, since the last beat

  std::deque<mirror::Event> events_;
  std::deque<Step> later_;  // that nobody waits for: one in a turn of the loop
  bool turn_posted_ = false;
  bool gave_way_ = false;  // to others on this processor, before the step that is next
  boost::asio::steady_timer turn_timer_;
  Time guest_asked_at_{0};
  Time step_ended_{0};  // the last one
  Duration step_took_{0};
  mirror::Actions actions_;
  bool draining_ = false;

  std::uint32_t last_session_ = 0;
  std::unordered_map<std::uint32_t, Session> sessions_;
  std::string incoming_claim_;  // the migration whose writes an incoming disk takes
  // Not recorded yet: nothing is written before it is, so that the record never says that the disk holds
  // what it no longer does.
  bool claim_pending_ = false;
  std::vector<mirror::GuestRequest> after_claim_;
  mutable std::string refused_claim_;  // the last other one, so that it is said once

  std::uint64_t last_command_ = 0;
  std::unordered_map<CommandId, CommandHandler> commands_;

  boost::asio::steady_timer ticks_;
  bool ticking_ = false;
  mutable GuestMeter meter_;
  Time measured_at_{0};
  std::uint64_t measured_debt_ = 0;
  double progress_ = 0;  // bytes of debt that go away each second

  boost::asio::thread_pool helper_{1};  // for what blocks: the record, the journal's size
  bool record_busy_ = false;

  boost::asio::steady_timer stop_timer_;
  std::function<void(std::string)> stop_handler_;
  Time stop_deadline_{0};
  std::string stop_error_;
  bool stop_was_flushed_ = false;
};

}  // namespace nbdferry::proxy
