// What the NBD server's tests stand on.
#include "test/unit/proxy_nbd_fixture.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <stdexcept>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <fmt/format.h>

#include "proxy/checksum.hpp"

namespace nbdferry::proxy::test {

// --- MemoryFront
// ----------------------------------------------------------------------------------

MemoryFront::MemoryFront(boost::asio::io_context& io, std::uint64_t size, std::string name)
    : data(size), io_(io) {
  info_.name = std::move(name);
  info_.description = "a disk in memory";
  info_.size = size;
}

std::uint32_t MemoryFront::attach(ReplySink& sink, const Migrant& migrant) {
  migrations.emplace_back(migrant.migration);
  sessions.emplace_back(migrant.session);
  sinks_[++last_session_] = &sink;
  return last_session_;
}

void MemoryFront::submit(mirror::GuestRequest&& request) {
  if (keep_seen) {
    seen.push_back(request);
    seen.back().payload = {};
  }
  switch (when) {
    case When::at_once:
      return execute(std::move(request));
    case When::posted:
      boost::asio::post(io_, [this, r = std::move(request)]() mutable { execute(std::move(r)); });
      return;
    case When::held:
      held.push_back(std::move(request));
  }
}

void MemoryFront::execute(mirror::GuestRequest&& request) {
  mirror::Reply reply;
  reply.id = request.id;
  const auto begin = data.begin() + static_cast<std::ptrdiff_t>(request.range.begin);
  const auto end = data.begin() + static_cast<std::ptrdiff_t>(request.range.end);
  if (const auto failure = failures.find(request.command); failure != failures.end()) {
    reply.error = failure->second;
  } else if (request.command == Command::read) {
    Buffer buffer(request.range.length());
    std::memcpy(buffer.data(), data.data() + request.range.begin, buffer.size());
    reply.data = std::move(buffer).freeze();
  } else if (request.command == Command::write) {
    std::memcpy(data.data() + request.range.begin, request.payload.data(), request.payload.size());
  } else if (request.command == Command::trim || request.command == Command::zero) {
    std::fill(begin, end, std::byte{0});
  } else if (request.command == Command::block_status) {
    reply.extents = extents(request.range);
  } else if (request.command == Command::checksum) {
    reply.checksum = checksum_of({data.data() + request.range.begin, request.range.length()});
  }
  const auto sink = sinks_.find(session_of(request.id));
  if (sink != sinks_.end()) sink->second->reply(std::move(reply));
}

std::vector<Extent> MemoryFront::extents(const ByteRange& range) const {
  constexpr std::uint64_t page = 4096;
  std::vector<Extent> found;
  for (auto at = range.begin; at < range.end;) {
    const auto next = std::min((at / page + 1) * page, range.end);
    const bool zero = std::all_of(data.begin() + static_cast<std::ptrdiff_t>(at),
                                  data.begin() + static_cast<std::ptrdiff_t>(next),
                                  [](std::byte b) { return b == std::byte{0}; });
    if (!found.empty() && found.back().zero == zero) {
      found.back().length += next - at;
    } else {
      found.push_back({next - at, zero, zero});
    }
    at = next;
  }
  return found;
}

void MemoryFront::release() {
  auto requests = std::move(held);
  held.clear();
  for (auto& request : requests) execute(std::move(request));
}

void MemoryFront::fence_all() {
  for (const auto& [session, sink] : sinks_) sink->fence();
}

// --- ServerThread
// ---------------------------------------------------------------------------------

ServerThread::ServerThread(std::uint64_t size, std::string name)
    : front(io, size, std::move(name)), work_(io.get_executor()) {
  std::string pattern = "/tmp/nbdferry-test-XXXXXX";
  if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
  dir_ = pattern;
  path_ = dir_ + "/nbd.sock";
  server = std::make_unique<Server>(io, std::vector<Front*>{&front});
  server->listen_unix(path_);
  server->listen_tcp("127.0.0.1", 0);
  port_ = server->bound_port();
  thread_ = std::thread([this] { io.run(); });
}

ServerThread::~ServerThread() {
  on_loop([this] {
    server.reset();
    work_.reset();
    return 0;
  });
  thread_.join();
  std::filesystem::remove_all(dir_);
}

bool ServerThread::eventually(const std::function<bool()>& f, double seconds) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (!on_loop(f)) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

// --- RawClient
// ------------------------------------------------------------------------------------

namespace {

UniqueFd connected(int family, const sockaddr* address, socklen_t size) {
  UniqueFd socket(::socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (::connect(socket.get(), address, size) != 0) throw std::runtime_error("cannot connect");
  const timeval timeout{5, 0};
  ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
  ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
  return socket;
}

}  // namespace

RawClient RawClient::unix_socket(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
  return RawClient(connected(AF_UNIX, reinterpret_cast<const sockaddr*>(&address), sizeof address));
}

RawClient RawClient::tcp(std::uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return RawClient(connected(AF_INET, reinterpret_cast<const sockaddr*>(&address), sizeof address));
}

void RawClient::send(std::string_view bytes) {
  while (!bytes.empty()) {
    const auto sent = ::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent < 0) throw std::runtime_error(errno == EAGAIN ? "timeout" : "closed");
    bytes.remove_prefix(static_cast<std::size_t>(sent));
  }
}

std::string RawClient::receive(std::size_t bytes) {
  std::string received(bytes, '\0');
  for (std::size_t at = 0; at < bytes;) {
    const auto got = ::recv(socket_.get(), received.data() + at, bytes - at, 0);
    if (got < 0 && errno == EAGAIN) throw std::runtime_error("timeout");
    if (got <= 0) throw std::runtime_error("closed");
    at += static_cast<std::size_t>(got);
  }
  return received;
}

bool RawClient::is_closed() {
  char byte = 0;
  const auto got = ::recv(socket_.get(), &byte, 1, 0);
  return got == 0 || (got < 0 && errno != EAGAIN);
}

void RawClient::shut_down_sending() { ::shutdown(socket_.get(), SHUT_WR); }

void RawClient::greet(std::uint32_t flags) {
  const std::string greeting = receive(18);
  if (greeting != "NBDMAGICIHAVEOPT" + wire(std::uint16_t{3})) {
    throw std::runtime_error("wrong greeting");
  }
  send(wire(flags));
}

void RawClient::send_option(std::uint32_t option, std::string_view data) {
  send("IHAVEOPT" + wire(option) + wire(static_cast<std::uint32_t>(data.size())) +
       std::string(data));
}

OptionAnswer RawClient::option_answer() {
  const std::string header = receive(20);
  if (unwire<std::uint64_t>(header) != nbd::magic_option_reply) {
    throw std::runtime_error("wrong magic in an option's answer");
  }
  OptionAnswer answer;
  answer.option = unwire<std::uint32_t>(header.substr(8));
  answer.type = unwire<std::uint32_t>(header.substr(12));
  answer.data = receive(unwire<std::uint32_t>(header.substr(16)));
  return answer;
}

std::vector<OptionAnswer> RawClient::option(std::uint32_t option, std::string_view data) {
  send_option(option, data);
  std::vector<OptionAnswer> answers;
  do {
    answers.push_back(option_answer());
    if (answers.back().option != option) throw std::runtime_error("answer to another option");
  } while (answers.back().type != 1 && (answers.back().type >> 31) == 0);
  return answers;
}

void RawClient::go(bool structured, const std::vector<std::string>& contexts,
                   const std::string& name) {
  const auto must = [this](std::uint32_t o, const std::string& data) {
    if (option(o, data).back().type != 1) throw std::runtime_error(fmt::format("option {}", o));
  };
  greet();
  if (structured || !contexts.empty()) must(8, "");
  if (!contexts.empty()) must(10, context_request(name, contexts));
  must(7, info_request(name));
}

void RawClient::send_request(nbd::RequestType type, std::uint64_t offset, std::uint32_t length,
                             std::uint16_t flags, std::string_view payload, std::uint64_t cookie) {
  send(request_header(type, offset, length, flags, cookie) + std::string(payload));
}

RawReply RawClient::reply(std::size_t read_bytes) {
  RawReply reply;
  const auto magic = unwire<std::uint32_t>(receive(4));
  if (magic == nbd::magic_simple_reply) {
    reply.error = unwire<std::uint32_t>(receive(4));
    reply.cookie = unwire<std::uint64_t>(receive(8));
    if (reply.error == 0) reply.body = receive(read_bytes);
    return reply;
  }
  if (magic != nbd::magic_structured_reply) throw std::runtime_error("wrong magic in a reply");
  reply.flags = unwire<std::uint16_t>(receive(2));
  reply.chunk = unwire<std::uint16_t>(receive(2));
  reply.cookie = unwire<std::uint64_t>(receive(8));
  reply.body = receive(unwire<std::uint32_t>(receive(4)));
  if ((reply.chunk & 0x8000) != 0) reply.error = unwire<std::uint32_t>(reply.body);
  return reply;
}

RawReply RawClient::ask(nbd::RequestType type, std::uint64_t offset, std::uint32_t length,
                        std::uint16_t flags, std::string_view payload) {
  const auto cookie = ++last_cookie_;
  send_request(type, offset, length, flags, payload, cookie);
  RawReply answer = reply(type == nbd::RequestType::read ? length : 0);
  if (answer.cookie != cookie) throw std::runtime_error("reply to another request");
  return answer;
}

// --- wire
// -----------------------------------------------------------------------------------------

std::string info_request(const std::string& name, std::vector<std::uint16_t> infos) {
  std::string data = wire(static_cast<std::uint32_t>(name.size())) + name +
                     wire(static_cast<std::uint16_t>(infos.size()));
  for (const auto info : infos) data += wire(info);
  return data;
}

std::string context_request(const std::string& name, const std::vector<std::string>& queries) {
  std::string data = wire(static_cast<std::uint32_t>(name.size())) + name +
                     wire(static_cast<std::uint32_t>(queries.size()));
  for (const auto& query : queries) data += wire(static_cast<std::uint32_t>(query.size())) + query;
  return data;
}

std::string request_header(nbd::RequestType type, std::uint64_t offset, std::uint32_t length,
                           std::uint16_t flags, std::uint64_t cookie) {
  return wire(nbd::magic_request) + wire(flags) + wire(static_cast<std::uint16_t>(type)) +
         wire(cookie) + wire(offset) + wire(length);
}

CommandResult run_command(const std::string& command, int seconds) {
  CommandResult result;
  const auto bounded = fmt::format("exec 2>&1; timeout {} sh -c '{}'", seconds, command);
  FILE* pipe = ::popen(bounded.c_str(), "r");
  if (pipe == nullptr) return result;
  std::array<char, 4096> piece;
  while (const auto got = std::fread(piece.data(), 1, piece.size(), pipe)) {
    result.output.append(piece.data(), got);
  }
  const int status = ::pclose(pipe);
  result.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return result;
}

}  // namespace nbdferry::proxy::test

// Each thread keeps its pool of payload memory for good (mirror/payload.cpp), also when it ends:
// the program has one thread for each export, these tests have one for each server.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() {
  return "leak:nbdferry::detail::allocate_storage";
}
