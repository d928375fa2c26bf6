// Process 1. If it ends, or the kernel oopses, the kernel panics and, with panic=-1 and QEMU's
// -no-reboot, the machine is gone: a broken guest is not a silent one.
#include "guest_init.hpp"

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string_view>
#include <thread>

#include "guest_options.hpp"
#include <fcntl.h>
#include <linux/reboot.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

namespace guest {
namespace {

constexpr auto disk_a = "/dev/vda";
constexpr auto disk_b = "/dev/vdb";
constexpr auto mount_point = "/a";

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(what + ": " + std::strerror(errno));
}

void mount_at(const char* what, const char* where, const char* type, const char* data = nullptr) {
  ::mkdir(where, 0755);
  // /dev may have been mounted by the kernel.
  if (::mount(what, where, type, 0, data) != 0 && errno != EBUSY) fail(where);
}

/// In the order of their names: guest.py numbers them, what others need first.
void load_modules() {
  std::set<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator("/modules")) {
    files.insert(entry.path());
  }
  for (const auto& file : files) {
    const int fd = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0 || ::syscall(SYS_finit_module, fd, "", 0) != 0) fail(file);
    ::close(fd);
  }
}

void wait_for_disk(const char* path) {
  const auto end = Clock::now() + std::chrono::seconds(10);
  while (::access(path, F_OK) != 0) {
    if (Clock::now() > end) fail(path);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

/// The console carries lines both ways: no echo, no carriage returns, reads that don't wait.
void prepare_console() {
  termios settings{};
  if (::tcgetattr(0, &settings) != 0) return;
  ::cfmakeraw(&settings);
  ::tcsetattr(0, TCSANOW, &settings);
}

}  // namespace

void start_machine(Options& options) {
  prepare_console();
  mount_at("proc", "/proc", "proc");
  mount_at("dev", "/dev", "devtmpfs");
  load_modules();
  std::ifstream command_line("/proc/cmdline");
  for (std::string word; command_line >> word;) {
    if (word.starts_with("guest.")) set_option(options, std::string_view(word).substr(6));
  }
  wait_for_disk(disk_a);
  wait_for_disk(disk_b);
  mount_at(disk_a, mount_point, "ext4", "discard");
  options.a = std::string(mount_point) + "/records";
  if (::mkdir(options.a.c_str(), 0755) != 0) fail(options.a);
  options.b = disk_b;
}

bool unmount_disks() {
  if (::umount(mount_point) == 0) return true;
  complain("umount: %s", std::strerror(errno));
  return false;
}

void power_off() {
  ::sync();
  ::tcdrain(1);
  ::reboot(LINUX_REBOOT_CMD_POWER_OFF);
  std::abort();
}

KernelLog::KernelLog() : fd_(::open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC)) {
  if (fd_ < 0) fail("/dev/kmsg");
  ::lseek(fd_, 0, SEEK_END);
}

KernelLog::~KernelLog() { ::close(fd_); }

void KernelLog::watch() const {
  static constexpr std::array<std::string_view, 6> bad = {
      "error", "EXT4-fs warning", "blocked for more than", "lockup", "stall", "Call Trace"};
  std::array<char, 8192> buffer;
  for (;;) {
    const auto done = ::read(fd_, buffer.data(), buffer.size() - 1);
    if (done < 0 && errno == EPIPE) continue;  // overwritten before we came: go on with the oldest
    if (done <= 0) return;
    // PRIORITY,SEQUENCE,TIME,FLAGS;TEXT\n and lines of details.
    const std::string_view line(buffer.data(), static_cast<std::size_t>(done));
    const auto begin = line.find(';') + 1;
    const auto text = line.substr(begin, line.find('\n') - begin);
    // The lowest three bits are the level: 3 is an error, 0 the end.
    const bool serious = (std::atoi(buffer.data()) & 7) <= 3;
    bool found = serious;
    for (const auto word : bad) found |= text.find(word) != std::string_view::npos;
    if (found) complain("kernel: %.*s", static_cast<int>(text.size()), text.data());
  }
}

}  // namespace guest
