#include "transport/path.hpp"

#include <algorithm>

#include "mirror/assert.hpp"

namespace nbdferry::transport {

namespace {

constexpr Duration retry_delay_min = std::chrono::milliseconds(100);
constexpr Duration retry_delay_max = std::chrono::seconds(5);
constexpr std::uint64_t batch_op_bytes_max = 16ULL * 1024;
constexpr std::uint64_t batch_bytes_max = 32ULL * 1024;
constexpr const char* leaving =
    "its server is shutting down, or its disk has been handed over (ESHUTDOWN)";

}  // namespace

Path::Path(boost::asio::any_io_executor executor, Endpoint endpoint, const TargetConfig& config,
           PathOwner& owner)
    : executor_(std::move(executor)),
      endpoint_(std::move(endpoint)),
      config_(config),
      owner_(owner),
      delay_(retry_delay_min),
      jitter_(std::random_device{}()) {}

// --- its life
// -----------------------------------------------------------------------------------------

void Path::seek(const std::string& session, bool later) { attempt(Stage::seeking, session, later); }
void Path::probe(const std::string& session, bool later) {
  attempt(Stage::probing, session, later);
}

void Path::attempt(Stage stage, const std::string& session, bool later) {
  NBDFERRY_ASSERT(stage_ == Stage::resting, "one attempt at a time");
  stage_ = stage;
  session_ = session;
  add_slot(later);
}

void Path::use(ConnectionGrowth growth, bool kept) {
  NBDFERRY_ASSERT(stage_ == Stage::reached, "what is used was reached");
  known = true;
  denials = 0;
  id = {};
  if (!kept) drop_slots();
  stage_ = Stage::used;
  growth_ = growth;
  flushed_ = writes_;
  answered_at_ = Clock::now();
  if (kept) {
    Slot& first = *slots_.front();
    first.ready = first.joined = first.certain = true;
    first.connection->set_answer_timeout(config_.answer_timeout);
  }
  grow();
}

void Path::grow() {
  while (slots_.size() < growth_.count()) add_slot(false);
}

void Path::rest() {
  if (stage_ != Stage::refused) stage_ = Stage::resting;
  id = {};
  drop_slots();
  gauge_ = {};
}

void Path::refuse() {
  rest();
  stage_ = Stage::refused;
}

void Path::drop_slots() {
  for (const auto& slot : slots_) slot->ready = slot->certain = false;
  for (const auto& slot : slots_) {
    if (!slot->connection) continue;
    slot->connection->close();
    take_answers(*slot);
  }
  slots_.clear();  // and with them their timers
  doubts_ = leaves_ = false;
}

void Path::add_slot(bool later) {
  const auto slot = slots_.emplace_back(std::make_shared<Slot>(executor_));
  if (later) {
    dial_later(slot);
  } else {
    dial(*slot);
  }
}

void Path::dial(Slot& slot) {
  const bool probe = stage_ == Stage::probing;
  const Duration answer_timeout =
      probe ? std::min(config_.answer_timeout, config_.connect_timeout) : config_.answer_timeout;
  slot.connection = std::make_shared<Connection>(
      executor_,
      ConnectionOptions{endpoint_, config_.migration_id, session_, probe, config_.connect_timeout,
                        answer_timeout},
      *this);
  slot.connection->open();
}

// With jitter, so that paths to a server that comes back do not all arrive at once.
void Path::dial_later(const std::shared_ptr<Slot>& slot) {
  slot->connection.reset();
  slot->ready = slot->certain = false;
  slot->retry.expires_after(delay_ + delay_ * static_cast<int>(jitter_() % 50) / 100);
  delay_ = std::min(delay_ * 2, retry_delay_max);
  slot->retry.async_wait([weak = weak_from_this(),
                          weak_slot = std::weak_ptr(slot)](const boost::system::error_code& error) {
    const auto self = weak.lock();
    const auto waiting = weak_slot.lock();
    if (self && waiting && !error) self->dial(*waiting);
  });
}

// --- its connections
// -----------------------------------------------------------------------------------------

const std::shared_ptr<Path::Slot>& Path::slot_of(const Connection& connection) const {
  const auto found = std::find_if(slots_.begin(), slots_.end(), [&](const auto& slot) {
    return slot->connection.get() == &connection;
  });
  NBDFERRY_ASSERT(found != slots_.end(), "a connection that is heard has a slot");
  return *found;
}

void Path::on_ready(Connection& connection) {
  const auto self = shared_from_this();
  const auto slot = slot_of(connection);
  failure_.clear();
  if (stage_ == Stage::used) {
    joined(*slot);
  } else {
    stage_ = Stage::reached;
    owner_.on_reached(*this);
  }
  owner_.on_settled();
}

void Path::joined(Slot& slot) {
  if (!owner_.may_join(slot.connection->offer())) {
    // Not what the core was told. If the server was restarted in another way, the older connections
    // will notice soon, and all begins anew.
    slot.connection->close();
    dial_later(slot_of(*slot.connection));
    return;
  }
  slot.ready = slot.joined = true;
  slot.ready_at = owner_.submissions();
  // The first one: nothing has been written by this path that its server could have forgotten.
  if (!certain()) {
    slot.certain = true;
  } else {
    doubts_ = true;
  }
  owner_.on_window();
}

void Path::on_ended(Connection& connection, const std::string& reason) {
  const auto self = shared_from_this();
  const auto slot = slot_of(connection);
  failure_ = reason;
  if (stage_ != Stage::used) {
    rest();
    owner_.on_unreached(*this, reason);
    owner_.on_settled();
    return;
  }
  const bool was_ready = std::exchange(slot->ready, false);
  slot->certain = false;
  if (may_wait(*slot) && !(connection.hung() && nobody_answers())) {
    if (was_ready) owner_.on_window();
    take_answers(*slot);
    // One more was wanted, and the server takes no more.
    if (!slot->joined && slots_.size() > growth_.start()) {
      std::erase(slots_, slot);
      growth_.stop(static_cast<unsigned>(slots_.size()));
    } else {
      dial_later(slot);
    }
    if (leaves_) give_up(leaving);
  } else {
    give_up(reason);
  }
  owner_.on_settled();
}

// Is there another connection to go on with, or, if none was ever made, one that may yet be?
bool Path::may_wait(const Slot& slot) const {
  if (certain()) return true;
  bool first_ones = true;
  bool dialling = false;
  for (const auto& other : slots_) {
    first_ones = first_ones && !other->joined;
    dialling = dialling || (other.get() != &slot && other->connection);
  }
  return first_ones && dialling;
}

// The server may have restarted. What newer connections have in flight is given up as well.
void Path::give_up(const std::string& reason) {
  failure_ = reason;
  for (const auto& slot : slots_) slot->ready = slot->certain = false;
  owner_.on_window();
  rest();
  owner_.on_lost(*this, reason);
}

// Then a server hangs as a whole. One connection after the other would make the core, and after a pivot
// the guest, wait as many times.
bool Path::nobody_answers() const { return Clock::now() - answered_at_ >= config_.answer_timeout; }

// --- operations
// -----------------------------------------------------------------------------------

// The connection with the least in flight. If all have just died, and have not been able to say so, one
// of them: it answers when it does. An answer from here would come before the smaller window, and who asks
// again at once would be answered so for ever, while nothing else gets its turn.
Path::Slot* Path::choose(Command command) const {
  if (stage_ == Stage::reached) return slots_.front().get();
  Slot* best = nullptr;
  const auto rank_of = [](const Slot& s) {
    return std::pair(!s.connection->is_ready(), s.connection->cost());
  };
  for (const auto& slot : slots_) {
    if (!slot->ready || (command == Command::flush && !slot->certain)) continue;
    if (best == nullptr || rank_of(*slot) < rank_of(*best)) best = slot.get();
  }
  return best;
}

void Path::post(mirror::DiskOp&& op, std::uint64_t sequence, Clock::time_point now) {
  if (ops() == 0) answered_at_ = now;  // it could not answer earlier
  Slot& slot = choose_in_batch(op);
  if (batches_) slot.connection->cork();
  slot.connection->post(std::move(op), sequence, now);
  gauge_.update(now, cost(), 0);
}

Path::Slot& Path::choose_in_batch(const mirror::DiskOp& op) {
  const auto bytes = op.payload.size();
  const bool joins = batches_ && op.command == Command::write && bytes <= batch_op_bytes_max;
  if (joins && batch_ != nullptr && batch_bytes_ + bytes <= batch_bytes_max && batch_->ready &&
      batch_->connection->is_ready()) {
    batch_bytes_ += bytes;
    return *batch_;
  }
  Slot& slot = *choose(op.command);
  if (joins) {
    batch_ = &slot;
    batch_bytes_ = bytes;
  }
  return slot;
}

void Path::end_batch() {
  batches_ = false;
  batch_ = nullptr;
  for (const auto& slot : slots_) {
    if (slot->connection) slot->connection->uncork();
  }
}

std::pair<bool, double> Path::rank(std::uint64_t bytes, double unknown_rate,
                                   Clock::time_point now) const {
  const double known_rate = gauge_.rate(now);
  const double rate = known_rate == 0 ? unknown_rate : known_rate;
  // As long as it has been silent already it may be again.
  const Duration silence = ops() == 0 ? Duration{} : now - answered_at_;
  const bool dead = std::none_of(slots_.begin(), slots_.end(), [](const auto& slot) {
    return slot->ready && slot->connection->is_ready();
  });
  return {dead, static_cast<double>(cost() + bytes) / rate +
                    std::chrono::duration<double>(silence).count()};
}

void Path::on_answers(Connection& connection) {
  const auto self = shared_from_this();
  take_answers(*slot_of(connection));
  if (leaves_) {
    if (stage_ == Stage::used) {
      give_up(leaving);
    } else {
      failure_ = leaving;
      rest();
      owner_.on_unreached(*this, leaving);
    }
  }
  owner_.on_settled();
}

void Path::take_answers(Slot& slot) {
  answers_.clear();
  slot.connection->take_answers(answers_);
  std::uint64_t answered = 0;
  std::uint64_t done_bytes = 0;
  const bool leaves = std::any_of(answers_.begin(), answers_.end(), [](const Answer& answer) {
    return answer.done.error == IoError::shutdown;
  });
  if (leaves && stage_ == Stage::used && !leaves_) {
    // The smaller window first: each answer makes room in it.
    for (const auto& s : slots_) s->ready = s->certain = false;
    owner_.on_window();
  }
  leaves_ = leaves_ || leaves;
  for (auto& answer : answers_) {
    if (answer.done.error == IoError::shutdown && stage_ != Stage::used) {
      answer.done.error = IoError::lost;
    }
    if (answer.done.error == IoError::none) count(answer);
    if (answer.done.error != IoError::lost) answered = std::max(answered, answer.sequence);
    done_bytes += answer.cost;
    owner_.on_answer(*this, std::move(answer.done));
  }
  if (answered == 0) return;
  answered_at_ = heard_at_ = Clock::now();
  gauge_.update(answered_at_, cost(), done_bytes);
  if (slot.certain && doubts_) vouch(answered);
  if (stage_ == Stage::used && growth_.observe(answered_at_, rate(answered_at_), latency_)) grow();
}

void Path::count(const Answer& answer) {
  delay_ = retry_delay_min;  // it works: the next loss is news again
  if (answer.wrote) ++writes_;
  sent_bytes_ += answer.sent_bytes;
  if (answer.latency == Duration{}) return;
  latency_ = latency_ == Duration{} ? answer.latency : latency_ + (answer.latency - latency_) / 8;
}

// A certain connection has answered this submission: whatever was ready before it is as certain.
void Path::vouch(std::uint64_t sequence) {
  doubts_ = false;
  for (const auto& slot : slots_) {
    if (!slot->ready || slot->certain) continue;
    slot->certain = slot->ready_at < sequence;
    if (!slot->certain) doubts_ = true;
  }
}

// --- state
// -----------------------------------------------------------------------------------------

unsigned Path::living() const {
  return static_cast<unsigned>(
      std::count_if(slots_.begin(), slots_.end(), [](const auto& slot) { return slot->ready; }));
}

bool Path::certain() const {
  return std::any_of(slots_.begin(), slots_.end(), [](const auto& slot) { return slot->certain; });
}

std::uint64_t Path::ops() const {
  std::uint64_t sum = 0;
  for (const auto& slot : slots_) sum += slot->connection ? slot->connection->ops() : 0;
  return sum;
}

std::uint64_t Path::cost() const {
  std::uint64_t sum = 0;
  for (const auto& slot : slots_) sum += slot->connection ? slot->connection->cost() : 0;
  return sum;
}

}  // namespace nbdferry::transport
