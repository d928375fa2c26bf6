// nbd_load: a guest that knows what it wrote. One connection, many requests in flight, every
// read checked, every acknowledged write noted in a shadow file: at the end whoever owns the disk
// must equal the shadow, byte for byte. With --rate it is open loop: a request's latency counts
// from the time at which it was due, so that a stall can't hide the requests that it kept back.
// With --no-catch-up it is not: for a guest that is slowed on purpose.
//
// What must hold: requests in flight never overlap (NBD does not order them), so at any time each
// byte has one value that the server may answer. A write is in the shadow if it was acknowledged,
// and only then; it is a failure when the server answers it with an error (but see
// --until-shutdown).
//
// Prints one JSON line per phase: at SIGUSR1 (begins the next phase) and at the end (--seconds,
// SIGTERM or SIGINT). Exit code 1: something was wrong, said on standard error.
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <libnbd.h>

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

struct Options {
  std::string uri;
  std::string shadow;
  std::string windows;  // empty: none
  double rate = 0;      // requests a second; 0: as fast as `depth` allows
  bool no_catch_up = false;
  unsigned depth = 16;
  double seconds = 0;  // 0: until a signal
  std::uint64_t seed = 1;
  unsigned bytes = 0;      // of each request; 0: 512 bytes to 64 KiB, in sectors
  std::uint64_t span = 0;  // requests keep to so many bytes at the beginning; 0: all of the disk
  unsigned read_percent = 0;
  unsigned zero_percent = 0;
  unsigned fua_percent = 0;
  unsigned flush_every = 0;  // writes; 0: never
  bool until_shutdown = false;
  bool compare = false;
};

constexpr unsigned request_bytes_max = 64 * 1024;
constexpr unsigned sector = 512;
constexpr double window_seconds = 0.1;
constexpr std::chrono::milliseconds catch_up_max{2};  // with --no-catch-up: what a timer is late

volatile std::sig_atomic_t stop_asked = 0;
volatile std::sig_atomic_t phase_asked = 0;

[[noreturn]] void fail_nbd(const char* what) {
  throw std::runtime_error(fmt::format("{}: {}", what, nbd_get_error()));
}

// The file that says what the disk must hold.
class Shadow {
 public:
  Shadow(const std::string& path, std::uint64_t size) : size_(size) {
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    struct stat status {};
    if (fd < 0 || ::fstat(fd, &status) != 0) {
      throw std::runtime_error(fmt::format("{}: {}", path, std::strerror(errno)));
    }
    if (static_cast<std::uint64_t>(status.st_size) != size) {
      throw std::runtime_error(
          fmt::format("{} has {} bytes, the disk {}", path, status.st_size, size));
    }
    void* const memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ::close(fd);
    if (memory == MAP_FAILED) throw std::runtime_error(path + ": cannot be mapped");
    memory_ = static_cast<char*>(memory);
  }
  ~Shadow() { ::munmap(memory_, size_); }
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;

  [[nodiscard]] char* at(std::uint64_t offset) const { return memory_ + offset; }

 private:
  char* memory_ = nullptr;
  std::uint64_t size_;
};

enum class Kind : std::uint8_t { read, write, zero, flush };

struct Slot {
  Kind kind = Kind::read;
  std::uint64_t offset = 0;
  unsigned length = 0;
  Clock::time_point due;
  bool busy = false;
  bool answered = false;
  int error = 0;
  std::vector<char> data = std::vector<char>(request_bytes_max);
};

float percentile(const std::vector<float>& sorted, double share) {
  if (sorted.empty()) return 0;
  return sorted[static_cast<std::size_t>(share * static_cast<double>(sorted.size() - 1))];
}

// What each 100 ms were like, in a file: when they began (steady clock, ms), answers, p99 and
// longest latency in microseconds. A request belongs to where its answer came.
class Windows {
 public:
  explicit Windows(const std::string& path) : file_(std::fopen(path.c_str(), "we")) {
    if (!file_) throw std::runtime_error(fmt::format("{}: {}", path, std::strerror(errno)));
  }
  void count(float latency_us, Clock::time_point now) {
    for (; now >= begin_ + length; begin_ += length) print();
    latencies_us_.push_back(latency_us);
  }
  void end() { print(); }

 private:
  static constexpr std::chrono::milliseconds length{100};
  struct Close {
    void operator()(std::FILE* f) const { std::fclose(f); }
  };

  void print() {
    std::sort(latencies_us_.begin(), latencies_us_.end());
    const auto at =
        std::chrono::duration_cast<std::chrono::milliseconds>(begin_.time_since_epoch());
    fmt::print(file_.get(), "{} {} {:.1f} {:.1f}\n", at.count(), latencies_us_.size(),
               percentile(latencies_us_, 0.99), percentile(latencies_us_, 1));
    latencies_us_.clear();
  }

  std::unique_ptr<std::FILE, Close> file_;
  Clock::time_point begin_ = Clock::now();
  std::vector<float> latencies_us_;
};

// What one phase was like.
struct Phase {
  Clock::time_point begin = Clock::now();
  Clock::time_point answered_at = begin;  // the last time, if only in the phase before
  Clock::duration longest_gap{0};         // between two answers in a row
  std::vector<float> latencies_us;
  std::vector<unsigned> per_window;
  std::uint64_t reads = 0;
  std::uint64_t writes = 0;

  void count(const Slot& slot, float latency_us, Clock::time_point now) {
    longest_gap = std::max(longest_gap, now - answered_at);
    answered_at = now;
    latencies_us.push_back(latency_us);
    const auto window = static_cast<std::size_t>(Seconds(now - begin).count() / window_seconds);
    if (per_window.size() <= window) per_window.resize(window + 1);
    ++per_window[window];
    ++(slot.kind == Kind::read ? reads : writes);
  }

  void print(const char* name) {
    const auto now = Clock::now();
    const double seconds = Seconds(now - begin).count();
    longest_gap = std::max(longest_gap, now - answered_at);
    std::sort(latencies_us.begin(), latencies_us.end());
    per_window.resize(static_cast<std::size_t>(seconds / window_seconds));  // whole ones
    const auto worst = std::min_element(per_window.begin(), per_window.end());
    fmt::print(
        "{{\"phase\":\"{}\",\"seconds\":{:.3f},\"reads\":{},\"writes\":{},\"iops\":{:.1f},"
        "\"p50_us\":{:.1f},\"p99_us\":{:.1f},\"max_us\":{:.1f},\"worst_100ms\":{},"
        "\"longest_gap_us\":{:.1f}}}\n",
        name, seconds, reads, writes, static_cast<double>(latencies_us.size()) / seconds,
        percentile(latencies_us, 0.5), percentile(latencies_us, 0.99), percentile(latencies_us, 1),
        worst == per_window.end() ? 0 : *worst, Seconds(longest_gap).count() * 1e6);
    std::fflush(stdout);
  }
};

class Load {
 public:
  explicit Load(Options options) : options_(std::move(options)), random_(options_.seed) {
    nbd_.reset(nbd_create());
    if (!nbd_) fail_nbd("libnbd");
    if (nbd_connect_uri(nbd_.get(), options_.uri.c_str()) < 0) fail_nbd("cannot connect");
    const auto size = nbd_get_size(nbd_.get());
    if (size < 2 * std::int64_t{request_bytes_max}) throw std::runtime_error("too small a disk");
    size_ = static_cast<std::uint64_t>(size);
    span_ = options_.span == 0
                ? size_
                : std::clamp<std::uint64_t>(options_.span, 2 * request_bytes_max, size_);
    shadow_ = std::make_unique<Shadow>(options_.shadow, size_);
    slots_.resize(options_.depth);
    if (!options_.windows.empty()) windows_ = std::make_unique<Windows>(options_.windows);
  }

  // True: all was as it must be.
  bool run() {
    phase_ = Phase{};
    begin_ = Clock::now();
    next_due_ = begin_;
    while (!draining_ || in_flight_ > 0) {
      if (stop_asked ||
          (options_.seconds > 0 && Seconds(Clock::now() - begin_).count() >= options_.seconds)) {
        draining_ = true;
      }
      if (phase_asked) {
        phase_asked = 0;
        phase_.print("part");
        const auto answered_at = phase_.answered_at;
        phase_ = Phase{};
        phase_.answered_at = answered_at;
      }
      if (!draining_) issue();
      wait();
      harvest();
    }
    phase_.print("last");
    if (windows_) windows_->end();
    if (options_.compare && failures_ == 0) compare();
    return failures_ == 0;
  }

 private:
  struct Close {
    void operator()(nbd_handle* h) const { nbd_close(h); }
  };

  void failure(const std::string& text) {
    if (++failures_ <= 10) fmt::print(stderr, "nbd_load: {}\n", text);
  }

  [[nodiscard]] std::uint64_t below(std::uint64_t end) { return random_() % end; }

  [[nodiscard]] bool overlaps(std::uint64_t offset, unsigned length) const {
    return std::any_of(slots_.begin(), slots_.end(), [&](const Slot& s) {
      return s.busy && offset < s.offset + s.length && s.offset < offset + length;
    });
  }

  void issue() {
    for (Slot& slot : slots_) {
      if (slot.busy) continue;
      const auto now = Clock::now();
      if (options_.rate > 0 && next_due_ > now) return;
      if (!choose(slot)) return;
      slot.due = now;
      if (options_.rate > 0) {
        if (options_.no_catch_up) next_due_ = std::max(next_due_, now - catch_up_max);
        slot.due = options_.no_catch_up ? now : next_due_;
        next_due_ += std::chrono::duration_cast<Clock::duration>(Seconds(1 / options_.rate));
      }
      submit(slot);
    }
  }

  bool choose(Slot& slot) {
    if (options_.flush_every > 0 && since_flush_ >= options_.flush_every) {
      since_flush_ = 0;
      slot.kind = Kind::flush;
      slot.offset = 0;
      slot.length = 0;
      return true;
    }
    const auto percent = below(100);
    slot.kind = Kind::write;
    if (percent < options_.read_percent) {
      slot.kind = Kind::read;
    } else if (percent < options_.read_percent + options_.zero_percent) {
      slot.kind = Kind::zero;
    }
    for (int tries = 0; tries < 20; ++tries) {
      const unsigned unit = options_.bytes > 0 ? options_.bytes : sector;
      slot.length = options_.bytes > 0
                        ? options_.bytes
                        : sector * static_cast<unsigned>(1 + below(request_bytes_max / sector));
      slot.offset = below((span_ - slot.length) / unit + 1) * unit;
      if (!overlaps(slot.offset, slot.length)) return true;
    }
    return false;
  }

  static int answered(void* user, int* error) {
    auto* const slot = static_cast<Slot*>(user);
    slot->answered = true;
    slot->error = *error;
    return 1;
  }

  void submit(Slot& slot) {
    slot.busy = true;
    slot.answered = false;
    ++in_flight_;
    const nbd_completion_callback done{&Load::answered, &slot, nullptr};
    nbd_handle* const h = nbd_.get();
    const bool fua = slot.kind != Kind::read && below(100) < options_.fua_percent;
    const std::uint32_t flags = fua ? LIBNBD_CMD_FLAG_FUA : 0;
    std::int64_t cookie = -1;
    switch (slot.kind) {
      case Kind::read:
        cookie = nbd_aio_pread(h, slot.data.data(), slot.length, slot.offset, done, 0);
        break;
      case Kind::write:
        fill(std::span(slot.data).first(slot.length));
        cookie = nbd_aio_pwrite(h, slot.data.data(), slot.length, slot.offset, done, flags);
        break;
      case Kind::zero:
        cookie = nbd_aio_zero(h, slot.length, slot.offset, done, flags);
        break;
      case Kind::flush:
        cookie = nbd_aio_flush(h, done, 0);
        break;
    }
    if (slot.kind != Kind::read && slot.kind != Kind::flush) ++since_flush_;
    if (cookie < 0) fail_nbd("cannot send a request");
  }

  void fill(std::span<char> bytes) {
    for (std::size_t i = 0; i < bytes.size(); i += sizeof(std::uint64_t)) {
      const std::uint64_t word = random_();
      std::memcpy(&bytes[i], &word, sizeof word);
    }
  }

  // Until an answer can be read or a request is due.
  void wait() {
    auto until = Clock::now() + std::chrono::milliseconds(20);
    const bool may_issue = !draining_ && in_flight_ < slots_.size();
    if (may_issue && options_.rate > 0) until = std::min(until, next_due_);
    const auto left = std::max(Clock::duration::zero(), until - Clock::now());
    const timespec timeout{0, std::chrono::nanoseconds(left).count()};
    pollfd fd{nbd_aio_get_fd(nbd_.get()), 0, 0};
    const unsigned direction = nbd_aio_get_direction(nbd_.get());
    if ((direction & LIBNBD_AIO_DIRECTION_READ) != 0) fd.events |= POLLIN;
    if ((direction & LIBNBD_AIO_DIRECTION_WRITE) != 0) fd.events |= POLLOUT;
    if (::ppoll(&fd, 1, &timeout, nullptr) <= 0) return;
    constexpr int replies_max = 32;
    for (int i = 0; i < replies_max; ++i) {
      int result = 0;
      if ((fd.revents & (POLLIN | POLLHUP)) != 0) {
        result = nbd_aio_notify_read(nbd_.get());
      } else if ((fd.revents & POLLOUT) != 0) {
        result = nbd_aio_notify_write(nbd_.get());
      }
      if (result < 0) fail_nbd("the connection broke");
      fd.events = POLLIN;
      if ((nbd_aio_get_direction(nbd_.get()) & LIBNBD_AIO_DIRECTION_READ) == 0 ||
          ::poll(&fd, 1, 0) <= 0) {
        return;
      }
    }
  }

  void harvest() {
    const auto now = Clock::now();
    for (Slot& slot : slots_) {
      if (!slot.busy || !slot.answered) continue;
      slot.busy = false;
      --in_flight_;
      if (slot.error == ESHUTDOWN && options_.until_shutdown) {
        draining_ = true;  // released: what was answered so was not done
      } else if (slot.error != 0) {
        failure(fmt::format("{} of {} bytes at {}: {}", slot.kind == Kind::read ? "read" : "write",
                            slot.length, slot.offset, std::strerror(slot.error)));
      } else {
        settle(slot);
        const float latency_us = std::chrono::duration<float, std::micro>(now - slot.due).count();
        phase_.count(slot, latency_us, now);
        if (windows_) windows_->count(latency_us, now);
      }
    }
  }

  void settle(const Slot& slot) {
    char* const truth = shadow_->at(slot.offset);
    if (slot.kind == Kind::write) {
      std::memcpy(truth, slot.data.data(), slot.length);
    } else if (slot.kind == Kind::zero) {
      std::memset(truth, 0, slot.length);
    } else if (slot.kind == Kind::read) {
      check(truth, slot.data.data(), slot.length, slot.offset);
    }
  }

  void check(const char* truth, const char* got, std::size_t length, std::uint64_t offset) {
    if (std::memcmp(truth, got, length) == 0) return;
    const auto at = std::mismatch(truth, truth + length, got).first - truth;
    failure(fmt::format("the disk differs at byte {}", offset + static_cast<std::uint64_t>(at)));
  }

  // The whole disk, through the same connection.
  void compare() {
    std::vector<char> piece(1024 * 1024);
    for (std::uint64_t offset = 0; offset < size_; offset += piece.size()) {
      const auto length =
          static_cast<std::size_t>(std::min<std::uint64_t>(piece.size(), size_ - offset));
      if (nbd_pread(nbd_.get(), piece.data(), length, offset, 0) < 0) fail_nbd("read");
      check(shadow_->at(offset), piece.data(), length, offset);
    }
  }

  Options options_;
  std::mt19937_64 random_;
  std::unique_ptr<nbd_handle, Close> nbd_;
  std::uint64_t size_ = 0;
  std::uint64_t span_ = 0;  // requests keep to it
  std::unique_ptr<Shadow> shadow_;
  std::vector<Slot> slots_;  // as many as may be in flight
  unsigned in_flight_ = 0;
  unsigned since_flush_ = 0;
  bool draining_ = false;
  std::uint64_t failures_ = 0;
  Clock::time_point begin_;
  Clock::time_point next_due_;
  Phase phase_;
  std::unique_ptr<Windows> windows_;
};

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("A guest that knows what it wrote");
  app.add_option("--uri", options.uri)->required();
  app.add_option("--shadow", options.shadow, "What the disk holds; kept up to date")->required();
  app.add_option("--rate", options.rate, "Requests a second, open loop; 0: closed loop");
  app.add_flag("--no-catch-up", options.no_catch_up,
               "With --rate: what could not be sent in time is left out, and a latency counts from "
               "when it was sent");
  app.add_option("--windows", options.windows, "A file for what each 100 ms were like");
  app.add_option("--depth", options.depth)->check(CLI::Range(1U, 256U));
  app.add_option("--seconds", options.seconds, "0: until SIGTERM or SIGINT");
  app.add_option("--seed", options.seed);
  app.add_option("--bytes", options.bytes, "Of each request; 0: random")
      ->check(CLI::Range(0U, request_bytes_max));
  app.add_option("--span", options.span, "Bytes at the beginning that it keeps to; 0: all");
  app.add_option("--read-percent", options.read_percent)->check(CLI::Range(0U, 100U));
  app.add_option("--zero-percent", options.zero_percent)->check(CLI::Range(0U, 100U));
  app.add_option("--fua-percent", options.fua_percent)->check(CLI::Range(0U, 100U));
  app.add_option("--flush-every", options.flush_every, "Writes between two flushes; 0: none");
  app.add_flag("--until-shutdown", options.until_shutdown, "ESHUTDOWN is the end, not an error");
  app.add_flag("--compare", options.compare, "Read the whole disk at the end");
  CLI11_PARSE(app, argc, argv);
  std::signal(SIGTERM, [](int) { stop_asked = 1; });
  std::signal(SIGINT, [](int) { stop_asked = 1; });
  std::signal(SIGUSR1, [](int) { phase_asked = 1; });
  try {
    return Load(std::move(options)).run() ? 0 : 1;
  } catch (const std::exception& e) {
    fmt::print(stderr, "nbd_load: {}\n", e.what());
    return 1;
  }
}
