// The file of a listening unix socket: made without a moment of wrong permissions, removed by its
// owner.
//
// What must hold:
//  - A socket that somebody still answers on is never replaced, also when several start at once.
//  - Nothing is removed but a dead socket of this user's; no symbolic link is followed.
//  - The file never has wider permissions than asked for, not even for a moment.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include <sys/types.h>

#include <boost/asio/local/stream_protocol.hpp>

namespace nbdferry::proxy {

class SocketFile {
 public:
  // Makes `acceptor` listen at `path`; a stale socket there is replaced. `mode` is the file's,
  // whatever the umask. Throws std::runtime_error ("what failed: why") when the path is in use, too
  // long, or cannot be made.
  SocketFile(boost::asio::local::stream_protocol::acceptor& acceptor, std::string path,
             mode_t mode);
  SocketFile(SocketFile&& o) noexcept
      : path_(std::exchange(o.path_, {})), device_(o.device_), inode_(o.inode_) {}
  SocketFile& operator=(SocketFile&&) = delete;
  // Removes the file, unless somebody else has put another one there.
  ~SocketFile();

  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

// Who has connected, as the kernel saw it then.
struct UnixPeer {
  pid_t pid;
  uid_t uid;
};
[[nodiscard]] std::optional<UnixPeer> unix_peer(int socket);

}  // namespace nbdferry::proxy
