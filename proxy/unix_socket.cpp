// How the file comes to be and goes.
#include "proxy/unix_socket.hpp"

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <stdexcept>
#include <system_error>
#include <thread>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <fmt/format.h>

#include "proxy/unique_fd.hpp"

namespace nbdferry::proxy {
namespace {

using boost::asio::local::stream_protocol;

[[noreturn]] void fail(const std::string& path, const std::string& why) {
  throw std::runtime_error(fmt::format("cannot listen on {}: {}", path, why));
}

std::string system_message(int error) { return std::generic_category().message(error); }

// Held while a socket is looked at, removed and made: else two that start at once both find the
// stale one, and the second removes what the first has just made. Best effort: a file system may
// have no locks, and in a shared folder a stranger may keep this one.
UniqueFd lock_folder(const std::string& path) {
  using namespace std::chrono_literals;
  const auto folder = std::filesystem::path(path).parent_path();
  UniqueFd fd(::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  for (int tries = 0; fd && tries < 50; ++tries) {
    if (::flock(fd.get(), LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) break;
    std::this_thread::sleep_for(10ms);
  }
  return fd;
}

// Removes what a dead server of ours left behind.
void remove_stale(stream_protocol::acceptor& acceptor, const std::string& path) {
  struct stat found {};
  if (::lstat(path.c_str(), &found) != 0) {
    if (errno == ENOENT) return;
    fail(path, system_message(errno));
  }
  if (!S_ISSOCK(found.st_mode)) fail(path, "there is a file that is not a socket");
  boost::system::error_code error;
  stream_protocol::socket probe(acceptor.get_executor());
  probe.open();
  // Without waiting: a server whose queue of connections is full lives, too.
  probe.non_blocking(true);
  probe.connect(stream_protocol::endpoint(path), error);
  if (error == boost::asio::error::access_denied) fail(path, "somebody else's socket is there");
  if (error != boost::asio::error::connection_refused) {
    fail(path, "the socket is in use (is another nbdferry serving it?)");
  }
  if (found.st_uid != ::geteuid()) {
    fail(path,
         fmt::format("there is a dead socket of another user (uid {}): remove it if it may go",
                     found.st_uid));
  }
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) fail(path, system_message(errno));
}

// Wider than the umask let it be made. By descriptor: the name might lead elsewhere by now.
bool widen(const std::string& path, const struct stat& made, mode_t mode) {
  const UniqueFd fd(::open(path.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
  struct stat found {};
  if (!fd || ::fstat(fd.get(), &found) != 0) return false;
  if (found.st_dev != made.st_dev || found.st_ino != made.st_ino) {
    errno = EEXIST;
    return false;
  }
  return ::chmod(fmt::format("/proc/self/fd/{}", fd.get()).c_str(), mode) == 0;
}

}  // namespace

std::optional<UnixPeer> unix_peer(int socket) {
  ucred peer{};
  socklen_t size = sizeof peer;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return std::nullopt;
  return UnixPeer{peer.pid, peer.uid};
}

SocketFile::SocketFile(stream_protocol::acceptor& acceptor, std::string path, mode_t mode)
    : path_(std::move(path)) {
  // The kernel's limit is on the address, not on file names.
  if (path_.empty() || path_.size() >= sizeof(sockaddr_un::sun_path)) {
    fail(path_, fmt::format("a socket's path has 1 to {} bytes, this one {}",
                            sizeof(sockaddr_un::sun_path) - 1, path_.size()));
  }
  const UniqueFd lock = lock_folder(path_);
  remove_stale(acceptor, path_);
  boost::system::error_code error;
  acceptor.open(stream_protocol(), error);
  // On Linux bind() gives the file the mode of the socket, less the umask: no moment with wider
  // permissions, and no change of the umask, which all threads share.
  if (!error && ::fchmod(acceptor.native_handle(), mode) != 0) {
    error = {errno, boost::system::system_category()};
  }
  if (!error) acceptor.bind(stream_protocol::endpoint(path_), error);
  if (error) fail(path_, error.message());
  struct stat made {};
  if (::lstat(path_.c_str(), &made) != 0) fail(path_, system_message(errno));
  device_ = made.st_dev;
  inode_ = made.st_ino;
  if ((made.st_mode & 07777) != mode && !widen(path_, made, mode)) {
    error = {errno, boost::system::system_category()};
  }
  if (!error) acceptor.listen(boost::asio::socket_base::max_listen_connections, error);
  if (error) {
    ::unlink(path_.c_str());
    fail(path_, error.message());
  }
}

SocketFile::~SocketFile() {
  struct stat found {};
  if (path_.empty() || ::lstat(path_.c_str(), &found) != 0) return;
  if (found.st_dev == device_ && found.st_ino == inode_) ::unlink(path_.c_str());
}

}  // namespace nbdferry::proxy
