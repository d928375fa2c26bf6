// raw_load: a guest that costs as little as possible, so that the server is what is measured. It
// speaks NBD itself (libnbd takes one reply per call): all requests that can be sent leave in one
// call, replies are taken in as large pieces as come.
//
// What must hold: a block is never in flight twice; every read is checked: each 8 bytes of a block
// say which block it is and which write of it, and a read must see the last acknowledged one. The
// blocks that the test touches are written first, so that reads find them.
//
// Prints one JSON line when those are written, and one for each phase (read:32 is reads, 32 at a
// time). Exit code 1: something was wrong, said on standard error.
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <endian.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr std::size_t block_bytes = 4096;
constexpr std::uint32_t blocks_max = 16384;  // 64 MiB of the disk are touched
constexpr std::uint32_t request_magic = 0x25609513;
constexpr std::uint32_t reply_magic = 0x67446698;
constexpr std::uint64_t option_magic = 0x49484156454f5054;
constexpr std::uint16_t command_read = 0;
constexpr std::uint16_t command_write = 1;
constexpr std::uint16_t command_disconnect = 2;

struct [[gnu::packed]] Request {
  std::uint32_t magic = htobe32(request_magic);
  std::uint16_t flags = 0;
  std::uint16_t command = 0;
  std::uint64_t cookie = 0;
  std::uint64_t offset = 0;
  std::uint32_t length = 0;
};
struct [[gnu::packed]] Reply {
  std::uint32_t magic;
  std::uint32_t error;
  std::uint64_t cookie;
};

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(errno != 0 ? what + ": " + std::strerror(errno) : what);
}

class Socket {
 public:
  explicit Socket(const std::string& path) : fd_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (fd_ < 0 || path.size() >= sizeof address.sun_path) fail(path);
    path.copy(&address.sun_path[0], path.size());
    if (::connect(fd_, static_cast<sockaddr*>(static_cast<void*>(&address)), sizeof address) != 0) {
      fail(path);
    }
    // Room for all that is in flight: no end ever waits for the other to read.
    const int bytes = 4 * 1024 * 1024;
    ::setsockopt(fd_, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
  }
  ~Socket() { ::close(fd_); }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;

  void send(const void* data, std::size_t bytes) const {
    const auto* at = static_cast<const char*>(data);
    while (bytes > 0) {
      const auto sent = ::send(fd_, at, bytes, MSG_NOSIGNAL);
      if (sent < 0) fail("send");
      at += sent;
      bytes -= static_cast<std::size_t>(sent);
    }
  }
  std::size_t receive(void* data, std::size_t bytes) const {
    const auto got = ::recv(fd_, data, bytes, 0);
    if (got == 0) errno = ECONNRESET;
    if (got <= 0) fail("receive");
    return static_cast<std::size_t>(got);
  }
  void receive_all(void* data, std::size_t bytes) const {
    if (::recv(fd_, data, bytes, MSG_WAITALL) != static_cast<ssize_t>(bytes)) fail("handshake");
  }

 private:
  int fd_;
};

struct Options {
  std::string socket;
  double seconds = 1;
  std::uint64_t seed = 1;
};

struct Phase {
  bool reads = false;
  unsigned depth = 1;
};
constexpr unsigned depth_max = 256;

Phase parse_phase(const std::string& text) {
  Phase phase;
  const auto colon = text.find(':');
  phase.reads = text.substr(0, colon) == "read";
  phase.depth = static_cast<unsigned>(std::stoul(text.substr(colon + 1)));
  errno = 0;
  if (phase.depth < 1 || phase.depth > depth_max) fail(text + " is not a phase");
  return phase;
}

class Load {
 public:
  explicit Load(Options options)
      : options_(std::move(options)), socket_(options_.socket), random_(options_.seed) {
    handshake();
    slots_.resize(depth_max);
    input_.resize(4 * 1024 * 1024);
  }

  // The blocks that the phases will touch.
  void fill() {
    begin(Phase{false, depth_max});
    while (written_ < blocks_ || in_flight_ > 0) turn(written_ < blocks_);
    measuring_ = true;
    fmt::print("{{\"phase\":\"fill\"}}\n");
    std::fflush(stdout);
  }

  void run(const Phase& phase, const std::string& name) {
    begin(phase);
    const auto from = Clock::now();
    const auto until =
        from + std::chrono::duration_cast<Clock::duration>(Seconds(options_.seconds));
    bool more = true;
    while (more || in_flight_ > 0) {
      turn(more);
      more = more && Clock::now() < until;
    }
    print(name, Seconds(Clock::now() - from).count());
  }

  void disconnect() {
    Request bye;
    bye.command = htobe16(command_disconnect);
    socket_.send(&bye, sizeof bye);
  }

 private:
  struct Slot {
    std::uint32_t block = 0;
    std::uint32_t generation = 0;
    bool read = false;
    Clock::time_point sent;
  };

  // EXPORT_NAME, the empty name: the shortest way there is, and simple replies.
  void handshake() {
    std::array<char, 18> greeting{};
    socket_.receive_all(greeting.data(), greeting.size());
    std::uint64_t magic = 0;
    std::memcpy(&magic, &greeting[8], sizeof magic);
    errno = 0;
    if (be64toh(magic) != option_magic) fail("not a newstyle NBD server");
    struct [[gnu::packed]] {
      std::uint32_t flags = htobe32(3);  // fixed newstyle, no zeroes
      std::uint64_t magic = htobe64(option_magic);
      std::uint32_t option = htobe32(1);
      std::uint32_t length = 0;
    } const hello;
    socket_.send(&hello, sizeof hello);
    struct [[gnu::packed]] {
      std::uint64_t size = 0;
      std::uint16_t flags = 0;
    } answer;
    socket_.receive_all(&answer, sizeof answer);
    const std::uint64_t blocks = be64toh(answer.size) / block_bytes;
    blocks_ = static_cast<std::uint32_t>(std::min<std::uint64_t>(blocks, blocks_max));
    if (blocks_ < 4 * depth_max) fail("too small a disk");
    generations_.resize(blocks_);
    busy_.resize(blocks_);
  }

  void begin(const Phase& phase) {
    phase_ = phase;
    latencies_us_.clear();
    free_.clear();
    for (std::uint32_t i = 0; i < phase.depth; ++i) free_.push_back(i);
  }

  void turn(bool may_send) {
    output_.clear();
    while (may_send && !free_.empty() && (measuring_ || written_ < blocks_)) add_request();
    if (!output_.empty()) socket_.send(output_.data(), output_.size());
    if (in_flight_ > 0) take_replies();
  }

  void add_request() {
    const std::uint32_t index = free_.back();
    free_.pop_back();
    Slot& slot = slots_[index];
    slot.read = phase_.reads;
    slot.block = measuring_ ? static_cast<std::uint32_t>(random_() % blocks_) : written_++;
    while (busy_[slot.block]) slot.block = (slot.block + 1) % blocks_;
    busy_[slot.block] = true;
    slot.generation = generations_[slot.block] + (slot.read ? 0 : 1);
    Request request;
    request.command = htobe16(slot.read ? command_read : command_write);
    request.cookie = index;
    request.offset = htobe64(std::uint64_t{slot.block} * block_bytes);
    request.length = htobe32(block_bytes);
    append(&request, sizeof request);
    if (!slot.read) {
      content_.fill(word(slot));
      append(content_.data(), block_bytes);
    }
    slot.sent = Clock::now();
    ++in_flight_;
  }

  void append(const void* data, std::size_t bytes) {
    const auto* begin = static_cast<const char*>(data);
    output_.insert(output_.end(), begin, begin + bytes);
  }

  static std::uint64_t word(const Slot& slot) {
    return (std::uint64_t{slot.block} + 1) << 32 | slot.generation;
  }

  void take_replies() {
    filled_ += socket_.receive(&input_[filled_], input_.size() - filled_);
    const auto now = Clock::now();
    std::size_t at = 0;
    while (filled_ - at >= sizeof(Reply)) {
      Reply reply;
      std::memcpy(&reply, &input_[at], sizeof reply);
      errno = 0;
      if (be32toh(reply.magic) != reply_magic || reply.cookie >= slots_.size()) fail("bad reply");
      if (reply.error != 0) fail(fmt::format("error {}", be32toh(reply.error)));
      Slot& slot = slots_[reply.cookie];
      const std::size_t bytes = sizeof reply + (slot.read ? block_bytes : 0);
      if (filled_ - at < bytes) break;
      if (slot.read) check(slot, &input_[at + sizeof reply]);
      at += bytes;
      settle(slot, static_cast<std::uint32_t>(reply.cookie), now);
    }
    std::memmove(input_.data(), &input_[at], filled_ - at);
    filled_ -= at;
  }

  void check(const Slot& slot, const char* data) {
    content_.fill(word(slot));
    if (std::memcmp(data, content_.data(), block_bytes) != 0) {
      fail(fmt::format("block {} is not what was written", slot.block));
    }
  }

  void settle(Slot& slot, std::uint32_t index, Clock::time_point now) {
    generations_[slot.block] = slot.generation;
    busy_[slot.block] = false;
    free_.push_back(index);
    --in_flight_;
    latencies_us_.push_back(std::chrono::duration<float, std::micro>(now - slot.sent).count());
  }

  void print(const std::string& name, double seconds) {
    std::sort(latencies_us_.begin(), latencies_us_.end());
    const auto last = static_cast<double>(latencies_us_.size() - 1);
    const auto percentile = [&](double p) {
      return latencies_us_[static_cast<std::size_t>(p * last)];
    };
    fmt::print(
        "{{\"phase\":\"{}\",\"requests\":{},\"seconds\":{:.4f},\"iops\":{:.0f},\"p50_us\":{:.1f},"
        "\"p99_us\":{:.1f}}}\n",
        name, latencies_us_.size(), seconds, static_cast<double>(latencies_us_.size()) / seconds,
        percentile(0.5), percentile(0.99));
    std::fflush(stdout);
  }

  Options options_;
  Socket socket_;
  std::mt19937_64 random_;
  std::uint32_t blocks_ = 0;
  std::uint32_t written_ = 0;  // of the blocks, before the measurement
  bool measuring_ = false;
  Phase phase_;
  std::vector<std::uint32_t> generations_;  // acknowledged
  std::vector<bool> busy_;
  std::vector<Slot> slots_;
  std::vector<std::uint32_t> free_;
  std::size_t in_flight_ = 0;
  std::vector<char> output_;
  std::vector<char> input_;
  std::size_t filled_ = 0;
  std::array<std::uint64_t, block_bytes / sizeof(std::uint64_t)> content_{};
  std::vector<float> latencies_us_;
};

}  // namespace

int main(int argc, char** argv) {
  Options options;
  std::vector<std::string> phases;
  CLI::App app("A guest that costs as little as possible");
  app.add_option("--socket", options.socket)->required();
  app.add_option("--seconds", options.seconds)->check(CLI::PositiveNumber);
  app.add_option("--seed", options.seed);
  app.add_option("phases", phases, "read:DEPTH or write:DEPTH")
      ->required()
      ->check([](const std::string& text) {
        const bool good = text.rfind("read:", 0) == 0 || text.rfind("write:", 0) == 0;
        return good ? std::string() : text + " is not a phase";
      });
  CLI11_PARSE(app, argc, argv);
  try {
    Load load(std::move(options));
    load.fill();
    for (const auto& name : phases) load.run(parse_phase(name), name);
    load.disconnect();
  } catch (const std::exception& e) {
    fmt::print(stderr, "raw_load: {}\n", e.what());
    return 1;
  }
  return 0;
}
