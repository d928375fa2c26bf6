// Preloaded into nbdferry: stops the process (SIGSTOP, all of its threads) at one point of the write of an
// ownership record, so that a test can decide who dies there. The file that NBDFERRY_STOP names holds
// the point's name, and is removed when it is reached:
//   create       before the first record's file is written      (DISK.owner.new)
//   created      it is complete, and has no name yet
//   named        it has its name, the folder is not synced yet
//   overwrite    before the first slot of an existing record is written
//   torn         the slot's first 100 bytes are written
//   overwritten  the slot is durable
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

constexpr std::size_t torn_bytes = 100;  // its first sector may hold all that differs

bool wanted(std::string_view point) {
  const char* file = std::getenv("NBDFERRY_STOP");
  const int fd = file == nullptr ? -1 : ::open(file, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  char text[32];
  const ssize_t n = ::read(fd, text, sizeof text);
  ::close(fd);
  if (n < 0 || std::string_view(text, static_cast<std::size_t>(n)) != point) return false;
  ::unlink(file);
  return true;
}

void reached(std::string_view point) {
  if (wanted(point)) ::kill(::getpid(), SIGSTOP);
}

bool is(int fd, std::string_view ending) {
  char link[64];
  char path[4096];
  std::snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = ::readlink(link, path, sizeof path);
  return n > 0 && std::string_view(path, static_cast<std::size_t>(n)).ends_with(ending);
}

template <typename F>
F* real(const char* name) {
  return reinterpret_cast<F*>(::dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" ssize_t pwritev2(int fd, const iovec* v, int count, off_t offset, int flags) {
  static auto* const next = real<decltype(pwritev2)>("pwritev2");
  const bool record = (flags & RWF_DSYNC) != 0 && is(fd, ".owner");
  if (is(fd, ".owner.new")) reached("create");
  if (record) {
    reached("overwrite");
    if (wanted("torn") && ::pwrite(fd, v[0].iov_base, torn_bytes, offset) > 0) {
      ::kill(::getpid(), SIGSTOP);
    }
  }
  const ssize_t n = next(fd, v, count, offset, flags);
  if (record) reached("overwritten");
  return n;
}

extern "C" int renameat2(int from_folder, const char* from, int to_folder, const char* to,
                         unsigned flags) {
  static auto* const next = real<decltype(renameat2)>("renameat2");
  const bool record = std::string_view(to).ends_with(".owner");
  if (record) reached("created");
  const int result = next(from_folder, from, to_folder, to, flags);
  if (record) reached("named");
  return result;
}
