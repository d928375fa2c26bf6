// A long link: relays TCP connections, delays each direction, and limits the rate of all of them together, as
// one wire between the two ends would.
//
//   relay --to HOST:PORT [--delay 75ms] [--rate BYTES] [--queue 50ms] [--listen HOST:PORT]
//
// Prints the port that it listens on, then runs until it is killed. Each direction is a wire of its own: bytes
// leave one after another at the rate, wait in a queue before that (as long as `queue`: then nothing more is
// read, and the sender's window closes), and arrive `delay` later. TCP ends here on both sides, so what a long
// link does to TCP's own windows is not seen; what requests in flight can do about it is.
//
// One thread. A connection's end travels like its bytes; a reset ends the other side at once.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/connect.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <fmt/format.h>

namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using Clock = std::chrono::steady_clock;
using boost::system::error_code;

constexpr std::size_t chunk_bytes = 64 * 1024;

struct Link {
  Clock::duration delay{};
  double bytes_per_second = 0;  // 0: no limit
  Clock::duration queue{};
};

// One direction of the link, shared by all connections.
class Wire {
 public:
  explicit Wire(const Link& link) : link_(link) {}

  // When bytes that are sent now arrive at the other end.
  Clock::time_point send(std::size_t bytes) {
    free_at_ = std::max(free_at_, Clock::now());
    if (link_.bytes_per_second > 0) {
      free_at_ += std::chrono::duration_cast<Clock::duration>(
          std::chrono::duration<double>(static_cast<double>(bytes) / link_.bytes_per_second));
    }
    return free_at_ + link_.delay;
  }
  // When the queue has room again; in the past if it has.
  [[nodiscard]] Clock::time_point has_room_at() const { return free_at_ - link_.queue; }

 private:
  Link link_;
  Clock::time_point free_at_{};
};

// What is on its way in one direction of a connection.
struct Flow {
  explicit Flow(const asio::any_io_executor& executor) : changed(executor) {}
  struct Chunk {
    std::vector<char> bytes;  // empty: the end
    Clock::time_point arrives;
  };
  std::deque<Chunk> chunks;
  asio::steady_timer changed;  // cancelled when there is a chunk
};

struct Pair {
  Pair(tcp::socket client_side, const asio::any_io_executor& executor)
      : client(std::move(client_side)), server(executor), up(executor), down(executor) {}
  tcp::socket client, server;
  Flow up, down;

  // Gone at once, as with a reset.
  void drop() {
    error_code ignored;
    for (tcp::socket* s : {&client, &server}) {
      s->set_option(asio::socket_base::linger(true, 0), ignored);
      s->close(ignored);
    }
    up.changed.cancel();
    down.changed.cancel();
  }
};

// By value: a coroutine keeps its own.
asio::awaitable<void> take(std::shared_ptr<Pair> pair, tcp::socket* from, Flow* flow, Wire* wire) {
  asio::steady_timer pause(from->get_executor());
  for (;;) {
    error_code error;
    auto wait = asio::redirect_error(asio::use_awaitable, error);
    if (const auto at = wire->has_room_at(); at > Clock::now()) {
      pause.expires_at(at);
      co_await pause.async_wait(wait);
    }
    std::vector<char> bytes(chunk_bytes);
    const std::size_t n = co_await from->async_read_some(asio::buffer(bytes), wait);
    if (error && error != asio::error::eof) {
      pair->drop();
      co_return;
    }
    bytes.resize(n);
    flow->chunks.push_back({std::move(bytes), wire->send(n)});
    flow->changed.cancel();
    if (error) co_return;
  }
}

asio::awaitable<void> give(std::shared_ptr<Pair> pair, tcp::socket* to, Flow* flow) {
  asio::steady_timer pause(to->get_executor());
  for (;;) {
    error_code error;
    auto wait = asio::redirect_error(asio::use_awaitable, error);
    while (flow->chunks.empty() && to->is_open()) {
      flow->changed.expires_at(Clock::time_point::max());
      co_await flow->changed.async_wait(wait);
    }
    if (!to->is_open()) co_return;
    Flow::Chunk chunk = std::move(flow->chunks.front());
    flow->chunks.pop_front();
    if (chunk.arrives > Clock::now()) {
      pause.expires_at(chunk.arrives);
      co_await pause.async_wait(wait);
    }
    if (chunk.bytes.empty()) {
      to->shutdown(tcp::socket::shutdown_send, error);
      co_return;
    }
    co_await asio::async_write(*to, asio::buffer(chunk.bytes), wait);
    if (error) {
      pair->drop();
      co_return;
    }
  }
}

struct Relay {
  asio::io_context& io;
  tcp::acceptor acceptor;
  tcp::resolver::results_type to;
  Wire up, down;

  asio::awaitable<void> carry(tcp::socket client) {
    const auto executor = io.get_executor();
    const auto pair = std::make_shared<Pair>(std::move(client), executor);
    error_code error;
    co_await asio::async_connect(pair->server, to,
                                 asio::redirect_error(asio::use_awaitable, error));
    if (error) {
      pair->drop();
      co_return;
    }
    pair->client.set_option(tcp::no_delay(true), error);
    pair->server.set_option(tcp::no_delay(true), error);
    asio::co_spawn(executor, take(pair, &pair->client, &pair->up, &up), asio::detached);
    asio::co_spawn(executor, give(pair, &pair->server, &pair->up), asio::detached);
    asio::co_spawn(executor, take(pair, &pair->server, &pair->down, &down), asio::detached);
    asio::co_spawn(executor, give(pair, &pair->client, &pair->down), asio::detached);
  }

  asio::awaitable<void> run() {
    for (;;) {
      tcp::socket client = co_await acceptor.async_accept(asio::use_awaitable);
      asio::co_spawn(io, carry(std::move(client)), asio::detached);
    }
  }
};

std::pair<std::string, std::string> host_and_port(const std::string& text) {
  const auto colon = text.rfind(':');
  if (colon == std::string::npos) throw CLI::ValidationError(text, "HOST:PORT is wanted");
  return {text.substr(0, colon), text.substr(colon + 1)};
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Relays TCP over a link that is long and not fast.");
  std::string listen = "127.0.0.1:0";
  std::string to;
  double delay_ms = 0;
  double queue_ms = 50;
  Link link;
  app.add_option("--listen", listen, "HOST:PORT")->capture_default_str();
  app.add_option("--to", to, "HOST:PORT")->required();
  app.add_option("--delay", delay_ms, "of each direction, milliseconds");
  app.add_option("--rate", link.bytes_per_second, "of each direction, bytes a second");
  app.add_option("--queue", queue_ms, "before the wire, milliseconds")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  using Milliseconds = std::chrono::duration<double, std::milli>;
  link.delay = std::chrono::duration_cast<Clock::duration>(Milliseconds(delay_ms));
  link.queue = std::chrono::duration_cast<Clock::duration>(Milliseconds(queue_ms));
  try {
    asio::io_context io(1);
    tcp::resolver resolver(io);
    const auto [host, port] = host_and_port(listen);
    const auto [to_host, to_port] = host_and_port(to);
    Relay relay{io, tcp::acceptor(io, resolver.resolve(host, port).begin()->endpoint()),
                resolver.resolve(to_host, to_port), Wire(link), Wire(link)};
    fmt::print("{}\n", relay.acceptor.local_endpoint().port());
    std::fflush(stdout);
    asio::co_spawn(io, relay.run(), asio::detached);
    io.run();
  } catch (const std::exception& e) {
    fmt::print(stderr, "relay: {}\n", e.what());
    return 1;
  }
}
