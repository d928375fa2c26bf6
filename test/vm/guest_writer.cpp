// guest_writer: the load in the guest of the VM tests, and its init. It writes records to disk A (files
// on ext4) and disk B (raw) without pause, reads earlier ones back, and says on the console how far it
// is, ten times a second:
//
//   t=MS a=ACKNOWLEDGED,SYNCED b=ACKNOWLEDGED,SYNCED gap_us=MAX write_a=COUNT,MEDIAN,P99,MAX …
//
// all times by the guest's own clock, which stands still while the guest does. "stop" on the console
// ends it: all synced, all read back, unmounted, a last line `done a=… b=…`, power off.
//
// On the host (tests of the checker): guest_writer a=DIRECTORY b=FILE [seed=N] [records=N] [pause_us=N]
//
// What must hold: a record is begun only after the one before it, on the same disk, was answered, so
// what the disk may hold follows from the numbers in the last line.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "guest_files.hpp"
#include "guest_init.hpp"
#include "guest_options.hpp"
#include "guest_raw.hpp"
#include "guest_report.hpp"
#include <poll.h>
#include <sched.h>
#include <unistd.h>

namespace guest {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

std::atomic<bool> failed{false};

void say_line(const char* prefix, const char* format, std::va_list more) {
  std::array<char, 1024> line;
  auto length = static_cast<std::size_t>(std::snprintf(line.data(), line.size(), "%s", prefix));
  std::vsnprintf(&line[length], line.size() - length - 1, format, more);
  length = std::strlen(line.data());
  line[length++] = '\n';
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  for (std::size_t at = 0; at < length;) {
    const auto done = ::write(1, &line[at], length - at);
    if (done <= 0) return;  // nobody to tell
    at += static_cast<std::size_t>(done);
  }
}

}  // namespace

void say(const char* format, ...) {
  std::va_list more;
  va_start(more, format);
  say_line("", format, more);
  va_end(more);
}

void complain(const char* format, ...) {
  failed = true;
  std::va_list more;
  va_start(more, format);
  say_line("error ", format, more);
  va_end(more);
}

namespace {

template <class Disk>
void write_records(Disk& disk, const Options& options, const std::atomic<bool>& stopping) {
  const auto wanted = options.records == 0 ? ~std::uint64_t{0} : options.records;
  while (!stopping && disk.progress.acknowledged < wanted) {
    if (!disk.write_next()) return;
    if (options.pause_us > 0) std::this_thread::sleep_for(microseconds(options.pause_us));
  }
}

/// Memory that a migration has to send again and again.
void dirty_memory(std::uint64_t mib, const std::atomic<bool>& stopping) {
  constexpr std::size_t page = 4096;
  std::vector<std::byte> memory(mib << 20);
  for (unsigned turn = 1; !stopping; ++turn) {
    for (std::size_t at = 0; at < memory.size(); at += page) {
      const volatile auto written = memory[at] = static_cast<std::byte>(turn);
      static_cast<void>(written);
    }
    std::this_thread::sleep_for(milliseconds(1));
  }
}

long long us(Clock::duration span) {
  return std::chrono::duration_cast<microseconds>(span).count();
}

/// "stop" has come in on the console.
bool told_to_stop() {
  static std::string input;
  std::array<char, 64> buffer;
  // Not O_NONBLOCK: standard output shares the console's flags.
  for (pollfd console{.fd = 0, .events = POLLIN, .revents = 0}; ::poll(&console, 1, 0) > 0;) {
    const auto done = ::read(0, buffer.data(), buffer.size());
    if (done <= 0) break;
    input.append(buffer.data(), static_cast<std::size_t>(done));
  }
  return input.find("stop\n") != std::string::npos;
}

void report(Files& a, RawDisk& b, Clock::duration gap) {
  say("t=%lld a=%llu,%llu b=%llu,%llu gap_us=%lld write_a=%s sync_a=%s write_b=%s sync_b=%s",
      us(Clock::now().time_since_epoch()) / 1000,
      static_cast<unsigned long long>(a.progress.acknowledged),
      static_cast<unsigned long long>(a.progress.synced),
      static_cast<unsigned long long>(b.progress.acknowledged),
      static_cast<unsigned long long>(b.progress.synced), us(gap), a.progress.writes.take().c_str(),
      a.progress.syncs.take().c_str(), b.progress.writes.take().c_str(),
      b.progress.syncs.take().c_str());
}

/// Looks after everything until the end is asked for, or both disks have all their records.
void look_after(const Options& options, Files& a, RawDisk& b, const KernelLog* kernel_log) {
  auto last_turn = Clock::now();
  auto next_report = last_turn;
  Clock::duration gap{};
  const auto has_all = [&] {
    return options.records > 0 && a.progress.acknowledged == options.records &&
           b.progress.acknowledged == options.records;
  };
  while (!told_to_stop() && !has_all() && (kernel_log != nullptr || !failed)) {
    std::this_thread::sleep_for(milliseconds(2));
    const auto now = Clock::now();
    gap = std::max(gap, now - last_turn);
    last_turn = now;
    if (kernel_log != nullptr) kernel_log->watch();
    if (now < next_report) continue;
    next_report = now + milliseconds(100);
    report(a, b, std::exchange(gap, Clock::duration{}));
  }
}

bool run(const Options& options, const KernelLog* kernel_log) {
  std::atomic<bool> stopping{false};
  Files a(options);
  RawDisk b(options);
  say("up seed=%llu b_bytes=%llu", static_cast<unsigned long long>(options.seed),
      static_cast<unsigned long long>(b.bytes()));
  std::vector<std::thread> threads;
  threads.emplace_back([&] { write_records(a, options, stopping); });
  threads.emplace_back([&] { write_records(b, options, stopping); });
  if (options.dirty_mib > 0) {
    threads.emplace_back([&] { dirty_memory(options.dirty_mib, stopping); });
  }
  if (kernel_log != nullptr) {
    // So that a gap is one of the machine, not of the scheduler; the writers keep their class.
    const sched_param urgent{.sched_priority = 1};
    ::sched_setscheduler(0, SCHED_FIFO, &urgent);
  }
  look_after(options, a, b, kernel_log);
  stopping = true;
  for (auto& thread : threads) thread.join();
  const bool finished = !failed && a.finish() && b.finish();
  if (kernel_log != nullptr) {
    unmount_disks();
    kernel_log->watch();
  }
  report(a, b, Clock::duration{});
  if (failed || !finished) return false;
  say("done a=%llu b=%llu", static_cast<unsigned long long>(a.progress.acknowledged),
      static_cast<unsigned long long>(b.progress.acknowledged));
  return true;
}

}  // namespace
}  // namespace guest

int main(int argc, char** argv) {
  guest::Options options;
  const bool is_init = ::getpid() == 1;
  bool good = false;
  try {
    if (is_init) {
      guest::start_machine(options);
      const guest::KernelLog kernel_log;
      good = guest::run(options, &kernel_log);
    } else {
      for (int i = 1; i < argc; ++i) guest::set_option(options, argv[i]);
      good = guest::run(options, nullptr);
    }
  } catch (const std::exception& e) {
    guest::complain("%s", e.what());
  }
  if (is_init) guest::power_off();
  return good ? 0 : 1;
}
