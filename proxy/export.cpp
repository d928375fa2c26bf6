// Export: the loop around the core, and what its actions mean outside.
#include "proxy/export.hpp"

#include <algorithm>
#include <stdexcept>
#include <thread>
#include <utility>
#include <variant>

#include <boost/asio/post.hpp>
#include <fmt/format.h>

#include "proxy/export_impl.hpp"
#include "proxy/log.hpp"
#include "proxy/migration_id.hpp"

namespace nbdferry::proxy {

namespace {

constexpr Duration tick_period = std::chrono::milliseconds(5);
constexpr Duration guest_idle = std::chrono::milliseconds(50);
// While the guest keeps the loop busy, asking again within the lull, a step of a copy is followed by so many times its
// own time of the guest's.
constexpr Duration guest_lull = std::chrono::microseconds(100);
constexpr int guest_share = 8;
constexpr Duration step_longest = std::chrono::milliseconds(1);  // that counts

mirror::Serving serving_for(Role role) {
  if (role == Role::pivoted) return mirror::Serving::target;
  return role == Role::retired ? mirror::Serving::nobody : mirror::Serving::source;
}

}  // namespace

std::unique_ptr<Export> Export::open(boost::asio::io_context& io, const ExportOptions& options) {
  // The disk first: it takes the lock under which the record is ours to change.
  ProbedDisk probed = probe_disk({.path = options.disk,
                                  .read_only = options.read_only,
                                  .direct = options.direct,
                                  .create_size = options.create_size});
  const RecordPlace place = owner_record_place(options.disk);
  if (!place.note.empty()) log_line(place.note);
  OwnerRecord record = OwnerRecord::load(place.path, options.disk);
  if (!record.note().empty()) log_line(record.note());
  const Ownership& recorded = record.current();
  const bool counts = recorded.role == Role::owner && recorded.generation != 0;
  if (options.incoming && (counts || recorded.role == Role::pivoted)) {
    // A restart with yesterday's command line must not lay a promoted disk open to be overwritten,
    // nor forget where a pivoted one is, and show the guest what was left behind.
    throw std::runtime_error(
        fmt::format("cannot serve {} as incoming: {} records that this disk {}: serve it "
                    "without --incoming, or remove the record to have the disk overwritten",
                    options.disk, record.path(),
                    counts ? "counts" : "was pivoted, and is served from its target"));
  }
  if (options.read_only && recorded.role == Role::pivoted) {
    // Its journal may hold what the target has lost, and is another process's to write there.
    throw std::runtime_error(fmt::format(
        "cannot serve {} read-only: {} records that this disk was pivoted, and is served "
        "from its target: serve it without --read-only",
        options.disk, record.path()));
  }
  if (options.incoming && recorded.role != Role::incoming) {
    Ownership next;
    next.role = Role::incoming;
    record.write(std::move(next));
  }
  return std::make_unique<ExportImpl>(io, options, std::move(probed), std::move(record));
}

ExportImpl::ExportImpl(boost::asio::io_context& io, const ExportOptions& options, ProbedDisk disk,
                       OwnerRecord record)
    : io_(io),
      options_(options),
      record_(std::move(record)),
      ownership_(record_.current()),
      turn_timer_(io),
      ticks_(io),
      stop_timer_(io) {
  disk_ = std::make_unique<LocalDisk>(io, std::move(disk), options.read_only,
                                      [this](mirror::SourceDone&& done) { post(std::move(done)); });
  if (!disk_->note().empty()) log_line(disk_->note());
  info_.name = options.name;
  info_.description = options.disk;
  info_.size = disk_->size();
  info_.read_only = options.read_only;
  info_.rotational = disk_->rotational();
  mirror::EngineConfig config;
  config.size = info_.size;
  config.source_align = disk_->align();
  config.promised_block_min = info_.block_min;
  config.serving = serving_for(ownership_.role);
  engine_ = std::make_unique<mirror::Engine>(config);
  if (ownership_.role == Role::retired) {
    log_line(
        fmt::format("{}: {} to {}: refusing all I/O (serve it there; or, if this copy is to "
                    "count again, unfence it)",
                    options.disk, to_string(ownership_.role), fmt::join(ownership_.uris, " ")));
  } else if (ownership_.role == Role::incoming) {
    if (source_of(ownership_.migration_id)) incoming_claim_ = ownership_.migration_id;
    log_line(fmt::format("{}: incoming: takes writes only from its migration until promoted",
                         options.disk));
  }
  restore();
}

ExportImpl::~ExportImpl() {
  helper_.join();
  const mirror::Status core = engine_->status();
  // Nothing is in it: nor does it take memory until the next start, if one comes.
  if (core.serving == mirror::Serving::target && core.buffered_bytes == 0) shrink_journal();
}

Time ExportImpl::now() const {
  return std::chrono::duration_cast<Time>(std::chrono::steady_clock::now().time_since_epoch());
}

// --- the loop ---

void ExportImpl::post(mirror::Event&& event) {
  enqueue(std::move(event));
  drain();
}

// A copy takes time: reading, and what an answer brings with it. So each step of it comes in a turn of the
// loop of its own, and what the guest asks meanwhile gets in between; all at once while it asks nothing. Nor can
// the guest ask while we have its processor: whoever wants that goes first.
void ExportImpl::enqueue(mirror::Event&& event) {
  std::optional<OpId> answered;
  if (const auto* done = std::get_if<mirror::SourceDone>(&event)) answered = done->id;
  if (const auto* done = std::get_if<mirror::TargetDone>(&event)) answered = done->id;
  if (answered && mirror::Engine::nobody_waits_for(*answered)) {
    later(std::move(event));
    return;
  }
  // What the target says of itself comes after its answers.
  const bool of_link = std::holds_alternative<mirror::TargetUp>(event) ||
                       std::holds_alternative<mirror::TargetWindow>(event) ||
                       std::holds_alternative<mirror::TargetLost>(event) ||
                       std::holds_alternative<mirror::TargetRefused>(event) ||
                       std::holds_alternative<mirror::TargetClosed>(event) ||
                       std::holds_alternative<mirror::PathLost>(event);
  if (of_link) {
    const auto is_answer = [](const Step& step) {
      const auto* e = std::get_if<mirror::Event>(&step);
      return e != nullptr && std::holds_alternative<mirror::TargetDone>(*e);
    };
    for (Step& step : later_) {
      if (is_answer(step)) events_.push_back(std::move(std::get<mirror::Event>(step)));
    }
    std::erase_if(later_, is_answer);
  }
  events_.push_back(std::move(event));
}

void ExportImpl::later(Step&& step) {
  later_.push_back(std::move(step));
  post_turn();
}

void ExportImpl::post_turn() {
  if (turn_posted_) return;
  turn_posted_ = true;
  boost::asio::post(io_, [this] { turn(); });
}

void ExportImpl::turn() {
  const Time begin = now();
  const bool idle = begin - guest_asked_at_ > guest_idle;
  const bool polite = !idle && !engine_->guest_waits_for_copy();
  const Time next = std::min(step_ended_ + guest_share * step_took_, guest_asked_at_ + guest_lull);
  if (polite && guest_asked_at_ >= step_ended_ && begin < next) {
    gave_way_ = false;
    turn_timer_.expires_after(next - begin);
    turn_timer_.async_wait([this](const boost::system::error_code& ec) {
      if (!ec) turn();
    });
    return;
  }
  if (polite && !std::exchange(gave_way_, true)) {
    std::this_thread::yield();
    boost::asio::post(io_, [this] { turn(); });  // after what has been asked meanwhile
    return;
  }
  gave_way_ = false;
  turn_posted_ = false;
  for (std::size_t left = idle ? later_.size() : 1; left > 0 && !later_.empty(); --left) {
    Step step = std::move(later_.front());
    later_.pop_front();
    if (auto* event = std::get_if<mirror::Event>(&step)) {
      events_.push_back(std::move(*event));
    } else if (mirror::SourceDone done;
               disk_->submit(std::get<mirror::DiskOp>(std::move(step)), done)) {
      events_.push_back(std::move(done));
    }
  }
  if (!later_.empty()) post_turn();
  drain();
  step_ended_ = now();
  step_took_ = std::min<Duration>(step_ended_ - begin, step_longest);
}

void ExportImpl::drain() {
  if (draining_) return;
  draining_ = true;
  const Time t = now();
  while (!events_.empty()) {
    mirror::Event event = std::move(events_.front());
    events_.pop_front();
    if (std::holds_alternative<mirror::GuestRequest>(event)) guest_asked_at_ = t;
    engine_->apply(std::move(event), t, actions_);
    perform();
  }
  draining_ = false;
  if (state_) state_->beat(disk_->writes_in_flight() != 0);
  wrote_ = false;
  arm_ticks();
}

void ExportImpl::perform() {
  for (auto& action : actions_) {
    std::visit([this](auto& a) { on(std::move(a)); }, action);
  }
  actions_.clear();
}

void ExportImpl::on(mirror::SubmitSource&& a) {
  if (mirror::Engine::nobody_waits_for(a.op.id)) return later(std::move(a.op));
  mirror::SourceDone done;
  if (state_ && is_write(a.op.command) && !std::exchange(wrote_, true)) state_->beat(true);
  if (disk_->submit(std::move(a.op), done)) enqueue(std::move(done));
}

void ExportImpl::on(mirror::SubmitTarget&& a) { target_->submit(std::move(a.op)); }

void ExportImpl::on(mirror::Reply&& a) {
  const std::uint32_t number = session_of(a.id);
  if (number == internal_session) {
    stop_flushed(a.error);
    return;
  }
  const auto it = sessions_.find(number);
  if (it != sessions_.end()) it->second.sink->reply(std::move(a));
}

void ExportImpl::on(mirror::OpenTarget&&) {
  if (target_) {
    target_->open();  // the same target once more
    return;
  }
  transport::TargetConfig config;
  // After a pivot by those that were proved, which the record names.
  config.known = engine_->status().serving == mirror::Serving::target;
  config.uris = config.known ? ownership_.uris : request_.uris;
  config.vias = config.known ? ownership_.vias : request_.vias;
  config.tls = config.known ? ownership_.tls : request_.tls;
  config.connections = request_.connections;
  config.answer_timeout = request_.answer_timeout;
  config.connect_timeout = std::min(config.connect_timeout, config.answer_timeout);
  config.size_wanted = info_.size;
  config.patient = resuming_;
  config.migration_id = migration_id_;  // and what does it hold of it already?
  target_ =
      transport::Target::create(io_.get_executor(), std::move(config),
                                [this](mirror::Event&& event) { target_event(std::move(event)); });
  target_->open();
}

void ExportImpl::on(mirror::CloseTarget&&) { target_->close(); }

// In the meantime it may have been let go.
void ExportImpl::on(mirror::UsePath&& a) {
  if (target_) target_->use(a.path);
}
void ExportImpl::on(mirror::RefusePath&& a) {
  if (target_) target_->refuse(a.path, a.reason);
}
void ExportImpl::on(mirror::LeavePath&& a) {
  if (target_) target_->leave(a.path);
}

void ExportImpl::target_event(mirror::Event&& event) {
  const bool closed = std::holds_alternative<mirror::TargetClosed>(event);
  if (closed) {
    // Not from inside its own call.
    boost::asio::post(io_, [old = std::shared_ptr<transport::Target>(std::move(target_))] {});
    target_.reset();
  }
  const auto* up = std::get_if<mirror::TargetUp>(&event);
  if (up != nullptr && up->info.incoming && !std::exchange(saved_.incoming, true)) save_state();
  post(std::move(event));
}

void ExportImpl::on(mirror::WriteRecord&& a) {
  Ownership next = ownership_;
  const bool pivot = a.kind == mirror::SwitchKind::pivot;
  next.role = pivot ? Role::pivoted : Role::retired;
  // Those that were proved: after a restart nothing else tells that they lead there.
  next.uris.clear();
  next.vias.clear();
  for (const auto& path : target_->paths()) {
    if (!path.known) continue;
    next.uris.push_back(path.uri);
    if (!path.via.empty()) next.vias.push_back(path.via);
  }
  next.tls = request_.tls;
  next.peer = next.uris.empty() ? "" : next.uris.front();
  next.migration_id = migration_id_;
  next.incoming_peer = a.incoming;
  auto write = [this, pivot, next = std::move(next)]() mutable {
    write_record(std::move(next), [this, pivot](const std::string& error) {
      if (pivot && error.empty()) keep_journal();
      post(mirror::RecordWritten{error.empty(), error});
    });
  };
  if (pivot) {
    begin_journal(std::move(write));
  } else {
    write();
  }
}

void ExportImpl::on(mirror::CommandDone&& a) {
  const auto it = commands_.find(a.command);
  if (it == commands_.end()) return;
  CommandHandler handler = std::move(it->second);
  commands_.erase(it);
  // Later: a handler may call back into us.
  boost::asio::post(io_, [handler = std::move(handler), ok = a.ok, text = std::move(a.message)] {
    handler(ok, text);
  });
}

void ExportImpl::on(mirror::Notice&& a) { log_line(a.text); }

void ExportImpl::arm_ticks() {
  if (ticking_ || !engine_->wants_ticks()) return;
  ticking_ = true;
  ticks_.expires_after(tick_period);
  ticks_.async_wait([this](const boost::system::error_code& ec) {
    if (ec) return;
    ticking_ = false;
    measure_progress();
    post(mirror::Tick{});
  });
}

// --- sessions ---

std::uint32_t ExportImpl::attach(ReplySink& sink, const Migrant& migrant) {
  const std::uint32_t number = ++last_session_;
  if (!migrant.migration.empty()) {
    // The same source starts anew, or has lost its connections: what the earlier ones still hold is not
    // to be written.
    fence_migrations(migrant);
    if (migrant.migration != incoming_claim_) {
      incoming_claim_ = migrant.migration;
      record_claim();
    }
  }
  sessions_.emplace(number,
                    Session{&sink, std::string(migrant.migration), std::string(migrant.session)});
  return number;
}

void ExportImpl::detach(std::uint32_t session) { sessions_.erase(session); }

void ExportImpl::fence_migrations(const Migrant& except) {
  std::vector<ReplySink*> out;
  for (const auto& [number, s] : sessions_) {
    if (s.migration.empty()) continue;
    if (s.migration != except.migration || s.session != except.session) out.push_back(s.sink);
  }
  for (ReplySink* sink : out) sink->fence();
}

// A restart must not lay open what this source's migration has brought, which after its commit is the
// only copy that counts; nor say that it holds what is about to be overwritten.
void ExportImpl::record_claim() {
  // One that is being written looks again when it is.
  if (claim_pending_ || ownership_.migration_id == incoming_claim_) return;
  claim_pending_ = true;
  Ownership next = ownership_;
  next.migration_id = incoming_claim_;
  write_record(std::move(next), [this](const std::string& error) {
    claim_pending_ = false;
    if (!error.empty()) {
      log_line(fmt::format("{}: a migration is refused: {}", options_.disk, error));
      incoming_claim_.clear();
      after_claim_.clear();
      fence_migrations({});
      return;
    }
    if (ownership_.migration_id != incoming_claim_) return record_claim();  // replaced meanwhile
    for (auto& request : std::exchange(after_claim_, {})) post(std::move(request));
  });
}

bool ExportImpl::knows_migration(std::string_view migration) const {
  const auto source = source_of(migration);
  if (ownership_.role != Role::incoming || !source) return false;
  if (incoming_claim_.empty() || source_of(incoming_claim_) == source) return true;
  if (std::exchange(refused_claim_, migration) != migration) {  // once for all of its connections
    log_line(fmt::format(
        "{}: refused a migration: another source's has begun to fill this disk: promote it, or, to "
        "have it overwritten, stop this process and remove the record {}",
        options_.disk, record_.path()));
  }
  return false;
}

bool ExportImpl::holds_migration(std::string_view migration) const {
  return ownership_.role == Role::incoming && ownership_.migration_id == migration &&
         (incoming_claim_.empty() || incoming_claim_ == migration);
}

bool ExportImpl::knows_session(std::string_view session) const {
  return std::any_of(sessions_.begin(), sessions_.end(),
                     [&](const auto& entry) { return entry.second.session == session; });
}

bool ExportImpl::may_write(std::uint32_t session) const {
  if (ownership_.role != Role::incoming) return true;
  const auto it = sessions_.find(session);
  return it != sessions_.end() && !it->second.migration.empty() &&
         it->second.migration == incoming_claim_;
}

void ExportImpl::submit(mirror::GuestRequest&& request) {
  meter_.count(request.command, request.range.length(), now());
  const auto session = sessions_.find(session_of(request.id));
  if (claim_pending_ && session != sessions_.end() && !session->second.migration.empty()) {
    after_claim_.push_back(std::move(request));
    return;
  }
  post(std::move(request));
}

}  // namespace nbdferry::proxy
