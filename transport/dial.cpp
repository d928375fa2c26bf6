// Making sockets for the target. Rule 8 is why they are made here: a connection that we give up
// must not go on delivering what our kernel has queued, so TCP sockets are closed with a reset, and
// a silent peer is given up after a known time.
#include "transport/dial.hpp"

#include <vector>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/connect.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <fmt/format.h>

namespace nbdferry::transport {

namespace {

constexpr int user_timeout_ms = 30'000;         // sent data that nobody acknowledges: give up
constexpr int keepalive_idle_s = 10;            // a silent peer is probed after this time …
constexpr int keepalive_interval_s = 5;         // … this often …
constexpr int keepalive_probes = 4;             // … and given up after so many
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
  set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, user_timeout_ms);
  set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(fd, IPPROTO_TCP, TCP_KEEPIDLE, keepalive_idle_s);
  set(fd, IPPROTO_TCP, TCP_KEEPINTVL, keepalive_interval_s);
  set(fd, IPPROTO_TCP, TCP_KEEPCNT, keepalive_probes);
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
    connect({boost::asio::local::stream_protocol::endpoint(endpoint_.socket_path)});
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
        std::vector<Protocol::endpoint> addresses;
        for (const auto& entry : results) addresses.emplace_back(entry.endpoint());
        self->connect(addresses);
      });
}

void Dial::connect(const std::vector<Protocol::endpoint>& addresses) {
  if (!done_) return;
  // The addresses must outlive the operation, hence the shared copy.
  auto kept = std::make_shared<std::vector<Protocol::endpoint>>(addresses);
  boost::asio::async_connect(
      socket_, kept->begin(), kept->end(),
      [self = shared_from_this(), kept](const boost::system::error_code& error, auto) {
        if (error) {
          self->finish(-1, fmt::format("cannot connect: {}: {}", error.message(), check_address));
          return;
        }
        // Without Asio's registration, so that libnbd can have the descriptor for itself.
        const int fd = self->socket_.release();
        set_options(fd, self->endpoint_.is_unix());
        self->finish(fd, {});
      });
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
