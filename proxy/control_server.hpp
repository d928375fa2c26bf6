// The control socket's server: HTTP with JSON bodies on a unix socket, one coroutine a connection.
// What can be asked is in control_api.hpp. Errors are {"error": "what failed: why"}: 4xx when the
// request is wrong, 409 when the disk's state does not allow it.
//
// What must hold: only the socket's owner gets in (mode 0600); whatever a client sends or leaves
// unsent costs a bounded amount of memory and time, and nothing of the guest's.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include <boost/asio/io_context.hpp>

#include "proxy/export.hpp"

namespace nbdferry::proxy {

struct ControlLimits {
  std::size_t connections = 32;
  std::uint32_t header_bytes = 8 * 1024;
  std::uint64_t body_bytes = 64 * 1024;
  std::chrono::seconds idle{60};  // a whole request must have come by then, or an answer gone
};

class ControlServer {
 public:
  // Listens at once. Throws std::runtime_error ("what failed: why"). The exports must outlive it.
  ControlServer(boost::asio::io_context& io, const std::string& path, std::vector<Export*> exports,
                ControlLimits limits = {});
  ~ControlServer();
  ControlServer(const ControlServer&) = delete;
  ControlServer& operator=(const ControlServer&) = delete;

  // Accepts nothing more, removes the socket, drops clients that wait for no answer. The others get
  // theirs when their command ends.
  void stop();

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace nbdferry::proxy
