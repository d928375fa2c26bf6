// What is to be sent to one client: heads and payloads in order, sent in gathers, without copies.
//
// What must hold: bytes leave in the order of push(); a message counts until its last byte has
// left.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "mirror/payload.hpp"
#include "proxy/nbd_protocol.hpp"

namespace nbdferry::proxy {

// The bytes in front of a payload: a simple reply, or a structured chunk and the start of its body.
class MessageHead {
 public:
  template <typename T>
  MessageHead& add(T value) {
    nbd::store(bytes_.data() + size_, value);
    size_ += sizeof value;
    return *this;
  }
  [[nodiscard]] std::span<const std::byte> bytes() const { return {bytes_.data(), size_}; }

 private:
  std::array<std::byte, 32> bytes_;
  std::uint32_t size_ = 0;
};

// What a client gets back of its limits.
struct Credit {
  std::uint32_t requests = 0;
  std::uint64_t bytes = 0;
};

class ReplyQueue {
 public:
  enum class Result : std::uint8_t { sent, blocked, broken };

  // `credit` is given back when the message has left.
  void push(const MessageHead& head, Payload payload, Credit credit);

  // Sends as much as the socket takes. Blocked: go on when it is writable. Broken: the peer is
  // gone. What has left is added to `credit`.
  Result send(int socket, Credit& credit);

  // Nobody will read this any more; counts as left.
  void drop(Credit& credit);

  [[nodiscard]] bool empty() const { return first_ == messages_.size(); }
  [[nodiscard]] std::size_t messages() const { return messages_.size() - first_; }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }

 private:
  struct Message {
    MessageHead head;
    Payload payload;
    Credit credit;
  };
  void forget_sent(std::size_t bytes, Credit& credit);

  std::vector<Message> messages_;
  std::size_t first_ = 0;       // messages_ before it have left
  std::size_t first_sent_ = 0;  // bytes of the first message that have left
  std::size_t bytes_ = 0;       // still to be sent
};

}  // namespace nbdferry::proxy
