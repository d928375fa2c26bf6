// How the file comes to be and goes.
#include "proxy/unix_socket.hpp"

#include <cerrno>
#include <stdexcept>
#include <system_error>

#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <fmt/format.h>

namespace nbdferry::proxy {
namespace {

using boost::asio::local::stream_protocol;

[[noreturn]] void fail(const std::string& path, const std::string& why) {
  throw std::runtime_error(fmt::format("cannot listen on {}: {}", path, why));
}

std::string system_message(int error) { return std::generic_category().message(error); }

// Removes what a dead server left behind.
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
  if (error != boost::asio::error::connection_refused) {
    fail(path, "the socket is in use (is another nbdferry serving it?)");
  }
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) fail(path, system_message(errno));
}

}  // namespace

SocketFile::SocketFile(stream_protocol::acceptor& acceptor, std::string path, mode_t mode)
    : path_(std::move(path)) {
  // The kernel's limit is on the address, not on file names.
  if (path_.empty() || path_.size() >= sizeof(sockaddr_un::sun_path)) {
    fail(path_, fmt::format("a socket's path has 1 to {} bytes, this one {}",
                            sizeof(sockaddr_un::sun_path) - 1, path_.size()));
  }
  remove_stale(acceptor, path_);
  boost::system::error_code error;
  acceptor.open(stream_protocol(), error);
  // On Linux bind() gives the file the mode of the socket: no moment with other permissions.
  if (!error && ::fchmod(acceptor.native_handle(), mode) != 0) {
    error = {errno, boost::system::system_category()};
  }
  if (!error) acceptor.bind(stream_protocol::endpoint(path_), error);
  if (error) fail(path_, error.message());
  struct stat made {};
  if (::lstat(path_.c_str(), &made) != 0) fail(path_, system_message(errno));
  device_ = made.st_dev;
  inode_ = made.st_ino;
  acceptor.listen(boost::asio::socket_base::max_listen_connections, error);
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
