// The file of a listening unix socket: made without a moment of wrong permissions, removed by its
// owner.
//
// What must hold: a socket that somebody still answers on is never replaced, and nothing but a
// socket is ever removed.
#pragma once

#include <string>
#include <utility>

#include <sys/types.h>

#include <boost/asio/local/stream_protocol.hpp>

namespace nbdferry::proxy {

class SocketFile {
 public:
  // Makes `acceptor` listen at `path`; a stale socket there is replaced. Throws std::runtime_error
  // ("what failed: why") when the path is in use, too long, or cannot be made.
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

}  // namespace nbdferry::proxy
