// A way to be another user for a moment.
#pragma once

#include <cstdio>
#include <functional>
#include <thread>

#include <sys/syscall.h>
#include <unistd.h>

namespace nbdferry::proxy::test {

// Runs `f` as an ordinary user, in a thread: to the kernel each has its own. False, and a line that
// says so: only root can.
inline bool as_nobody(const std::function<void()>& f) {
  if (::geteuid() != 0) {
    std::printf("SKIPPED: a test that has to be root to try what another user may do\n");
    return false;
  }
  bool changed = false;
  std::thread([&] {
    constexpr uid_t nobody = 65534;
    const auto unchanged = static_cast<uid_t>(-1);
    changed = ::syscall(SYS_setresuid, unchanged, nobody, unchanged) == 0;
    if (changed) f();
  }).join();
  return changed;
}

}  // namespace nbdferry::proxy::test
