// Session: one client's connection, from the greeting to the last reply. It parses and checks
// requests, hands them to the export (Front) and sends the replies.
//
// A connection is in one of these phases, and only ever moves down:
//   handshake     options are negotiated (handshake.hpp), within a time limit
//   transmission  requests are taken, many per turn of the loop
//   finishing     no more requests are taken (DISC, or the server stops); outstanding ones are
//                 answered, then the connection closes
//   closed        detached from the export, the socket closed
//
// What must hold:
//  - Each request that is handed over has a slot until the export answers it, and counts against
//  the
//    client's limits (limits.hpp) until its reply has left. At a limit the socket is not read.
//  - The export may answer from inside submit(): a reply is encoded and perhaps sent there, and
//    nothing else. Whatever may end the session or take more input waits for the end of the turn.
//  - Rule 8: when the peer has hung up, either all that it left unread is admitted at once, because
//    it ends in a DISC, or none of it is. And nothing that was received is admitted before the owner
//    has settled the others that had hung up by then.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>

#include "mirror/events.hpp"
#include "mirror/payload.hpp"
#include "proxy/front.hpp"
#include "proxy/handshake.hpp"
#include "proxy/input_buffer.hpp"
#include "proxy/nbd_protocol.hpp"
#include "proxy/nbd_request.hpp"
#include "proxy/reply_queue.hpp"
#include "proxy/unique_fd.hpp"

namespace nbdferry::proxy {

class Session;

// Whoever keeps the sessions.
class SessionOwner {
 public:
  // The session has received what may be requests: what other connections have left is to be
  // settled before they are taken (rule 8).
  virtual void before_requests(Session& session) = 0;
  // Of the bytes in flight that all clients share, what a client may have.
  [[nodiscard]] virtual std::uint64_t bytes_share() const = 0;
  // The last call for this session.
  virtual void session_closed(Session& session) = 0;

 protected:
  ~SessionOwner() = default;
};

class Session final : public ReplySink, public std::enable_shared_from_this<Session> {
 public:
  // Owned by shared pointers; `peer` names the client in log lines. `fronts` and `owner` must
  // outlive the session's being open.
  Session(boost::asio::io_context& io, UniqueFd socket, std::string peer,
          const std::vector<Front*>& fronts, SessionOwner& owner);
  ~Session() override;

  void start();
  [[nodiscard]] const std::string& peer() const { return peer_; }
  // The peer has hung up: admits or drops what it left (rule 8). Not from inside the Front.
  void settle_hung_up();
  // Takes no more requests; closes when the outstanding ones are answered. Not from inside the
  // Front.
  void finish();
  // Closes now. Not from inside the Front.
  void close();

  void reply(mirror::Reply&& reply) override;
  void fence() override;

 private:
  enum class Phase : std::uint8_t { handshake, transmission, finishing, closed };
  enum class Received : std::uint8_t { some, nothing, ended };

  // A request that the export works on.
  struct Slot {
    nbd::Request request;
    bool open = false;
  };
  // A write whose payload is received in place.
  struct LargeWrite {
    nbd::Request request;
    Buffer buffer;
    std::size_t filled = 0;
    [[nodiscard]] bool under_way() const { return buffer.size() > 0; }
    [[nodiscard]] std::size_t missing() const { return buffer.size() - filled; }
  };

  // Input.
  void turn();
  [[nodiscard]] bool wants_input() const;
  [[nodiscard]] Received receive();
  void parse();
  void negotiate();
  void enter_transmission();
  void parse_requests();
  [[nodiscard]] bool take_request();
  [[nodiscard]] bool fill_large_write();
  [[nodiscard]] bool within_limits(const nbd::Request& request) const;
  [[nodiscard]] bool may_go_on() const;
  [[nodiscard]] IoError check(const nbd::Request& request);
  void admit(const nbd::Request& request, Payload payload);
  void settle();

  // Output.
  void refuse(const nbd::Request& request, IoError error);
  void answer(const nbd::Request& request, mirror::Reply&& reply, Credit credit);
  void answer_read(const nbd::Request& request, Payload data, Credit credit);
  void answer_block_status(const nbd::Request& request, const mirror::Reply& reply, Credit credit);
  void push(const MessageHead& head, Payload payload, Credit credit);
  void send();
  void take_back(const Credit& credit);

  // Between turns.
  void end_turn();
  void run();
  void schedule();
  void wait_readable();
  void wait_writable();
  void drop(std::string_view why);

  SessionOwner* owner_;
  boost::asio::posix::stream_descriptor socket_;
  const std::string peer_;
  Phase phase_ = Phase::handshake;

  Handshake handshake_;
  boost::asio::steady_timer deadline_;  // of the handshake; of finishing, when the server stops
  Front* front_ = nullptr;              // from transmission on
  std::uint32_t number_ = 0;            // the export's number for this session
  nbd::Rights rights_;
  bool allocation_ = false;                      // contexts in BLOCK_STATUS replies …
  std::vector<std::uint32_t> private_contexts_;  // … and their ids
  bool checksums_ = false;                       // one of these is of them

  InputBuffer input_;
  LargeWrite large_write_;
  std::uint64_t skip_bytes_ = 0;  // of a refused write's payload
  std::vector<Slot> slots_;
  std::vector<std::uint32_t> free_slots_;
  Credit in_flight_;
  std::uint64_t requests_taken_ = 0;  // ever
  ReplyQueue replies_;

  bool in_turn_ = false;    // end_turn() will follow
  bool scheduled_ = false;  // run() is posted
  bool waiting_readable_ = false;
  bool waiting_writable_ = false;
  bool more_to_receive_ = false;  // the turn ended before the socket was empty
  bool at_limit_ = false;         // input waits for replies to leave
  bool last_words_ = false;       // the peer has hung up after a DISC: limits don't hold it up
  bool broken_ = false;           // the peer does not take replies any more
  bool fenced_ = false;
};

}  // namespace nbdferry::proxy
