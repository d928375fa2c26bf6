// The files of listening unix sockets: who gets in, what is replaced, what is left alone.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <doctest/doctest.h>

#include "proxy/unix_socket.hpp"
#include "test/unit/proxy_disk_fixture.hpp"

namespace nbdferry::proxy::test {
namespace {

using boost::asio::local::stream_protocol;

// Listens for as long as it lives.
struct Listening {
  explicit Listening(const std::string& path, mode_t mode = 0600)
      : acceptor(io), file(acceptor, path, mode) {}
  boost::asio::io_context io{1};
  stream_protocol::acceptor acceptor;
  SocketFile file;
};

void leave_stale(const std::string& path) {
  boost::asio::io_context io;
  const stream_protocol::acceptor dead(io, stream_protocol::endpoint(path));
}

bool answers(const std::string& path) {
  boost::asio::io_context io;
  stream_protocol::socket socket(io);
  boost::system::error_code error;
  socket.connect(stream_protocol::endpoint(path), error);
  return !error;
}

mode_t mode_of(const std::string& path) {
  struct stat st {};
  REQUIRE(::lstat(path.c_str(), &st) == 0);
  return st.st_mode & 07777;
}

}  // namespace

TEST_CASE("a socket's file has the mode that was asked for, whatever the umask") {
  const TempDir dir;
  for (const mode_t mask : {0000, 0022, 0077, 0177}) {
    const mode_t old = ::umask(mask);
    for (const mode_t mode : {0600, 0660, 0666, 0777}) {
      const std::string path = dir / "s";
      const Listening socket(path, mode);
      CHECK(mode_of(path) == mode);
      CHECK(answers(path));
    }
    ::umask(old);
  }
}

TEST_CASE("a socket's file is never wider than asked for, not for a moment") {
  const TempDir dir;
  const std::string path = dir / "s";
  const mode_t old = ::umask(0);
  std::atomic<bool> stop{false};
  std::atomic<unsigned> seen{0};
  std::atomic<unsigned> widest{0};
  std::thread watcher([&] {
    while (!stop) {
      struct stat st {};
      if (::lstat(path.c_str(), &st) != 0) continue;
      ++seen;
      widest |= st.st_mode & 07777;
    }
  });
  for (int i = 0; i < 2000 || seen < 1000; ++i) const Listening socket(path, 0600);
  stop = true;
  watcher.join();
  ::umask(old);
  CHECK(widest == 0600);
}

TEST_CASE("of several that start at once on a stale socket one gets it") {
  const TempDir dir;
  const std::string path = dir / "s";
  for (int round = 0; round < 30; ++round) {
    leave_stale(path);
    constexpr int starters = 4;
    std::atomic<int> ready{0};
    std::vector<std::unique_ptr<Listening>> made(starters);
    std::vector<std::thread> threads;
    for (auto& mine : made) {
      threads.emplace_back([&] {
        for (++ready; ready < starters;) {
        }
        try {
          mine = std::make_unique<Listening>(path);
        } catch (const std::runtime_error&) {  // in use
        }
      });
    }
    for (auto& thread : threads) thread.join();
    CHECK(std::count_if(made.begin(), made.end(), [](const auto& m) { return m != nullptr; }) == 1);
    CHECK(answers(path));
  }
}

TEST_CASE(
    "a stale socket is replaced by one at a time; who keeps the others out can't do so for long") {
  using namespace std::chrono_literals;
  const TempDir dir;
  const std::string path = dir / "s";
  leave_stale(path);
  const UniqueFd folder(::open(dir.path().c_str(), O_RDONLY | O_DIRECTORY));
  REQUIRE(::flock(folder.get(), LOCK_EX) == 0);
  const auto begin = std::chrono::steady_clock::now();
  std::unique_ptr<Listening> made;
  std::thread starter([&] { made = std::make_unique<Listening>(path); });
  std::this_thread::sleep_for(100ms);
  CHECK_FALSE(answers(path));
  starter.join();
  CHECK(answers(path));
  CHECK(std::chrono::steady_clock::now() - begin < 5s);
}

TEST_CASE("a symbolic link in a socket's place is neither followed nor removed") {
  const TempDir dir;
  const std::string path = dir / "s";
  leave_stale(dir / "stale");
  std::ofstream(dir / "precious") << "precious";
  for (const char* target : {"stale", "precious", "absent"}) {
    std::filesystem::create_symlink(dir / target, path);
    CHECK_THROWS_WITH(Listening{path}, doctest::Contains("not a socket"));
    CHECK(std::filesystem::is_symlink(path));
    std::filesystem::remove(path);
  }
  CHECK(file_contents(dir / "precious") == "precious");
  CHECK(std::filesystem::exists(dir / "stale"));
  CHECK_FALSE(std::filesystem::exists(dir / "absent"));
}

TEST_CASE("another user's dead socket stays") {
  if (::geteuid() != 0) {
    MESSAGE("SKIPPED: only root can give a socket to another user");
    return;
  }
  const TempDir dir;
  const std::string path = dir / "s";
  leave_stale(path);
  REQUIRE(::chown(path.c_str(), 65534, 65534) == 0);
  CHECK_THROWS_WITH(Listening{path}, doctest::Contains("another user (uid 65534)"));
  CHECK(std::filesystem::exists(path));
}

TEST_CASE("at the end only our own socket is removed") {
  const TempDir dir;
  const std::string path = dir / "s";
  auto socket = std::make_unique<Listening>(path);
  std::filesystem::remove(path);
  std::ofstream(path) << "precious";
  socket.reset();
  CHECK(file_contents(path) == "precious");
}

}  // namespace nbdferry::proxy::test
