// Server: accepts guests' connections on unix and TCP sockets and keeps their sessions.
//
// What must hold:
//  - At most limits::connections_max sessions are open.
//  - Rule 8's front: before what a session has received is taken as requests, every other one whose
//    peer has hung up is settled. A client with several connections that loses one of them says
//    the lost writes again on another, then newer ones: the old ones must not come after these.
//    (A hang-up that the network has not told us of yet is beyond anybody's reach.)
//  - The bytes in flight are shared by all clients, in equal parts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <boost/asio/io_context.hpp>

#include "proxy/front.hpp"
#include "proxy/hangup_watch.hpp"
#include "proxy/session.hpp"
#include "proxy/unique_fd.hpp"

namespace nbdferry::proxy {

class Server final : private SessionOwner {
 public:
  // The first of `fronts` (at least one) is the default export. They must outlive the server.
  Server(boost::asio::io_context& io, std::vector<Front*> fronts);
  // Closes what is open, at once. Not from inside a Front.
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Both throw std::runtime_error ("what failed: why"). A stale unix socket is replaced, a living
  // one is not. The socket's file is removed by stop().
  void listen_unix(const std::string& path, unsigned mode = 0600);
  // On every address of `host`; port 0: any free one.
  void listen_tcp(const std::string& host, std::uint16_t port);
  // Of the first TCP socket; 0 without one.
  [[nodiscard]] std::uint16_t bound_port() const { return bound_port_; }

  // Serves a connected stream socket; `peer` names it in log lines.
  void serve(UniqueFd socket, std::string peer);

  // No new connections from now on.
  void stop();
  // Takes no new requests, and calls `done` when the outstanding ones are answered and all sessions
  // are closed; not before this returns. After stop(); once.
  void close_sessions(std::function<void()> done);

  [[nodiscard]] std::size_t sessions() const { return sessions_.size(); }

 private:
  class Acceptor;

  void before_requests(Session& session) override;
  [[nodiscard]] std::uint64_t bytes_share() const override;
  void session_closed(Session& session) override;
  void settle_hung_up(const Session* but);
  void call_when_idle();

  boost::asio::io_context& io_;
  std::vector<Front*> fronts_;
  std::vector<std::shared_ptr<Acceptor>> acceptors_;
  HangupWatch hangups_;
  std::vector<std::shared_ptr<Session>> sessions_;  // oldest first
  std::uint16_t bound_port_ = 0;
  std::function<void()> on_idle_;
};

}  // namespace nbdferry::proxy
