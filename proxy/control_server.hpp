// The control socket's server: HTTP with JSON bodies on a unix socket, one coroutine a connection.
// What can be asked is in control_api.hpp. Errors are {"error": "what failed: why"}: 4xx when the
// request is wrong, 409 when the disk's state does not allow it.
//
// What must hold: only root and the user of this process are obeyed, whatever the socket's file
// allows (it is 0600; others get 403); whatever a client sends or leaves unsent costs a bounded
// amount of memory and time, and nothing of the guest's.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include <boost/asio/io_context.hpp>

#include "proxy/export.hpp"
#include "proxy/limits.hpp"
#include "proxy/unique_fd.hpp"

namespace nbdferry::proxy {

struct ControlLimits {
  std::size_t connections = limits::control_connections_max;
  std::uint32_t header_bytes = limits::control_header_bytes_max;
  std::uint64_t body_bytes = limits::control_body_bytes_max;
  std::chrono::seconds idle = limits::control_timeout;
};

class ControlServer {
 public:
  // Listens at once. Throws std::runtime_error ("what failed: why"). The exports must outlive it.
  ControlServer(boost::asio::io_context& io, const std::string& path, std::vector<Export*> exports,
                ControlLimits limits = {});
  ~ControlServer();
  ControlServer(const ControlServer&) = delete;
  ControlServer& operator=(const ControlServer&) = delete;

  // Serves a connected unix stream socket.
  void serve(UniqueFd socket);
  [[nodiscard]] std::size_t connections() const;

  // Accepts nothing more, removes the socket, drops clients that wait for no answer. The others get
  // theirs when their command ends.
  void stop();

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace nbdferry::proxy
