// What the transport tests share: real servers as child processes, scripted peers on a plain
// socket, and a driver that runs a Target and notes its events. Everything is bounded in time and
// ends with its object: processes are killed by pid, directories removed.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <sys/types.h>

#include <boost/asio/io_context.hpp>

#include "mirror/events.hpp"
#include "transport/target.hpp"

namespace nbdferry::test {

using namespace std::chrono_literals;

class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  [[nodiscard]] std::string path(const std::string& name) const { return dir_ + "/" + name; }
  std::string file(const std::string& name, std::uint64_t size) const;

 private:
  std::string dir_;
};

// A listening socket on the loopback, for a server that takes it over (systemd's socket activation,
// so that there is no race for a port) or for a scripted peer.
class Listener {
 public:
  explicit Listener(std::uint16_t port = 0);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;
  [[nodiscard]] int fd() const { return fd_; }
  [[nodiscard]] std::uint16_t port() const { return port_; }
  [[nodiscard]] std::string uri(const std::string& name = {}) const;
  void close();

 private:
  int fd_ = -1;
  std::uint16_t port_ = 0;
};

class Process {
 public:
  // With a listener, the server gets it as descriptor 3 and we close ours.
  explicit Process(const std::vector<std::string>& command, Listener* listener = nullptr);
  ~Process() { kill(); }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  void kill();  // SIGKILL, and waits
  void wait();  // for its own end

 private:
  pid_t pid_ = -1;
};

// A server that puts itself into the background and writes down its pid.
class Daemon {
 public:
  Daemon(const std::vector<std::string>& command, const std::string& pid_file);
  ~Daemon();
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

 private:
  pid_t pid_ = -1;
};

// One end of a connection that a Target made, driven by hand. Speaks the old-style handshake, which
// is a single message, so that the script stays short.
class Peer {
 public:
  struct Request {
    std::uint16_t flags = 0;
    std::uint16_t type = 0;
    std::uint64_t cookie = 0;
    std::uint64_t offset = 0;
    std::uint32_t length = 0;
  };
  explicit Peer(int fd) : fd_(fd) {}
  ~Peer() { close(); }
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;
  void close();
  void send(const std::string& bytes);
  void send_hello(std::uint64_t size, std::uint16_t flags);
  [[nodiscard]] static std::string reply(const Request& request, std::uint32_t error = 0);
  void send_reply(const Request& request, std::uint32_t error = 0);
  // Takes in what has arrived; a complete request, if there is one.
  std::optional<Request> next();
  // "" while open, "end" after a FIN, "reset" after an RST (rule 8).
  [[nodiscard]] const std::string& ending();

 private:
  void receive();
  int fd_;
  std::string input_;
  std::string ending_;
};

inline constexpr std::uint16_t flags_plain = 0x0001 | 0x0004 | 0x0008;  // has, flush, FUA
inline constexpr std::uint16_t flags_multi = flags_plain | 0x0100;
inline constexpr std::uint32_t error_shutdown = 108;
inline constexpr std::uint16_t cmd_write = 1, cmd_disc = 2, cmd_flush = 3;

// A Target, its loop, and what it said.
class Driver {
 public:
  explicit Driver(transport::TargetConfig config);
  Driver(const std::string& uri, std::uint64_t size_wanted = 0);

  // Runs the loop until it holds; false when it doesn't within the time.
  bool until(const std::function<bool()>& condition, std::chrono::milliseconds limit = 10s);
  // The same, while it writes as much as 32 pieces of 64 KiB at a time, to a disk of 8 MiB.
  bool write_until(const std::function<bool()>& condition, std::chrono::milliseconds limit = 10s);
  void run_for(std::chrono::milliseconds time);
  std::unique_ptr<Peer> accept(const Listener& listener);
  std::optional<Peer::Request> request(Peer& peer);

  bool open();  // until up or refused; true: up
  OpId submit(mirror::DiskOp op);
  OpId write(std::uint64_t offset, std::size_t size, char fill, bool fua = false);
  // Submits and waits for the answer.
  mirror::TargetDone call(mirror::DiskOp op);
  [[nodiscard]] const mirror::TargetDone* done(OpId id) const;
  [[nodiscard]] std::size_t unanswered() const { return submitted_ - done_.size(); }
  [[nodiscard]] unsigned connections(std::size_t path = 0) const {
    return target->paths()[path].connections;
  }
  [[nodiscard]] std::string state(std::size_t path) const { return target->paths()[path].state; }

  boost::asio::io_context io{1};
  std::unique_ptr<transport::Target> target;
  std::function<void(const mirror::Event&)> on_event;  // besides what is noted below

  std::vector<std::string> log;  // "up", "window", "lost", "refused", "closed", in their order
  mirror::TargetInfo info;
  std::uint32_t window_ops = 0;
  std::string reason;  // of the last lost or refused, of a path, too
  std::vector<mirror::PathFound> found;
  bool unflushed = false;  // of the last path that was lost

  [[nodiscard]] std::size_t count(const std::string& what) const;

 private:
  void note(mirror::Event&& event);
  std::map<OpId, mirror::TargetDone> done_;
  std::size_t submitted_ = 0;
  std::uint64_t next_id_ = 1;
};

[[nodiscard]] mirror::DiskOp make_op(Command command, std::uint64_t begin = 0,
                                     std::uint64_t length = 0);
[[nodiscard]] Payload filled(std::size_t size, char fill);
// Until a unix socket accepts connections.
bool wait_for_socket(const std::string& path);

}  // namespace nbdferry::test
