// Making sockets for the target. Rule 8 is why they are made here: a connection that we give up
// must not go on delivering what our kernel has queued, so TCP sockets are closed with a reset, and
// a silent peer is given up after a known time.
#include "transport/dial.hpp"

#include <vector>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <fmt/format.h>

#include "transport/limit_silence.hpp"

namespace nbdferry::transport {

namespace {

constexpr int unix_buffer_bytes = 1024 * 1024;  // the default of 208 KiB stalls large writes

void set(int fd, int level, int name, int value) {
  // Best effort: none of these can fail on a fresh socket, and none is worth refusing a target for.
  (void)::setsockopt(fd, level, name, &value, sizeof value);
}

void set_linger(int fd, int on) {
  const linger value{on, 0};
  (void)::setsockopt(fd, SOL_SOCKET, SO_LINGER, &value, sizeof value);
}

void set_options(int fd, bool is_unix) {
  if (is_unix) {
    set(fd, SOL_SOCKET, SO_SNDBUF, unix_buffer_bytes);
    return;
  }
  set_linger(fd, 1);
  set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  limit_silence(fd);
}

}  // namespace

void let_linger(int fd) { set_linger(fd, 0); }

Dial::Dial(const boost::asio::any_io_executor& executor, Endpoint endpoint, Handler done)
    : endpoint_(std::move(endpoint)),
      done_(std::move(done)),
      resolver_(executor),
      socket_(executor) {}

void Dial::start() {
  if (endpoint_.is_unix()) {
    addresses_ = {boost::asio::local::stream_protocol::endpoint(endpoint_.socket_path)};
    boost::asio::post(socket_.get_executor(),
                      [self = shared_from_this()] { self->try_address(0); });
    return;
  }
  resolver_.async_resolve(
      endpoint_.host, endpoint_.port,
      [self = shared_from_this()](const boost::system::error_code& error,
                                  const boost::asio::ip::tcp::resolver::results_type& results) {
        if (error) {
          self->finish(-1, fmt::format("cannot find host '{}': {}: check its name",
                                       self->endpoint_.host, error.message()));
          return;
        }
        for (const auto& entry : results) self->addresses_.emplace_back(entry.endpoint());
        self->try_address(0);
      });
}

void Dial::try_address(std::size_t index) {
  for (; done_ && index < addresses_.size(); ++index) {
    const auto& to = addresses_[index];
    boost::system::error_code error;
    socket_.close(error);
    if (!endpoint_.via.empty() && !bind(to)) continue;
    socket_.async_connect(to, [self = shared_from_this(), index](boost::system::error_code failed) {
      if (failed) {
        self->error_ = fmt::format("cannot connect: {}: {}", failed.message(), check_address);
        self->try_address(index + 1);
        return;
      }
      // Without Asio's registration, so that libnbd can have the descriptor for itself.
      const int fd = self->socket_.release();
      set_options(fd, self->endpoint_.is_unix());
      self->finish(fd, {});
    });
    return;
  }
  finish(-1, error_);
}

bool Dial::bind(const Protocol::endpoint& to) {
  const boost::asio::ip::tcp::endpoint from(boost::asio::ip::make_address(endpoint_.via), 0);
  boost::system::error_code error;
  if (from.protocol().family() != to.protocol().family()) {
    if (error_.empty()) {
      error_ = fmt::format("cannot connect to '{}' from {}: one is IPv4, the other IPv6",
                           endpoint_.host, endpoint_.via);
    }
    return false;
  }
  socket_.open(to.protocol(), error);
  // The kernel chooses the port when it knows the peer: else there are fewer to choose from.
  if (!error) set(socket_.native_handle(), IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);
  if (!error) socket_.bind(from, error);
  if (!error) return true;
  error_ = fmt::format("cannot bind to {}: {}: is it this host's?", endpoint_.via, error.message());
  return false;
}

void Dial::finish(int fd, const std::string& error) {
  auto done = std::exchange(done_, nullptr);
  if (done) {
    done(fd, error);
  } else if (fd >= 0) {
    ::close(fd);
  }
}

void Dial::cancel() {
  done_ = nullptr;
  resolver_.cancel();
  boost::system::error_code ignored;
  socket_.close(ignored);
}

}  // namespace nbdferry::transport
