// Server: accepts guests' connections and keeps their sessions.
#include "proxy/listener.hpp"

#include <algorithm>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <utility>

#include <netinet/tcp.h>
#include <sys/socket.h>

#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ip/v6_only.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>

#include "mirror/assert.hpp"
#include "proxy/limits.hpp"
#include "proxy/log.hpp"
#include "proxy/unix_socket.hpp"

namespace nbdferry::proxy {
namespace {

using boost::asio::ip::tcp;
using boost::asio::local::stream_protocol;

std::string peer_of(const tcp::socket& socket) {
  boost::system::error_code error;
  const auto endpoint = socket.remote_endpoint(error);
  if (error) return "(already gone)";
  return fmt::format("{}:{}", endpoint.address().to_string(), endpoint.port());
}

std::string peer_of(const stream_protocol::socket& socket) {
  const auto peer = unix_peer(const_cast<stream_protocol::socket&>(socket).native_handle());
  return peer ? fmt::format("with pid {}", peer->pid) : "(already gone)";
}

void tune(tcp::socket& socket) {
  boost::system::error_code ignored;
  socket.set_option(tcp::no_delay(true), ignored);
  // A peer that vanished is noticed even when nothing is to be sent.
  socket.set_option(boost::asio::socket_base::keep_alive(true), ignored);
}

void tune(stream_protocol::socket& socket) {
  // The system's limit is overridden where we may, kept to elsewhere.
  const int bytes = limits::unix_send_buffer_bytes;
  const int fd = socket.native_handle();
  if (::setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes) != 0) {
    ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
  }
}

}  // namespace

// A listening socket; `close()` ends it, whatever is under way.
class Server::Acceptor {
 public:
  virtual ~Acceptor() = default;
  virtual void close() = 0;

  template <typename Protocol>
  class Of;
};

template <typename Protocol>
class Server::Acceptor::Of final : public Acceptor,
                                   public std::enable_shared_from_this<Of<Protocol>> {
 public:
  Of(Server& server, typename Protocol::acceptor acceptor, std::optional<SocketFile> file = {})
      : server_(&server),
        acceptor_(std::move(acceptor)),
        pause_(acceptor_.get_executor()),
        file_(std::move(file)) {}

  void accept() {
    acceptor_.async_accept([self = this->shared_from_this()](boost::system::error_code error,
                                                             typename Protocol::socket socket) {
      self->accepted(error, std::move(socket));
    });
  }

  void close() override {
    server_ = nullptr;
    boost::system::error_code ignored;
    acceptor_.close(ignored);
    pause_.cancel();
    file_.reset();
  }

 private:
  void accepted(boost::system::error_code error, typename Protocol::socket socket) {
    if (server_ == nullptr) return;
    if (error) {
      log("cannot accept a connection: {}", error.message());
      return wait();
    }
    tune(socket);
    std::string peer = peer_of(socket);
    server_->serve(UniqueFd(socket.release(error)), std::move(peer));
    accept();
  }

  // Out of descriptors, perhaps: an error that would be back at once.
  void wait() {
    pause_.expires_after(std::chrono::milliseconds(100));
    pause_.async_wait([self = this->shared_from_this()](boost::system::error_code) {
      if (self->server_ != nullptr) self->accept();
    });
  }

  Server* server_;  // null when closed
  typename Protocol::acceptor acceptor_;
  boost::asio::steady_timer pause_;
  std::optional<SocketFile> file_;
};

Server::Server(boost::asio::io_context& io, std::vector<Front*> fronts)
    : io_(io), fronts_(std::move(fronts)) {
  NBDFERRY_ASSERT(!fronts_.empty(), "a server has at least one export");
}

Server::~Server() {
  stop();
  on_idle_ = nullptr;
  const auto sessions = sessions_;
  for (const auto& session : sessions) session->close();
}

void Server::listen_unix(const std::string& path, unsigned mode) {
  stream_protocol::acceptor acceptor(io_);
  SocketFile file(acceptor, path, mode);
  auto made =
      std::make_shared<Acceptor::Of<stream_protocol>>(*this, std::move(acceptor), std::move(file));
  made->accept();
  acceptors_.push_back(std::move(made));
}

void Server::listen_tcp(const std::string& host, std::uint16_t port) {
  const auto fail = [&](const boost::system::error_code& error) {
    throw std::runtime_error(
        fmt::format("cannot listen on {}:{}: {}", host, port, error.message()));
  };
  boost::system::error_code error;
  tcp::resolver resolver(io_);
  const auto found = resolver.resolve(host, std::to_string(port), tcp::resolver::passive, error);
  if (error) fail(error);
  for (const auto& entry : found) {
    tcp::endpoint endpoint = entry.endpoint();
    // All addresses of a name share the port that the first one got.
    if (port == 0) endpoint.port(bound_port_);
    tcp::acceptor acceptor(io_);
    acceptor.open(endpoint.protocol(), error);
    if (!error) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
    if (!error && endpoint.address().is_v6()) {
      acceptor.set_option(boost::asio::ip::v6_only(true), error);
    }
    if (!error) acceptor.bind(endpoint, error);
    if (!error) acceptor.listen(boost::asio::socket_base::max_listen_connections, error);
    if (error) fail(error);
    if (bound_port_ == 0) bound_port_ = acceptor.local_endpoint().port();
    auto made = std::make_shared<Acceptor::Of<tcp>>(*this, std::move(acceptor));
    made->accept();
    acceptors_.push_back(std::move(made));
  }
}

void Server::serve(UniqueFd socket, std::string peer) {
  settle_hung_up(nullptr);  // makes room, too
  if (sessions_.size() >= limits::connections_max) {
    log("client {}: refused: {} connections are open, which is the limit", peer, sessions_.size());
    return;
  }
  const int fd = socket.get();
  SessionOwner& owner = *this;
  auto session = std::make_shared<Session>(io_, std::move(socket), std::move(peer), fronts_, owner);
  sessions_.push_back(session);
  if (!hangups_.add(fd, *session)) {
    log("client {}: refused: the system watches no more connections", session->peer());
    return session->close();
  }
  session->start();
}

void Server::before_requests(Session& session) {
  if (sessions_.size() > 1) settle_hung_up(&session);
}

void Server::settle_hung_up(const Session* but) {
  const auto found = hangups_.hung_up();
  if (found.empty()) return;
  // Settling may close sessions, which takes them out of the list.
  const auto sessions = sessions_;
  for (Session* session : found) {
    if (session != but) session->settle_hung_up();
  }
}

std::uint64_t Server::bytes_share() const {
  return limits::bytes_in_flight_max / std::max<std::size_t>(sessions_.size(), 1);
}

void Server::session_closed(Session& session) {
  const auto found = std::find_if(sessions_.begin(), sessions_.end(),
                                  [&](const auto& s) { return s.get() == &session; });
  NBDFERRY_ASSERT(found != sessions_.end(), "a session closes once");
  sessions_.erase(found);
  call_when_idle();
}

void Server::stop() {
  for (const auto& acceptor : acceptors_) acceptor->close();
  acceptors_.clear();
}

void Server::close_sessions(std::function<void()> done) {
  const auto sessions = sessions_;
  for (const auto& session : sessions) session->finish();
  on_idle_ = std::move(done);
  call_when_idle();
}

void Server::call_when_idle() {
  if (!on_idle_ || !sessions_.empty()) return;
  boost::asio::post(io_, std::exchange(on_idle_, nullptr));
}

}  // namespace nbdferry::proxy
