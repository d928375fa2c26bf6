// What the NBD server's tests stand on: an export in memory that can be told to hold, delay or fail
// requests, a server in a thread of its own, and a raw client that can say anything.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>

#include "proxy/front.hpp"
#include "proxy/listener.hpp"
#include "proxy/nbd_protocol.hpp"
#include "proxy/unique_fd.hpp"

namespace nbdferry::proxy::test {

using Bytes = std::vector<std::byte>;

// A disk in memory. Everything in it belongs to the server's thread.
class MemoryFront final : public Front {
 public:
  enum class When : std::uint8_t {
    at_once,  // from inside submit()
    posted,   // from a later turn of the loop
    held,     // when release() says so
  };

  MemoryFront(boost::asio::io_context& io, std::uint64_t size, std::string name = "");

  [[nodiscard]] const ExportInfo& info() const override { return info_; }
  std::uint32_t attach(ReplySink& sink, const Migrant& migrant) override;
  void detach(std::uint32_t session) override { sinks_.erase(session); }
  [[nodiscard]] bool knows_migration(std::string_view migration) const override {
    return !known_migration.empty() && migration == known_migration;
  }
  [[nodiscard]] bool holds_migration(std::string_view migration) const override {
    return !holding.empty() && migration == holding;
  }
  [[nodiscard]] bool knows_session(std::string_view session) const override {
    return std::find(sessions.begin(), sessions.end(), session) != sessions.end();
  }
  [[nodiscard]] bool may_write(std::uint32_t /*session*/) const override { return writes_allowed; }
  void submit(mirror::GuestRequest&& request) override;

  // Executes and answers what was held.
  void release();
  void fence_all();

  When when = When::at_once;
  std::map<Command, IoError> failures;  // answered instead of executing
  bool writes_allowed = true;
  std::string known_migration;
  std::vector<std::string> migrations;     // as attached
  std::vector<std::string> sessions;       // likewise
  std::string holding;                     // what it holds: a migration's name
  std::vector<mirror::GuestRequest> seen;  // without payloads, when `keep_seen`
  bool keep_seen = true;
  std::deque<mirror::GuestRequest> held;
  Bytes data;
  ExportInfo info_;
  [[nodiscard]] std::size_t attached() const { return sinks_.size(); }

 private:
  void execute(mirror::GuestRequest&& request);
  [[nodiscard]] std::vector<Extent> extents(const ByteRange& range) const;

  boost::asio::io_context& io_;
  std::map<std::uint32_t, ReplySink*> sinks_;
  std::uint32_t last_session_ = 0;
};

// A server on a unix socket and a TCP port, in a thread.
class ServerThread {
 public:
  explicit ServerThread(std::uint64_t size, std::string name = "");
  ~ServerThread();
  ServerThread(const ServerThread&) = delete;
  ServerThread& operator=(const ServerThread&) = delete;

  // Runs `f` on the server's thread and returns its result.
  template <typename F>
  auto on_loop(F f) {
    std::packaged_task<decltype(f())()> task(std::move(f));
    auto result = task.get_future();
    boost::asio::post(io, [&task] { task(); });
    return result.get();
  }
  // Waits until `f`, on the server's thread, is true; false after `seconds`.
  [[nodiscard]] bool eventually(const std::function<bool()>& f, double seconds = 5);

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] std::uint16_t port() const { return port_; }
  [[nodiscard]] std::string uri(const std::string& name = "") const {
    return "nbd+unix:///" + name + "?socket=" + path_;
  }

  boost::asio::io_context io{1};
  MemoryFront front;
  std::unique_ptr<Server> server;

 private:
  std::string dir_;
  std::string path_;
  std::uint16_t port_ = 0;
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_;
  std::thread thread_;
};

struct OptionAnswer {
  std::uint32_t option = 0;
  std::uint32_t type = 0;
  std::string data;
};

// A reply message: simple (chunk < 0) or structured.
struct RawReply {
  int chunk = -1;
  std::uint16_t flags = 0;
  std::uint32_t error = 0;
  std::uint64_t cookie = 0;
  std::string body;
};

// Blocking; throws std::runtime_error when the server says nothing for five seconds ("timeout") or
// has closed ("closed").
class RawClient {
 public:
  static RawClient unix_socket(const std::string& path);
  static RawClient tcp(std::uint16_t port);
  explicit RawClient(UniqueFd socket) : socket_(std::move(socket)) {}

  void send(std::string_view bytes);
  [[nodiscard]] std::string receive(std::size_t bytes);
  // The server has closed: nothing comes any more.
  [[nodiscard]] bool is_closed();
  void shut_down_sending();
  void close() { socket_ = UniqueFd(); }
  [[nodiscard]] int fd() const { return socket_.get(); }

  // Handshake.
  void greet(std::uint32_t flags = 3);  // reads the greeting, sends client flags
  void send_option(std::uint32_t option, std::string_view data);
  [[nodiscard]] OptionAnswer option_answer();
  // Sends an option and collects the answers up to the final one.
  [[nodiscard]] std::vector<OptionAnswer> option(std::uint32_t option, std::string_view data = {});
  // Greeting to transmission. `contexts` implies structured replies.
  void go(bool structured = false, const std::vector<std::string>& contexts = {},
          const std::string& name = "");

  // Transmission.
  void send_request(nbd::RequestType type, std::uint64_t offset, std::uint32_t length,
                    std::uint16_t flags = 0, std::string_view payload = {},
                    std::uint64_t cookie = 0);
  // `read_bytes`: how much data a successful simple reply carries.
  [[nodiscard]] RawReply reply(std::size_t read_bytes = 0);
  // One request, one reply.
  [[nodiscard]] RawReply ask(nbd::RequestType type, std::uint64_t offset, std::uint32_t length,
                             std::uint16_t flags = 0, std::string_view payload = {});

 private:
  UniqueFd socket_;
  std::uint64_t last_cookie_ = 0x1000;
};

// A number as it goes over the wire.
template <typename T>
std::string wire(T value) {
  std::string bytes(sizeof value, '\0');
  nbd::store(reinterpret_cast<std::byte*>(bytes.data()), value);
  return bytes;
}
template <typename T>
T unwire(std::string_view bytes) {
  return nbd::load<T>(reinterpret_cast<const std::byte*>(bytes.data()));
}
[[nodiscard]] std::string info_request(const std::string& name,
                                       std::vector<std::uint16_t> infos = {});
[[nodiscard]] std::string context_request(const std::string& name,
                                          const std::vector<std::string>& queries);
[[nodiscard]] std::string request_header(nbd::RequestType type, std::uint64_t offset,
                                         std::uint32_t length, std::uint16_t flags = 0,
                                         std::uint64_t cookie = 0);

// Output and exit status of a shell command that is ended after `seconds`.
struct CommandResult {
  int status = -1;
  std::string output;
};
[[nodiscard]] CommandResult run_command(const std::string& command, int seconds = 60);

}  // namespace nbdferry::proxy::test
