// Export: what outlives the process. At its start: go on with what an earlier one was doing; while a
// migration runs: keep the state file as the core's answers say.
#include <algorithm>
#include <stdexcept>
#include <string_view>
#include <utility>

#include <boost/asio/post.hpp>
#include <fmt/format.h>

#include "mirror/journal.hpp"
#include "mirror/resume_map.hpp"
#include "proxy/control_api.hpp"
#include "proxy/export_impl.hpp"
#include "proxy/limits.hpp"
#include "proxy/log.hpp"
#include "proxy/migration_id.hpp"

namespace nbdferry::proxy {

namespace {

constexpr std::string_view unjournaled =
    "should this process and its target die together, what the target has not flushed is lost";

std::size_t journal_bytes(std::uint64_t payload_bytes) {
  return mirror::Journal::bytes_for(std::min(payload_bytes, limits::journal_bytes_max));
}

}  // namespace

// --- at the start of the process ---

void ExportImpl::restore() {
  if (options_.read_only) {
    no_state_because_ = "the disk is served read-only";
    return;
  }
  state_directory_ = options_.state_directory;
  if (state_directory_.empty()) {
    auto found = default_state_directory();
    state_directory_ = std::move(found.path);
    no_state_because_ = std::move(found.why_not);
  }
  FoundState found;
  if (!state_directory_.empty()) {
    found =
        StateFile::find(state_directory_, options_.disk, info_.size,
                        mirror::ResumeMap::bytes_for(info_.size), ownership_.role != Role::pivoted);
  }
  if (!found.why_not.empty()) log_line(found.why_not);
  if (ownership_.role == Role::pivoted) {
    serve_target(std::move(found));
    return;
  }
  const bool ours = ownership_.role == Role::owner &&
                    (!found.migration || found.migration->generation == ownership_.generation);
  if (!ours) {
    // Whose copy of the disk counts has been settled since.
    if (found.file) found.file->remove();
    return;
  }
  if (!found.migration) return;
  state_ = std::move(found.file);
  resume(*found.migration, state_.has_value());
}

void ExportImpl::resume(const SavedMigration& saved, bool trusted) {
  MigrateRequest request;
  try {
    request = migrate_from_json(saved.request);
  } catch (const std::exception& e) {
    log_line(
        fmt::format("{}: the migration that was running can't be continued: {}: start it again",
                    options_.disk, e.what()));
    if (state_) state_->remove();
    state_.reset();
    return;
  }
  saved_ = saved;
  migration_id_ = saved.id;
  if (!saved.running) {
    if (!trusted) return;
    state_kept_ = true;
    request_ = std::move(request);
    post(mirror::KeepState{state_->memory(), request_.options.quarantine});
    return;
  }
  log_line(fmt::format("{}: {} the migration to {}", options_.disk,
                       trusted ? "resuming" : "starting over with", fmt::join(request.uris, " ")));
  if (!trusted) migration_id_ = new_migration_id(options_.disk);
  const auto report = [disk = options_.disk](bool ok, const std::string& message) {
    if (!ok) log_line(fmt::format("{}: the migration could not go on: {}", disk, message));
  };
  resuming_ = true;
  start(std::move(request), report, trusted);
  if (saved.paused) command(Verb::pause, report);
}

// The target serves, as it did before the restart.
void ExportImpl::serve_target(FoundState found) {
  if (found.migration) saved_ = std::move(*found.migration);
  try {
    if (!saved_.request.empty()) request_ = migrate_from_json(saved_.request);
  } catch (const std::exception&) {
    request_ = {};  // the options' defaults will do
  }
  request_.uris = ownership_.uris;  // for the status; the target is opened by what the record says
  request_.tls = ownership_.tls;
  migration_id_ = ownership_.migration_id;
  log_line(
      fmt::format("{}: pivoted: serving from {}", options_.disk, fmt::join(ownership_.uris, " ")));
  const bool current =
      found.file && saved_.id == migration_id_ && saved_.pivot == ownership_.generation;
  if (current) {
    state_ = std::move(found.file);
  } else {
    renew_state();
  }
  const bool journaled = current && !state_->journal().empty();
  try {
    if (state_ && !journaled) state_->begin_journal(journal_bytes(limits::journal_first_bytes));
  } catch (const std::exception& e) {
    log_unjournaled(e.what());
  }
  keep_journal();
  post(mirror::ServeTarget{request_.options, state_ ? state_->memory() : std::span<std::byte>(),
                           journaled, ownership_.incoming_peer});
}

// No earlier process's journal, wherever it may lie, is to be found right by a later one: what is in it
// would be written over what is written from now on.
void ExportImpl::renew_state() {
  try {
    record_.write(ownership_);
    ownership_ = record_.current();
  } catch (const std::exception& e) {
    log_unjournaled(e.what());
    return;
  }
  saved_.request = migrate_to_json(request_);
  saved_.id = migration_id_;
  saved_.running = false;
  saved_.generation = saved_.pivot = ownership_.generation;
  state_ = create_state(unjournaled);
}

// --- the journal ---

void ExportImpl::log_unjournaled(std::string_view why) const {
  log_line(fmt::format("{}: {}: {}", options_.disk, unjournaled, why));
}

// For a pivot that is about to be recorded: it begins empty, and counts from that record on.
void ExportImpl::begin_journal(std::function<void()> done) {
  if (!state_) {
    log_unjournaled(no_state_because_.empty() ? "there is no state file" : no_state_because_);
    done();
    return;
  }
  saved_.pivot = ownership_.generation + 1;
  save_state();
  boost::asio::post(helper_, [this, done = std::move(done)]() mutable {
    std::string error;
    try {
      state_->begin_journal(journal_bytes(limits::journal_first_bytes));
    } catch (const std::exception& e) {
      error = e.what();
    }
    boost::asio::post(io_, [this, error, done = std::move(done)] {
      if (!error.empty()) log_unjournaled(error);
      done();
    });
  });
}

void ExportImpl::keep_journal() {
  if (!state_ || state_->journal().empty()) return;
  post(mirror::KeepJournal{state_->journal()});
  grow_journal();
}

void ExportImpl::shrink_journal() noexcept {
  try {
    if (!state_ || state_->journal().empty()) return;
    state_->begin_journal(journal_bytes(limits::journal_first_bytes));
  } catch (const std::exception& e) {
    log_line(e.what());
  }
}

// To what the buffer may hold, step by step.
void ExportImpl::grow_journal() {
  const std::size_t has = state_->journal().size();
  const std::size_t most = journal_bytes(request_.options.buffer_bytes);
  if (has >= most) return;
  boost::asio::post(helper_, [this, next = std::min(most, 2 * has)] {
    std::string error;
    try {
      state_->grow_journal(next);
    } catch (const std::exception& e) {
      error = e.what();
    }
    boost::asio::post(io_, [this, error] {
      if (error.empty()) return keep_journal();
      log_line(fmt::format("{}: the target will be flushed more often: {}", options_.disk, error));
    });
  });
}

// --- while migrations run ---

// Does it go on from what an earlier migration has left?
bool ExportImpl::goes_on(const MigrateRequest& request) const {
  return state_ && state_kept_ && request.uris == request_.uris;
}

std::optional<StateFile> ExportImpl::create_state(std::string_view otherwise) const {
  std::string why = no_state_because_;
  if (!state_directory_.empty()) {
    try {
      return StateFile::create(state_directory_, options_.disk, info_.size,
                               mirror::ResumeMap::bytes_for(info_.size), saved_);
    } catch (const std::exception& e) {
      why = e.what();
    }
  }
  log_line(fmt::format("{}: {}: {}", options_.disk, otherwise, why));
  return std::nullopt;
}

void ExportImpl::start(MigrateRequest request, CommandHandler done, bool go_on) {
  request_ = std::move(request);
  saved_.request = migrate_to_json(request_);
  saved_.id = migration_id_;
  saved_.running = true;
  saved_.generation = ownership_.generation;
  if (go_on) {
    save_state();
  } else {
    saved_.pivot = 0;
    next_state_ = create_state("if this process ends, its migration has to begin anew");
    // Nobody is to find what is no longer kept.
    if (!next_state_ && state_) state_->remove();
  }
  std::optional<StateFile>& state = go_on ? state_ : next_state_;
  state_kept_ = false;
  post(mirror::Start{remember(std::move(done)), request_.options,
                     state ? state->memory() : std::span<std::byte>(), go_on, saved_.incoming});
  const bool waits = engine_->status().phase == mirror::Phase::queued;
  if (!go_on && !waits) state_ = std::exchange(next_state_, std::nullopt);
}

void ExportImpl::save_state() {
  try {
    if (std::optional<StateFile>& state = next_state_ ? next_state_ : state_) state->save(saved_);
  } catch (const std::exception& e) {
    log_line(e.what());
  }
}

// A restart goes on with them; but for a deadline, which counts from the moment that it was set.
void ExportImpl::remember_changes(const mirror::Set& changes) {
  mirror::MigrateOptions& options = request_.options;
  options.mode = changes.mode.value_or(options.mode);
  options.bandwidth = changes.bandwidth.value_or(options.bandwidth);
  options.buffer_bytes = changes.buffer_bytes.value_or(options.buffer_bytes);
  options.max_delay = changes.max_delay.value_or(options.max_delay);
  options.downtime_limit = changes.downtime_limit.value_or(options.downtime_limit);
  save_request();
}

// A restart leaves it paused, or not.
void ExportImpl::remember_pause(bool paused) {
  saved_.paused = paused;
  save_state();
}

// Nor does a restart switch over by itself.
void ExportImpl::remember_abort() {
  request_.options.switch_when = mirror::SwitchWhen::manual;
  save_request();
}

void ExportImpl::save_request() {
  saved_.request = migrate_to_json(request_);
  save_state();
}

// It does not go on by itself after a restart.
void ExportImpl::on(mirror::Ended&&) {
  saved_.running = false;
  save_state();
}

void ExportImpl::on(mirror::LetGo&& a) {
  if (next_state_) {
    state_ = std::exchange(next_state_, std::nullopt);
    return;
  }
  state_kept_ = a.keep && state_.has_value();
  if (state_kept_) return;
  if (state_) state_->remove();
  state_.reset();
}

}  // namespace nbdferry::proxy
