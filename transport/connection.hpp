// Connection: one NBD session with the target's server, that is one libnbd handle, from dialling to
// its end. It never comes back; its owner makes a new one.
//
// The interface is post and complete: operations go in by post(), answers are fetched with
// take_answers() when the owner is told. With TLS, what doesn't leave at once is encrypted and sent by a
// helper thread (Elsewhere).
//
//   dialling -> handshaking -> ready -> ended          (ended is reachable from everywhere)
//
// What must hold:
//  - Every posted operation becomes exactly one answer. libnbd answers what it can; what is in
//    flight when the handle dies or is closed, we answer as lost.
//  - Buffers and payloads outlive libnbd's use of them: until completion, or until nbd_close.
//  - The direction is read anew after every call into libnbd; there is at most one read wait and
//  one
//    write wait; notify_read is called only when the socket is readable.
//  - libnbd's callbacks run under its lock: they only note what happened.
//  - A server that hangs does not hang us: with requests in flight, something must move (bytes come in,
//    bytes leave our kernel) within the answer timeout, or the connection ends. Slow is not hung.
//  - Asio watches a duplicate of the descriptor, because libnbd closes its own when it likes; the
//    duplicate is closed before the handle, always (rule 8).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>

#include "mirror/events.hpp"
#include "transport/dial.hpp"
#include "transport/elsewhere.hpp"

struct nbd_handle;

namespace nbdferry::transport {

// What the server told us in the handshake.
struct Offer {
  mirror::TargetInfo info;
  bool multi_conn = false;
  bool can_fast_zero = false;
  bool knows_session = false;  // asked by a probe: the server has living connections of it
};

struct Answer {
  mirror::TargetDone done;
  std::uint64_t sequence = 0;    // as given to post()
  std::uint64_t cost = 0;        // what it counted for while it was in flight
  std::uint64_t sent_bytes = 0;  // data that travelled to the server
  bool wrote = false;            // changed something there
  Duration latency{};            // of small requests that were answered; else zero
};

class CertificateCheck;
class Connection;

// Told from the executor only, never from inside a member function of Connection.
class ConnectionOwner {
 public:
  virtual void on_ready(Connection& connection) = 0;
  virtual void on_answers(Connection& connection) = 0;
  // The last call. All answers are there to be taken.
  virtual void on_ended(Connection& connection, const std::string& reason) = 0;

 protected:
  ~ConnectionOwner() = default;
};

struct ConnectionOptions {
  Endpoint endpoint;
  std::string migration_id;    // empty: we are no migration
  std::string session;         // of it: the connections that live together
  bool probe = false;          // claims nothing: asks whether the server knows the session
  Duration connect_timeout{};  // for dialling and handshaking together
  Duration answer_timeout{};   // with requests in flight, nothing moving for so long is the end
};

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  using Clock = std::chrono::steady_clock;

  // `owner` must live until on_ended was called or close() has returned.
  Connection(const boost::asio::any_io_executor& executor, ConnectionOptions options,
             ConnectionOwner& owner);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  void open();
  // `now`: from the clock, not long ago.
  void post(mirror::DiskOp&& op, std::uint64_t sequence, Clock::time_point now);
  // What is posted in between leaves in as few packets as hold it, whole ones at once.
  void cork();
  void uncork();
  // Lets go at once: politely when nothing is in flight, else with a reset. The owner isn't called
  // any more; the answers (lost) can be taken.
  void close();

  void take_answers(std::vector<Answer>& out);

  [[nodiscard]] bool is_ready() const { return stage_ == Stage::ready && !dead_; }
  // From the next look on.
  void set_answer_timeout(Duration timeout) { options_.answer_timeout = timeout; }
  // Did it end because the server hung?
  [[nodiscard]] bool hung() const { return hung_; }
  [[nodiscard]] const Offer& offer() const { return offer_; }  // once ready
  [[nodiscard]] std::uint32_t ops() const { return ops_; }     // in flight
  [[nodiscard]] std::uint64_t cost() const { return cost_; }   // of what is in flight, about bytes

 private:
  enum class Stage : std::uint8_t { dialling, handshaking, ready, ended };
  struct Flight;

  void on_dialled(int fd, const std::string& error);
  void on_timeout();
  void watch_answers();
  void check_answers();
  int unsent_bytes();
  std::string start_handshake(int fd);
  bool add_private_contexts();
  void learn_offer();
  std::string handshake_failed(std::string_view why) const;
  std::string why_dead() const;
  bool doubts_certificate() const;
  void ask_for_certificate();

  void on_readable();
  void on_writable();
  void read_some();
  void write_some();
  bool is_now(short events);  // POLLIN or POLLOUT
  void write_elsewhere();
  void on_back();
  void wait_as_directed();
  void progress();
  void fail(const std::string& reason);
  void let_go();
  void shut();

  Flight& take_flight(mirror::DiskOp&& op, std::uint64_t sequence, Clock::time_point now);
  void send(Flight& flight);
  std::int64_t issue(Flight& flight);
  void collect();
  void answer(Flight& flight, IoError error, Clock::time_point now);

  ConnectionOptions options_;
  ConnectionOwner* owner_;
  boost::asio::any_io_executor executor_;
  boost::asio::steady_timer timer_;
  boost::asio::posix::stream_descriptor watched_;
  std::shared_ptr<Dial> dial_;
  std::shared_ptr<CertificateCheck> certificate_check_;  // the handshake has failed, and we ask why
  nbd_handle* handle_ = nullptr;
  std::string tls_files_;  // their version before the handshake
  Stage stage_ = Stage::dialling;
  bool dead_ = false;  // libnbd's handle is finished; we have not said so yet
  bool hung_ = false;
  bool reading_ = false;  // a wait is pending
  bool writing_ = false;
  bool progress_posted_ = false;
  bool corked_ = false;
  Elsewhere elsewhere_;           // while it is busy, the handle and completed_ are not ours
  std::vector<Flight*> to_send_;  // posted meanwhile
  std::string died_elsewhere_;    // libnbd's reason, which it keeps for each thread
  bool moved_ =
      false;  // bytes came in or went out, or a first request was sent, since the last check
  int unsent_bytes_ = 0;          // in our kernel, at the last check
  Clock::time_point moved_at_{};  // as far as checks can tell

  Offer offer_;
  std::vector<std::unique_ptr<Flight>>
      flights_;  // all, in use or idle; as many as ever were in use
  std::vector<Flight*> idle_;
  std::vector<Flight*> completed_;  // filled by libnbd's callbacks
  std::vector<Answer> answers_;
  std::uint32_t ops_ = 0;
  std::uint64_t cost_ = 0;
};

}  // namespace nbdferry::transport
