// A TCP peer that is gone is noticed within half a minute, whether something is to be sent or not.
#pragma once

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

namespace nbdferry::transport {

// Best effort; a unix socket needs none of it, and takes none.
inline void limit_silence(int fd) {
  const auto set = [fd](int level, int name, int value) {
    (void)::setsockopt(fd, level, name, &value, sizeof value);
  };
  set(IPPROTO_TCP, TCP_USER_TIMEOUT,
      30'000);  // sent data that nobody acknowledges for so long (ms): give up
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 10);  // a silent peer is probed after this time (s) …
  set(IPPROTO_TCP, TCP_KEEPINTVL, 5);  // … this often …
  set(IPPROTO_TCP, TCP_KEEPCNT, 4);    // … and given up after so many
}

}  // namespace nbdferry::transport
