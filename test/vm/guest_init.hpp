// What guest_writer does besides writing when it is the guest's first and only process.
#pragma once

#include "guest_report.hpp"

namespace guest {

/// File systems, modules, disk A mounted; options from the kernel's command line (`guest.KEY=VALUE`).
/// Throws std::runtime_error.
void start_machine(Options& options);

/// Disk A unmounted, everything written. False after an error, which it has said.
bool unmount_disks();

[[noreturn]] void power_off();

/// The kernel's log from now on: what it says of I/O errors, ext4 and hung tasks is an error.
class KernelLog {
 public:
  KernelLog();
  KernelLog(const KernelLog&) = delete;
  KernelLog& operator=(const KernelLog&) = delete;
  ~KernelLog();
  void watch() const;

 private:
  int fd_;
};

}  // namespace guest
