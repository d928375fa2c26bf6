// HangupWatch: which of many sockets have been hung up by their peers, in one system call.
//
// An epoll set that waits for nothing but the hang-up: data that arrives costs it nothing, and it is
// asked before each batch of requests (rule 8), so it must not look at each socket in turn.
#pragma once

#include <array>
#include <cstddef>
#include <span>

#include <sys/epoll.h>

#include "proxy/limits.hpp"
#include "proxy/unique_fd.hpp"

namespace nbdferry::proxy {

class Session;

class HangupWatch {
 public:
  // Throws std::runtime_error ("what failed: why").
  HangupWatch();

  // Until the socket is closed. False: the system has no room for it.
  [[nodiscard]] bool add(int socket, Session& session);

  // The sessions whose peers have hung up by now, those included that were found before. Valid
  // until the next call.
  [[nodiscard]] std::span<Session* const> hung_up();

 private:
  UniqueFd epoll_;
  std::array<epoll_event, limits::connections_max> events_{};
  std::array<Session*, limits::connections_max> found_{};
};

}  // namespace nbdferry::proxy
