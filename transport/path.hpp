// Path: one route to the target. Owns its connections, replaces lost ones with a growing delay, and
// measures what it carries. Whether it may carry anything is the owner's to decide.
//
//   resting -> seeking -> reached -> used -> resting …       seeking: one connection, as the migration's
//           -> probing ->                                     probing: one connection that claims nothing
//   refused: for good
//
// What must hold: a connection that was made after a loss is only certain to reach the server instance that
// has answered on this path so far once a certain one has answered a request that was submitted after it was
// ready (rule 7). Flushes go to certain connections. When none is left the path is lost, newer connections
// or not.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <boost/asio/steady_timer.hpp>

#include "transport/connection.hpp"
#include "transport/connection_growth.hpp"
#include "transport/rate_gauge.hpp"
#include "transport/target.hpp"

namespace nbdferry::transport {

class Path;

// Told from the executor only, never from inside a member function of Path.
class PathOwner {
 public:
  // A connection is ready: use() it, or let it go.
  virtual void on_reached(Path& path) = 0;
  // That could not be made, or ended before it was used; nothing is under way now.
  virtual void on_unreached(Path& path, const std::string& reason) = 0;
  // Before the answers that a loss brings, and when a connection has joined.
  virtual void on_window() = 0;
  virtual void on_answer(Path& path, mirror::TargetDone&& done) = 0;
  // It was used, and is resting now.
  virtual void on_lost(Path& path, const std::string& reason) = 0;
  // All that has happened has been said.
  virtual void on_settled() = 0;
  // May a connection with this offer join those of the target?
  [[nodiscard]] virtual bool may_join(const Offer& offer) const = 0;
  [[nodiscard]] virtual std::uint64_t submissions() const = 0;

 protected:
  ~PathOwner() = default;
};

class Path final : public ConnectionOwner, public std::enable_shared_from_this<Path> {
 public:
  using Clock = std::chrono::steady_clock;
  enum class Stage : std::uint8_t { resting, seeking, probing, reached, used, refused };

  Path(boost::asio::any_io_executor executor, Endpoint endpoint, const TargetConfig& config,
       PathOwner& owner);

  // --- its life
  void seek(const std::string& session, bool later);
  void probe(const std::string& session, bool later);
  // The connection that is ready, if it is `kept`, and as many in all as `growth` says from now on.
  void use(ConnectionGrowth growth, bool kept);
  // Lets all connections go; what they have in flight is answered (lost).
  void rest();
  void refuse();
  // Used, and no longer to be: its owner is told that it is lost.
  void give_up(const std::string& reason);

  // --- operations
  // Is it used, with a connection for such a command?
  [[nodiscard]] bool can_take(Command command) const {
    return stage_ == Stage::used && choose(command) != nullptr;
  }
  // `now`: from the clock, not long ago.
  void post(mirror::DiskOp&& op, std::uint64_t sequence, Clock::time_point now);
  // What is small of what is posted in between leaves together, as far as it makes one good packet: each
  // packet costs us, and the server, more than what is in it.
  void begin_batch() { batches_ = true; }
  void end_batch();
  // (Is nobody there, when would so many bytes be through?) The least is the best.
  [[nodiscard]] std::pair<bool, double> rank(std::uint64_t bytes, double unknown_rate,
                                             Clock::time_point now) const;
  [[nodiscard]] double rate(Clock::time_point now) const { return gauge_.rate(now); }
  // Writes answered; a flush that was good covers those before its submission.
  [[nodiscard]] std::uint64_t writes() const { return writes_; }
  void flushed(std::uint64_t writes) { flushed_ = std::max(flushed_, writes); }
  [[nodiscard]] bool unflushed() const { return writes_ > flushed_; }

  // --- state
  [[nodiscard]] Stage stage() const { return stage_; }
  [[nodiscard]] const Endpoint& endpoint() const { return endpoint_; }
  [[nodiscard]] const Offer& offer() const {
    return slots_.front()->connection->offer();
  }                                       // reached
  [[nodiscard]] unsigned living() const;  // connections that are used
  [[nodiscard]] bool certain() const;     // any of them
  [[nodiscard]] std::uint64_t ops() const;
  // The last answer, or when it had nothing to answer.
  [[nodiscard]] Clock::time_point answered_at() const { return answered_at_; }
  [[nodiscard]] Clock::time_point heard_at() const { return heard_at_; }  // the last answer
  void forget_failure() { failure_.clear(); }
  [[nodiscard]] const std::string& failure() const {
    return failure_;
  }  // of the last attempt, or empty
  [[nodiscard]] std::uint64_t sent_bytes() const { return sent_bytes_; }
  [[nodiscard]] Duration latency() const { return latency_; }

  // --- the owner's notes
  bool known = false;    // it was proved to lead to the target
  unsigned denials = 0;  // in a row
  PathId id{};           // reached, and the core was asked

  // --- its connections
  void on_ready(Connection& connection) override;
  void on_answers(Connection& connection) override;
  void on_ended(Connection& connection, const std::string& reason) override;

 private:
  // A place for a connection, and what outlives it.
  struct Slot {
    explicit Slot(const boost::asio::any_io_executor& executor) : retry(executor) {}
    std::shared_ptr<Connection> connection;  // null while waiting for the next attempt
    bool ready = false;                      // and used
    bool joined = false;                     // once, at least
    boost::asio::steady_timer retry;
    bool certain = false;        // belongs to the server instance that answered so far
    std::uint64_t ready_at = 0;  // number of submissions when it became ready
  };

  void attempt(Stage stage, const std::string& session, bool later);
  void add_slot(bool later);
  void dial(Slot& slot);
  void dial_later(const std::shared_ptr<Slot>& slot);
  void joined(Slot& slot);
  void grow();
  void drop_slots();
  [[nodiscard]] bool may_wait(const Slot& slot) const;
  [[nodiscard]] const std::shared_ptr<Slot>& slot_of(const Connection& connection) const;
  [[nodiscard]] Slot* choose(Command command) const;
  [[nodiscard]] Slot& choose_in_batch(const mirror::DiskOp& op);
  void take_answers(Slot& slot);
  void count(const Answer& answer);
  void vouch(std::uint64_t sequence);
  [[nodiscard]] bool nobody_answers() const;
  [[nodiscard]] std::uint64_t cost() const;

  boost::asio::any_io_executor executor_;
  Endpoint endpoint_;
  const TargetConfig& config_;
  PathOwner& owner_;
  Stage stage_ = Stage::resting;
  std::string session_;
  std::vector<std::shared_ptr<Slot>> slots_;
  Duration delay_;  // before the next attempt
  std::minstd_rand jitter_;
  std::string failure_;
  bool doubts_ = false;  // some ready connection isn't certain
  bool leaves_ = false;  // the server says that it is shutting down
  Clock::time_point
      answered_at_{};  // the last answer, on any connection; or when there were none to come
  Clock::time_point heard_at_{};
  std::vector<Answer> answers_;  // scratch

  bool batches_ = false;
  Slot* batch_ = nullptr;  // where small ones go
  std::uint64_t batch_bytes_ = 0;

  RateGauge gauge_;
  ConnectionGrowth growth_{1, 1};
  std::uint64_t writes_ = 0;
  std::uint64_t flushed_ = 0;
  std::uint64_t sent_bytes_ = 0;
  Duration latency_{};  // smoothed
};

}  // namespace nbdferry::transport
