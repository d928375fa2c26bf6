// What the writers tell the main loop: how far they are, how long it took, what went wrong.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace guest {

using Clock = std::chrono::steady_clock;

/// One line to the console, whole: writers and main loop share it.
[[gnu::format(printf, 1, 2)]] void say(const char* format, ...);
/// `error ...`: the host fails the test on it.
[[gnu::format(printf, 1, 2)]] void complain(const char* format, ...);

/// Durations since the last report.
class Latency {
 public:
  void add(Clock::duration took) {
    const auto us = std::chrono::duration_cast<std::chrono::microseconds>(took).count();
    const std::lock_guard lock(mutex_);
    samples_us_.push_back(us);
  }

  /// COUNT,MEDIAN,P99,MAX in microseconds; begins the next period.
  std::string take() {
    std::vector<std::int64_t> samples;
    {
      const std::lock_guard lock(mutex_);
      samples.swap(samples_us_);
    }
    if (samples.empty()) return "0,0,0,0";
    std::sort(samples.begin(), samples.end());
    const auto at = [&](std::size_t percent) {
      return std::to_string(samples[(samples.size() - 1) * percent / 100]);
    };
    return std::to_string(samples.size()) + "," + at(50) + "," + at(99) + "," + at(100);
  }

 private:
  std::mutex mutex_;
  std::vector<std::int64_t> samples_us_;
};

/// Times what lies between its making and its end.
class Timed {
 public:
  explicit Timed(Latency& latency) : latency_(latency) {}
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;
  ~Timed() { latency_.add(Clock::now() - start_); }

 private:
  Latency& latency_;
  Clock::time_point start_ = Clock::now();
};

/// One disk's progress. Records are numbered from 1; all up to `acknowledged` were answered with
/// success, all up to `synced` were followed by a sync that was.
struct Progress {
  std::atomic<std::uint64_t> acknowledged{0};
  std::atomic<std::uint64_t> synced{0};
  Latency writes;
  Latency syncs;
};

struct Options {
  std::string a;  // directory: where disk A is mounted
  std::string b;  // block device or file
  std::uint64_t seed = 1;
  std::uint64_t records = 0;  // on each disk, then end; 0: until told to stop
  std::uint64_t pause_us = 1000;
  std::uint64_t dirty_mib = 0;  // memory that is written over and over
};

}  // namespace guest
