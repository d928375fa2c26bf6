// What is to be sent to one client.
#include "proxy/reply_queue.hpp"

#include <algorithm>
#include <cerrno>
#include <utility>

#include <sys/socket.h>
#include <sys/uio.h>

#include "mirror/assert.hpp"

namespace nbdferry::proxy {
namespace {

// Two for each of about sixteen replies: more in one call gains nothing.
constexpr std::size_t pieces_max = 32;

class Pieces {
 public:
  // Skips the first `skip` bytes of what is added, once.
  explicit Pieces(std::size_t skip) : skip_(skip) {}

  [[nodiscard]] bool full() const { return count_ + 2 > pieces_max; }

  void add(std::span<const std::byte> bytes) {
    const auto skipped = std::min(skip_, bytes.size());
    skip_ -= skipped;
    bytes = bytes.subspan(skipped);
    if (bytes.empty()) return;
    // sendmsg() only reads; iovec knows no const.
    pieces_[count_++] = {const_cast<std::byte*>(bytes.data()), bytes.size()};
    bytes_ += bytes.size();
  }

  [[nodiscard]] std::size_t bytes() const { return bytes_; }

  [[nodiscard]] ssize_t send(int socket) {
    msghdr message{};
    message.msg_iov = pieces_.data();
    message.msg_iovlen = count_;
    ssize_t sent = 0;
    do {
      sent = ::sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    return sent;
  }

 private:
  std::array<iovec, pieces_max> pieces_;
  std::size_t count_ = 0;
  std::size_t skip_;
  std::size_t bytes_ = 0;
};

}  // namespace

void ReplyQueue::push(const MessageHead& head, Payload payload, Credit credit) {
  bytes_ += head.bytes().size() + payload.size();
  messages_.push_back({head, std::move(payload), credit});
}

ReplyQueue::Result ReplyQueue::send(int socket, Credit& credit) {
  while (!empty()) {
    Pieces pieces(first_sent_);
    for (auto i = first_; i < messages_.size() && !pieces.full(); ++i) {
      pieces.add(messages_[i].head.bytes());
      pieces.add(messages_[i].payload.bytes());
    }
    const ssize_t sent = pieces.send(socket);
    if (sent < 0) {
      return errno == EAGAIN || errno == EWOULDBLOCK ? Result::blocked : Result::broken;
    }
    const bool all = static_cast<std::size_t>(sent) == pieces.bytes();
    forget_sent(static_cast<std::size_t>(sent), credit);
    if (!all) return Result::blocked;
  }
  return Result::sent;
}

void ReplyQueue::forget_sent(std::size_t bytes, Credit& credit) {
  bytes_ -= bytes;
  bytes += first_sent_;
  while (first_ < messages_.size()) {
    Message& message = messages_[first_];
    const auto size = message.head.bytes().size() + message.payload.size();
    if (bytes < size) break;
    bytes -= size;
    credit.requests += message.credit.requests;
    credit.bytes += message.credit.bytes;
    message.payload = {};
    ++first_;
  }
  first_sent_ = bytes;
  NBDFERRY_ASSERT(!empty() || bytes == 0, "no more is sent than there was");
  // The front of the vector is reclaimed when that moves less than what it frees.
  if (first_ * 2 >= messages_.size()) {
    messages_.erase(messages_.begin(), messages_.begin() + static_cast<std::ptrdiff_t>(first_));
    first_ = 0;
  }
}

void ReplyQueue::drop(Credit& credit) {
  if (empty()) return;
  const auto rest = bytes_;
  forget_sent(rest, credit);
}

}  // namespace nbdferry::proxy
