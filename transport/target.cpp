// The target as one disk: spreads operations over connections, replaces lost ones, and decides when
// the server may have restarted.
//
//   idle -> seeking -> up -> seeking -> up …        lost: up -> seeking
//              |                                    any -> closed by close(); open() starts again
//              v
//           refused     (the first attempt failed, or what came back can't be this target)
//
// While seeking exactly one connection is tried; once it is ready, the others follow, and each that
// ends is replaced by itself, with a growing delay.
//
// What must hold:
//  - Events leave in the order in which they arose, from the executor, never from inside a member
//    function of Target.
//  - TargetLost is said when no connection is left of which it is certain that it belongs to the
//    server instance that answered so far (rule 7). A connection that was made later is only
//    certain once a certain one has answered a request that was submitted after it was ready: until
//    then the server may have restarted, with the older connections not having noticed. So flushes
//    go to certain connections only: a restarted server's flush covers nothing.
#include "transport/target.hpp"

#include <algorithm>
#include <optional>
#include <random>
#include <stdexcept>
#include <tuple>

#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <fmt/format.h>

#include "mirror/assert.hpp"
#include "transport/connection.hpp"
#include "transport/uri.hpp"

namespace nbdferry::transport {

namespace {

constexpr unsigned connections_chosen = 4;  // with multi-conn, when the operator names no number
constexpr unsigned connections_max = 64;
// What one connection may have in flight. Large enough to keep a fast server busy, small enough
// that a mirrored write does not wait long behind bulk data.
constexpr std::uint32_t connection_ops_max = 64;
constexpr std::uint64_t connection_bytes_max = 8ULL * 1024 * 1024;
constexpr std::uint64_t flushes_max = 8;  // these go at once, whatever the window says
constexpr Duration retry_delay_min = std::chrono::milliseconds(100);
constexpr Duration retry_delay_max = std::chrono::seconds(5);

// A place for a connection, and what outlives it.
struct Slot {
  explicit Slot(const boost::asio::any_io_executor& executor) : retry(executor) {}
  std::shared_ptr<Connection> connection;  // null while waiting for the next attempt
  bool ready = false;
  boost::asio::steady_timer retry;
  Duration delay = retry_delay_min;  // before the next attempt
  bool certain = false;              // belongs to the server instance that answered so far
  std::uint64_t ready_at = 0;        // number of submissions when it became ready
};

// What no replacement may change, because the core has been told otherwise.
// A nbdferry target lets go of the connections of older sessions when it sees a new one.
std::string new_session() {
  std::random_device random;
  return fmt::format("{:08x}{:08x}", random(), random());
}

bool same(const mirror::TargetInfo& a, const mirror::TargetInfo& b) {
  const auto key = [](const mirror::TargetInfo& i) {
    return std::tuple(i.size, i.block_min, i.payload_max, i.read_only, i.can_flush, i.can_fua,
                      i.can_trim, i.can_zero, i.has_allocation, i.can_checksum);
  };
  return key(a) == key(b);
}

class State final : public ConnectionOwner, public std::enable_shared_from_this<State> {
 public:
  State(boost::asio::any_io_executor executor, TargetConfig config, Endpoint endpoint,
        EventHandler on_event)
      : executor_(std::move(executor)),
        config_(std::move(config)),
        endpoint_(std::move(endpoint)),
        on_event_(std::move(on_event)) {}

  void open();
  void submit(mirror::DiskOp&& op);
  void close();
  void abandon();
  [[nodiscard]] PathState path() const;

  void on_ready(Connection& connection) override;
  void on_answers(Connection& connection) override;
  void on_ended(Connection& connection, const std::string& reason) override;

 private:
  using Clock = std::chrono::steady_clock;
  enum class Phase : std::uint8_t { idle, seeking, up, refused, closed };

  void add_slot();
  void dial(Slot& slot);
  void retry_later(const std::shared_ptr<Slot>& slot);
  void came_up(Slot& slot);
  void joined(const std::shared_ptr<Slot>& slot);
  void lost(const std::string& reason, Duration delay);
  void refuse(const std::string& why);
  [[nodiscard]] std::string misfit(const mirror::TargetInfo& info) const;
  void drop_slots();
  [[nodiscard]] const std::shared_ptr<Slot>& slot_of(const Connection& connection) const;
  Slot* choose(const mirror::DiskOp& op);
  bool answer_here(const mirror::DiskOp& op);
  void take_answers(Slot& slot);
  void vouch(std::uint64_t sequence);
  [[nodiscard]] unsigned living() const;
  [[nodiscard]] bool nobody_answers() const;
  [[nodiscard]] std::uint32_t window_ops() const { return living() * connection_ops_max; }
  [[nodiscard]] std::uint64_t window_bytes() const { return living() * connection_bytes_max; }
  void emit_soon();
  void emit();

  boost::asio::any_io_executor executor_;
  TargetConfig config_;
  Endpoint endpoint_;
  EventHandler on_event_;
  Phase phase_ = Phase::idle;
  std::string session_;  // as long as some connection lives that is older than a loss
  bool was_up_ = false;
  bool silent_ = false;  // the Target is gone
  Offer offer_;          // of the first connection since TargetUp
  std::vector<std::shared_ptr<Slot>> slots_;
  std::uint64_t submissions_ = 0;
  bool doubts_ = false;              // some ready connection isn't certain
  Clock::time_point answered_at_{};  // the last answer, on any connection

  std::vector<mirror::Event> outbox_;
  std::optional<mirror::Event> last_word_;  // TargetLost or TargetClosed: once all is answered
  bool emit_posted_ = false;
  bool emitting_ = false;
  std::vector<Answer> answers_;  // scratch

  std::uint64_t sent_bytes_ = 0;
  Duration latency_{};  // smoothed
};

// --- events
// ---------------------------------------------------------------------------------------

void State::emit_soon() {
  if (emit_posted_ || (outbox_.empty() && !last_word_)) return;
  emit_posted_ = true;
  boost::asio::post(executor_, [self = shared_from_this()] {
    self->emit_posted_ = false;
    self->emit();
  });
}

// From the executor only. The handler may call us, and may destroy the Target.
void State::emit() {
  if (emitting_) return;
  const auto self = shared_from_this();
  emitting_ = true;
  std::vector<mirror::Event> batch;
  while (!silent_ && (!outbox_.empty() || last_word_)) {
    if (outbox_.empty()) {
      outbox_.push_back(std::move(*last_word_));
      last_word_.reset();
    }
    batch.swap(outbox_);
    for (auto& event : batch) {
      if (silent_) break;
      on_event_(std::move(event));
    }
    batch.clear();
  }
  emitting_ = false;
}

// --- life
// -----------------------------------------------------------------------------------------

void State::open() {
  NBDFERRY_ASSERT(phase_ != Phase::seeking && phase_ != Phase::up, "a target is opened once");
  phase_ = Phase::seeking;
  was_up_ = false;
  session_ = new_session();
  add_slot();
}

void State::add_slot() {
  slots_.push_back(std::make_shared<Slot>(executor_));
  dial(*slots_.back());
}

void State::dial(Slot& slot) {
  slot.connection = std::make_shared<Connection>(
      executor_,
      ConnectionOptions{endpoint_, config_.migration_id, session_, config_.connect_timeout,
                        config_.answer_timeout},
      *this);
  slot.connection->open();
}

void State::retry_later(const std::shared_ptr<Slot>& slot) {
  slot->connection.reset();
  slot->ready = slot->certain = false;
  slot->retry.expires_after(slot->delay);
  slot->delay = std::min(slot->delay * 2, retry_delay_max);
  slot->retry.async_wait([weak = weak_from_this(),
                          weak_slot = std::weak_ptr(slot)](const boost::system::error_code& error) {
    const auto self = weak.lock();
    const auto waiting = weak_slot.lock();
    if (self && waiting && !error) self->dial(*waiting);
  });
}

const std::shared_ptr<Slot>& State::slot_of(const Connection& connection) const {
  const auto found = std::find_if(slots_.begin(), slots_.end(), [&](const auto& slot) {
    return slot->connection.get() == &connection;
  });
  NBDFERRY_ASSERT(found != slots_.end(), "a connection that is heard has a slot");
  return *found;
}

// Then a server hangs as a whole. One connection after the other would make the core, and after a pivot
// the guest, wait as many times.
bool State::nobody_answers() const { return Clock::now() - answered_at_ >= config_.answer_timeout; }

unsigned State::living() const {
  return static_cast<unsigned>(
      std::count_if(slots_.begin(), slots_.end(), [](const auto& slot) { return slot->ready; }));
}

void State::on_ready(Connection& connection) {
  const auto slot = slot_of(connection);
  if (phase_ == Phase::seeking) {
    came_up(*slot);
  } else {
    joined(slot);
  }
  emit();
}

// Why this export can't be the target; empty when it can.
std::string State::misfit(const mirror::TargetInfo& info) const {
  if (info.read_only) return "the export is read-only: serve it writable";
  if (info.size < config_.size_wanted) {
    return fmt::format("the export is smaller than the disk ({} bytes, {} needed): enlarge it",
                       info.size, config_.size_wanted);
  }
  return {};
}

void State::came_up(Slot& slot) {
  const auto why = misfit(slot.connection->offer().info);
  if (!why.empty()) {
    refuse(why);
    return;
  }
  phase_ = Phase::up;
  was_up_ = true;
  doubts_ = false;
  answered_at_ = Clock::now();
  offer_ = slot.connection->offer();
  slot.ready = slot.certain = true;
  outbox_.emplace_back(mirror::TargetUp{offer_.info, window_ops(), window_bytes()});

  const unsigned wanted = config_.connections == 0 ? connections_chosen : config_.connections;
  const unsigned count = offer_.multi_conn ? std::min(wanted, connections_max) : 1;
  while (slots_.size() < count) add_slot();
}

void State::joined(const std::shared_ptr<Slot>& slot) {
  const Offer& offer = slot->connection->offer();
  if (!same(offer.info, offer_.info) || offer.multi_conn != offer_.multi_conn) {
    // Not what the core was told. If the server was restarted in another way, the older connections
    // will notice soon, and all begins anew.
    slot->connection->close();
    retry_later(slot);
    return;
  }
  slot->ready = true;
  slot->ready_at = submissions_;
  doubts_ = true;
  outbox_.emplace_back(mirror::TargetWindow{window_ops(), window_bytes()});
}

void State::on_ended(Connection& connection, const std::string& reason) {
  const auto slot = slot_of(connection);
  const bool was_ready = slot->ready;
  const auto first_answer = static_cast<std::ptrdiff_t>(outbox_.size());
  take_answers(*slot);
  retry_later(slot);
  const bool certain_left =
      std::any_of(slots_.begin(), slots_.end(), [](const auto& s) { return s->certain; });
  if (phase_ == Phase::seeking && !was_up_ && !config_.patient) {
    refuse(reason);
  } else if (phase_ == Phase::up && (!certain_left || (connection.hung() && nobody_answers()))) {
    lost(reason, slot->delay);
  }
  if (was_ready) {
    // Before the answers: what the core would send on their account must know the smaller window.
    outbox_.insert(outbox_.begin() + first_answer,
                   mirror::TargetWindow{window_ops(), window_bytes()});
  }
  emit();
}

// The server may have restarted. What newer connections have in flight is given up as well: the
// core decides anew once the target is up.
void State::lost(const std::string& reason, Duration delay) {
  drop_slots();
  phase_ = Phase::seeking;
  session_ = new_session();
  last_word_ = mirror::TargetLost{fmt::format("{}: {}", endpoint_.uri, reason)};
  slots_.push_back(std::make_shared<Slot>(executor_));
  slots_.front()->delay = delay;
  retry_later(slots_.front());
}

void State::refuse(const std::string& why) {
  drop_slots();
  phase_ = Phase::refused;
  outbox_.emplace_back(mirror::TargetRefused{fmt::format("{}: {}", endpoint_.uri, why)});
}

void State::drop_slots() {
  for (const auto& slot : slots_) {
    if (!slot->connection) continue;
    slot->connection->close();
    take_answers(*slot);
  }
  slots_.clear();  // and with them their timers
}

void State::close() {
  // First: what is answered lost here is not to be sent again.
  outbox_.emplace_back(mirror::TargetWindow{0, 0});
  drop_slots();
  phase_ = Phase::closed;
  last_word_ = mirror::TargetClosed{};
  emit_soon();
}

void State::abandon() {
  silent_ = true;
  drop_slots();
}

// --- operations
// -----------------------------------------------------------------------------------

void State::submit(mirror::DiskOp&& op) {
  if (!answer_here(op)) {
    if (Slot* slot = choose(op); slot != nullptr) {
      slot->connection->post(std::move(op), ++submissions_);
      return;
    }
    outbox_.emplace_back(mirror::TargetDone{op.id, IoError::lost, {}, {}});
  }
  emit_soon();
}

// What needs no server, or can't be asked of this one.
bool State::answer_here(const mirror::DiskOp& op) {
  if (phase_ != Phase::up) return false;
  mirror::TargetDone done{op.id, IoError::none, {}, {}};
  switch (op.command) {
    case Command::cache:
      break;
    case Command::flush:
      if (offer_.info.can_flush) return false;
      break;
    case Command::block_status:
      if (offer_.info.has_allocation) return false;
      done.extents.push_back({op.range.length(), false, false});
      break;
    case Command::checksum:
      if (offer_.info.can_checksum) return false;
      done.error = IoError::not_supported;
      break;
    case Command::trim:
      if (offer_.info.can_trim) return false;
      done.error = IoError::not_supported;
      break;
    case Command::zero:
      if (!op.fast_only || offer_.can_fast_zero) return false;
      done.error = IoError::not_supported;
      break;
    default:
      return false;
  }
  outbox_.emplace_back(std::move(done));
  return true;
}

// The connection with the least in flight. If all have just died, and have not been able to say so, one
// of them: it answers when it does. An answer from here would come before the smaller window, and who asks
// again at once would be answered so for ever, while nothing else gets its turn.
Slot* State::choose(const mirror::DiskOp& op) {
  Slot* best = nullptr;
  std::uint64_t in_flight = 0;
  for (const auto& slot : slots_) {
    if (!slot->ready) continue;
    in_flight += slot->connection->ops();
    if (op.command == Command::flush && !slot->certain) continue;
    const auto rank = [](const Slot& s) {
      return std::pair(!s.connection->is_ready(), s.connection->cost());
    };
    if (best == nullptr || rank(*slot) < rank(*best)) best = slot.get();
  }
  NBDFERRY_ASSERT(in_flight <= slots_.size() * connection_ops_max + flushes_max,
                  "the core keeps within the window");
  return best;
}

void State::on_answers(Connection& connection) {
  take_answers(*slot_of(connection));
  emit();
}

void State::take_answers(Slot& slot) {
  answers_.clear();
  slot.connection->take_answers(answers_);
  std::uint64_t answered = 0;
  for (auto& answer : answers_) {
    if (answer.done.error != IoError::lost) {
      answered = std::max(answered, answer.sequence);
      sent_bytes_ += answer.sent_bytes;
      if (answer.latency != Duration{}) {
        latency_ =
            latency_ == Duration{} ? answer.latency : latency_ + (answer.latency - latency_) / 8;
      }
    }
    outbox_.emplace_back(std::move(answer.done));
  }
  if (answered == 0) return;
  answered_at_ = Clock::now();
  slot.delay = retry_delay_min;  // it works: the next loss is news again
  if (slot.certain && doubts_) vouch(answered);
}

// A certain connection has answered this submission: whatever was ready before it is as certain.
void State::vouch(std::uint64_t sequence) {
  doubts_ = false;
  for (const auto& slot : slots_) {
    if (!slot->ready || slot->certain) continue;
    slot->certain = slot->ready_at < sequence;
    if (!slot->certain) doubts_ = true;
  }
}

PathState State::path() const {
  PathState out;
  out.uri = endpoint_.uri;
  out.connections = living();
  out.state = phase_ == Phase::up                    ? "up"
              : phase_ == Phase::seeking && !was_up_ ? "connecting"
                                                     : "down";
  out.sent_bytes = sent_bytes_;
  out.rtt_us = static_cast<std::uint64_t>(latency_.count() / 1000);
  out.nbdferry = offer_.info.incoming;
  return out;
}

// The handle that the core's edge holds.
class TargetOverLibnbd final : public Target {
 public:
  explicit TargetOverLibnbd(std::shared_ptr<State> state) : state_(std::move(state)) {}
  ~TargetOverLibnbd() override { state_->abandon(); }
  void open() override { state_->open(); }
  void submit(mirror::DiskOp&& op) override { state_->submit(std::move(op)); }
  void close() override { state_->close(); }
  [[nodiscard]] std::vector<PathState> paths() const override { return {state_->path()}; }

 private:
  std::shared_ptr<State> state_;
};

}  // namespace

std::unique_ptr<Target> Target::create(boost::asio::any_io_executor executor, TargetConfig config,
                                       EventHandler on_event) {
  if (config.uris.size() != 1) {
    throw std::invalid_argument("target: exactly one URI is supported: leave the others out");
  }
  auto endpoint = parse_uri(config.uris.front());
  return std::make_unique<TargetOverLibnbd>(std::make_shared<State>(
      std::move(executor), std::move(config), std::move(endpoint), std::move(on_event)));
}

}  // namespace nbdferry::transport
