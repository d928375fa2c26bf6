// GuestMeter: what the guest is doing, per second, without a timer: windows close when looked at.
#pragma once

#include <cstdint>

#include "mirror/types.hpp"

namespace nbdferry::proxy {

class GuestMeter {
 public:
  struct Rates {
    double read_iops = 0;
    double write_iops = 0;
    double write_bytes_per_second = 0;
  };

  void count(Command command, std::uint64_t bytes, Time now) {
    roll(now);
    if (is_write(command)) {
      ++writes_;
      if (command == Command::write) write_bytes_ += bytes;
    } else if (command == Command::read) {
      ++reads_;
    }
  }

  [[nodiscard]] const Rates& rates(Time now) {
    roll(now);
    return rates_;
  }

 private:
  static constexpr Duration window = std::chrono::seconds(1);

  void roll(Time now) {
    if (now - since_ < window) return;
    const double seconds = std::chrono::duration<double>(now - since_).count();
    rates_ = {static_cast<double>(reads_) / seconds, static_cast<double>(writes_) / seconds,
              static_cast<double>(write_bytes_) / seconds};
    since_ = now;
    reads_ = writes_ = write_bytes_ = 0;
  }

  Time since_{0};
  std::uint64_t reads_ = 0;
  std::uint64_t writes_ = 0;
  std::uint64_t write_bytes_ = 0;
  Rates rates_;
};

}  // namespace nbdferry::proxy
