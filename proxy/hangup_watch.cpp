// HangupWatch: which sockets have been hung up by their peers.
#include "proxy/hangup_watch.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include <fmt/format.h>

namespace nbdferry::proxy {

HangupWatch::HangupWatch() : epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  if (!epoll_) {
    throw std::runtime_error(fmt::format("cannot watch connections: {}", std::strerror(errno)));
  }
}

bool HangupWatch::add(int socket, Session& session) {
  epoll_event event{};
  event.events = EPOLLRDHUP;
  event.data.ptr = &session;
  return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, socket, &event) == 0;
}

std::span<Session* const> HangupWatch::hung_up() {
  const int got = ::epoll_wait(epoll_.get(), events_.data(), static_cast<int>(events_.size()), 0);
  const auto count = static_cast<std::size_t>(std::max(got, 0));
  for (std::size_t i = 0; i < count; ++i) found_[i] = static_cast<Session*>(events_[i].data.ptr);
  return std::span(found_).first(count);
}

}  // namespace nbdferry::proxy
