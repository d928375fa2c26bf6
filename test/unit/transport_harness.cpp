#include "transport_harness.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <thread>

#include <arpa/inet.h>
#include <endian.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <doctest/doctest.h>

namespace nbdferry::test {

namespace {

void check(bool ok, const char* what) {
  if (!ok) throw std::runtime_error(std::string(what) + ": " + std::strerror(errno));
}

template <typename T>
void append(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

template <typename T>
T extract(const std::string& in, std::size_t at) {
  T value;
  std::memcpy(&value, in.data() + at, sizeof value);
  return value;
}

}  // namespace

TempDir::TempDir() {
  char name[] = "/tmp/nbdferry-unit-XXXXXX";
  check(::mkdtemp(name) != nullptr, "mkdtemp");
  dir_ = name;
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(dir_, ignored);
}

std::string TempDir::file(const std::string& name, std::uint64_t size) const {
  const int fd = ::open(path(name).c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  check(fd >= 0, "open");
  check(::ftruncate(fd, static_cast<off_t>(size)) == 0, "ftruncate");
  ::close(fd);
  return path(name);
}

Listener::Listener(std::uint16_t port) {
  fd_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  check(fd_ >= 0, "socket");
  const int on = 1;
  ::setsockopt(fd_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  check(::bind(fd_, generic, sizeof address) == 0, "bind");
  check(::listen(fd_, 16) == 0, "listen");
  socklen_t length = sizeof address;
  check(::getsockname(fd_, generic, &length) == 0, "getsockname");
  port_ = ntohs(address.sin_port);
}

Listener::~Listener() { close(); }

void Listener::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

std::string Listener::uri(const std::string& name) const {
  return "nbd://127.0.0.1:" + std::to_string(port_) + "/" + name;
}

Process::Process(const std::vector<std::string>& command, Listener* listener) {
  std::vector<char*> argv;
  for (const auto& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  pid_ = ::fork();
  check(pid_ >= 0, "fork");
  if (pid_ == 0) {
    if (listener != nullptr) {
      if (listener->fd() == 3) {
        ::fcntl(3, F_SETFD, 0);  // dup2 to itself would leave it close-on-exec
      } else {
        ::dup2(listener->fd(), 3);
      }
      ::setenv("LISTEN_FDS", "1", 1);
      ::setenv("LISTEN_PID", std::to_string(::getpid()).c_str(), 1);
    }
    ::execvp(argv[0], argv.data());
    ::_exit(127);
  }
  if (listener != nullptr) listener->close();
}

void Process::kill() {
  if (pid_ < 0) return;
  ::kill(pid_, SIGKILL);
  wait();
}

void Process::wait() {
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

Daemon::Daemon(const std::vector<std::string>& command, const std::string& pid_file) {
  Process(command).wait();
  for (int i = 0; i < 500 && pid_ <= 0; ++i) {
    std::this_thread::sleep_for(10ms);
    std::ifstream(pid_file) >> pid_;
  }
  REQUIRE(pid_ > 1);
}

Daemon::~Daemon() {
  if (pid_ > 1) ::kill(pid_, SIGTERM);
}

void Peer::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void Peer::send(const std::string& bytes) {
  check(::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()),
        "send");
}

void Peer::send_hello(std::uint64_t size, std::uint16_t flags) {
  std::string hello = "NBDMAGIC";
  append(hello, htobe64(0x00420281861253));
  append(hello, htobe64(size));
  append(hello, htobe16(0));
  append(hello, htobe16(flags));
  hello.append(124, '\0');
  send(hello);
}

std::string Peer::reply(const Request& request, std::uint32_t error) {
  std::string reply;
  append(reply, htobe32(0x67446698));
  append(reply, htobe32(error));
  append(reply, htobe64(request.cookie));
  return reply;
}

void Peer::send_reply(const Request& request, std::uint32_t error) { send(reply(request, error)); }

void Peer::receive() {
  char buffer[65536];
  while (ending_.empty()) {
    const auto n = ::recv(fd_, buffer, sizeof buffer, MSG_DONTWAIT);
    if (n > 0) {
      input_.append(buffer, static_cast<std::size_t>(n));
    } else if (n == 0) {
      ending_ = "end";
    } else if (errno == EAGAIN) {
      return;
    } else {
      ending_ = errno == ECONNRESET ? "reset" : std::strerror(errno);
    }
  }
}

const std::string& Peer::ending() {
  receive();
  return ending_;
}

std::optional<Peer::Request> Peer::next() {
  receive();
  constexpr std::size_t header = 28;
  if (input_.size() < header) return std::nullopt;
  Request r;
  REQUIRE(be32toh(extract<std::uint32_t>(input_, 0)) == 0x25609513);
  r.flags = be16toh(extract<std::uint16_t>(input_, 4));
  r.type = be16toh(extract<std::uint16_t>(input_, 6));
  r.cookie = be64toh(extract<std::uint64_t>(input_, 8));
  r.offset = be64toh(extract<std::uint64_t>(input_, 16));
  r.length = be32toh(extract<std::uint32_t>(input_, 24));
  const std::size_t whole = header + (r.type == cmd_write ? r.length : 0);
  if (input_.size() < whole) return std::nullopt;
  input_.erase(0, whole);
  return r;
}

Driver::Driver(transport::TargetConfig config) {
  target = transport::Target::create(io.get_executor(), std::move(config),
                                     [this](mirror::Event&& event) { note(std::move(event)); });
}

Driver::Driver(const std::string& uri, std::uint64_t size_wanted)
    : Driver([&] {
        transport::TargetConfig config;
        config.uris = {uri};
        config.size_wanted = size_wanted;
        return config;
      }()) {}

void Driver::note(mirror::Event&& event) {
  if (on_event) on_event(event);
  if (auto* up = std::get_if<mirror::TargetUp>(&event)) {
    log.emplace_back("up");
    info = up->info;
    window_ops = up->window_ops;
  } else if (auto* window = std::get_if<mirror::TargetWindow>(&event)) {
    log.emplace_back("window");
    window_ops = window->window_ops;
  } else if (auto* lost = std::get_if<mirror::TargetLost>(&event)) {
    // The contract: all operations were answered before.
    CHECK(unanswered() == 0);
    log.emplace_back("lost");
    reason = lost->reason;
  } else if (auto* refused = std::get_if<mirror::TargetRefused>(&event)) {
    log.emplace_back("refused");
    reason = refused->reason;
  } else if (std::holds_alternative<mirror::TargetClosed>(event)) {
    CHECK(unanswered() == 0);
    log.emplace_back("closed");
  } else if (auto* path = std::get_if<mirror::PathFound>(&event)) {
    found.push_back(*path);
  } else if (auto* path_lost = std::get_if<mirror::PathLost>(&event)) {
    log.emplace_back("path lost");
    reason = path_lost->reason;
    unflushed = path_lost->unflushed;
  } else if (auto* path_refused = std::get_if<mirror::PathRefused>(&event)) {
    log.emplace_back("path refused");
    reason = path_refused->reason;
  } else {
    auto& answer = std::get<mirror::TargetDone>(event);
    const bool first = done_.emplace(answer.id, std::move(answer)).second;
    CHECK_MESSAGE(first, "an operation was answered twice");
  }
}

bool Driver::until(const std::function<bool()>& condition, std::chrono::milliseconds limit) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    io.restart();
    io.run_one_for(2ms);
    io.poll();
  }
  return true;
}

bool Driver::write_until(const std::function<bool()>& condition, std::chrono::milliseconds limit) {
  std::uint64_t next = 0;
  return until(
      [&] {
        while (unanswered() < 32) (void)write(next++ % 128 * 65536, 65536, 'x');
        return condition();
      },
      limit);
}

void Driver::run_for(std::chrono::milliseconds time) {
  (void)until([] { return false; }, time);
}

std::unique_ptr<Peer> Driver::accept(const Listener& listener) {
  int fd = -1;
  REQUIRE(until([&] {
    pollfd waiting{listener.fd(), POLLIN, 0};
    if (::poll(&waiting, 1, 0) != 1) return false;
    fd = ::accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    return fd >= 0;
  }));
  return std::make_unique<Peer>(fd);
}

std::optional<Peer::Request> Driver::request(Peer& peer) {
  std::optional<Peer::Request> r;
  (void)until([&] { return (r = peer.next()).has_value(); }, 3s);
  return r;
}

bool Driver::open() {
  const auto before = log.size();
  target->open();
  REQUIRE(until([&] { return log.size() > before; }, 30s));
  return log[before] == "up";
}

OpId Driver::submit(mirror::DiskOp op) {
  op.id = OpId{next_id_++};
  const auto id = op.id;
  ++submitted_;
  target->submit(std::move(op));
  CHECK_MESSAGE(done(id) == nullptr, "answered from inside submit()");
  return id;
}

OpId Driver::write(std::uint64_t offset, std::size_t size, char fill, bool fua) {
  auto op = make_op(Command::write, offset, size);
  op.payload = filled(size, fill);
  op.fua = fua;
  return submit(std::move(op));
}

mirror::TargetDone Driver::call(mirror::DiskOp op) {
  const auto id = submit(std::move(op));
  REQUIRE(until([&] { return done(id) != nullptr; }, 30s));
  return *done(id);
}

const mirror::TargetDone* Driver::done(OpId id) const {
  const auto at = done_.find(id);
  return at == done_.end() ? nullptr : &at->second;
}

std::size_t Driver::count(const std::string& what) const {
  return static_cast<std::size_t>(std::count(log.begin(), log.end(), what));
}

mirror::DiskOp make_op(Command command, std::uint64_t begin, std::uint64_t length) {
  mirror::DiskOp op;
  op.command = command;
  op.range = {begin, begin + length};
  return op;
}

Payload filled(std::size_t size, char fill) {
  Buffer b(size);
  std::memset(b.data(), fill, size);
  return std::move(b).freeze();
}

bool wait_for_socket(const std::string& path) {
  for (int i = 0; i < 500; ++i) {
    const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
    const bool ok = ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
    ::close(fd);
    if (ok) return true;
    std::this_thread::sleep_for(10ms);
  }
  return false;
}

}  // namespace nbdferry::test
