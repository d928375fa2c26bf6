// Bytes received and not yet taken, contiguous.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <span>

#include "mirror/assert.hpp"

namespace nbdferry::proxy {

class InputBuffer {
 public:
  // Room for `capacity` bytes; memory that was never written costs nothing.
  explicit InputBuffer(std::size_t capacity)
      : bytes_(new std::byte[capacity]), capacity_(capacity) {}

  [[nodiscard]] std::span<const std::byte> bytes() const {
    return {bytes_.get() + begin_, end_ - begin_};
  }
  [[nodiscard]] std::size_t size() const { return end_ - begin_; }

  void take(std::size_t size) {
    NBDFERRY_ASSERT(size <= this->size(), "no more is taken than was received");
    begin_ += size;
    if (begin_ == end_) begin_ = end_ = 0;
  }

  // Where to receive; then say how much came. Moves what is there to the front: little, as a rule.
  [[nodiscard]] std::span<std::byte> room() {
    if (begin_ > 0) {
      std::memmove(bytes_.get(), bytes_.get() + begin_, size());
      end_ -= begin_;
      begin_ = 0;
    }
    return {bytes_.get() + end_, capacity_ - end_};
  }
  void received(std::size_t size) { end_ += size; }

  // More room, for what a peer has left behind.
  void grow(std::size_t capacity) {
    InputBuffer larger(capacity);
    NBDFERRY_ASSERT(capacity >= size(), "a buffer does not shrink");
    std::memcpy(larger.bytes_.get(), bytes_.get() + begin_, size());
    larger.end_ = size();
    *this = std::move(larger);
  }

 private:
  std::unique_ptr<std::byte[]> bytes_;
  std::size_t capacity_;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
};

}  // namespace nbdferry::proxy
