// Payload: refcounted, immutable bytes on their way from a socket to disks and back.
//
// A Buffer is filled once by its only owner, then frozen into a Payload; slices of it share the
// storage. Storage is aligned to min(its capacity, 4 KiB), so that O_DIRECT can use what is 4 KiB
// or larger; a capacity exceeds the size asked for by less than a quarter, or a page. Whoever
// bounds what it holds counts storage, not sizes.
// Counts are not atomic: buffers belong to the one thread of their export.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

namespace nbdferry {

namespace detail {
struct Slab;
struct Storage {
  std::byte* data;
  Slab* slab;  // of which it is a slot; null: memory of its own
  std::uint32_t refs;
  std::uint32_t capacity;
};
Storage* allocate_storage(std::size_t size);  // never null; throws std::bad_alloc
void free_storage(Storage* s);
}  // namespace detail

class Payload {
 public:
  Payload() = default;
  Payload(const Payload& o) : storage_(o.storage_), offset_(o.offset_), size_(o.size_) {
    if (storage_ != nullptr) ++storage_->refs;
  }
  Payload(Payload&& o) noexcept
      : storage_(std::exchange(o.storage_, nullptr)),
        offset_(std::exchange(o.offset_, 0)),
        size_(std::exchange(o.size_, 0)) {}
  Payload& operator=(Payload o) noexcept {
    std::swap(storage_, o.storage_);
    std::swap(offset_, o.offset_);
    std::swap(size_, o.size_);
    return *this;
  }
  ~Payload() {
    if (storage_ != nullptr && --storage_->refs == 0) detail::free_storage(storage_);
  }

  [[nodiscard]] const std::byte* data() const {
    return storage_ == nullptr ? nullptr : storage_->data + offset_;
  }
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] bool empty() const { return size_ == 0; }
  [[nodiscard]] std::span<const std::byte> bytes() const { return {data(), size_}; }

  // `size` bytes from `offset`; shares the storage.
  [[nodiscard]] Payload slice(std::size_t offset, std::size_t size) const;

  // The memory that this payload keeps alive, which slices share.
  [[nodiscard]] std::size_t storage_bytes() const {
    return storage_ == nullptr ? 0 : storage_->capacity;
  }

  // The same bytes for keeping: itself, or a copy where it would keep more memory alive than its
  // size needs, as a slice does. And the memory that this takes, which nothing else shares.
  [[nodiscard]] Payload compact() const;
  [[nodiscard]] std::size_t compact_bytes() const;

  [[nodiscard]] static Payload copy_of(std::span<const std::byte> bytes);
  [[nodiscard]] static Payload zeroes(std::size_t size);

 private:
  friend class Buffer;
  detail::Storage* storage_ = nullptr;
  std::uint32_t offset_ = 0;
  std::uint32_t size_ = 0;
};

// Writable memory with one owner. Contents are uninitialised.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t size)
      : storage_(detail::allocate_storage(size)), size_(static_cast<std::uint32_t>(size)) {}
  Buffer(Buffer&& o) noexcept
      : storage_(std::exchange(o.storage_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(storage_, o.storage_);
    std::swap(size_, o.size_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (storage_ != nullptr) detail::free_storage(storage_);
  }

  [[nodiscard]] std::byte* data() const { return storage_ == nullptr ? nullptr : storage_->data; }
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] std::span<std::byte> bytes() const { return {data(), size_}; }

  // The first `size` bytes become immutable; the buffer is empty afterwards.
  [[nodiscard]] Payload freeze(std::size_t size) &&;
  [[nodiscard]] Payload freeze() && { return std::move(*this).freeze(size_); }

 private:
  detail::Storage* storage_ = nullptr;
  std::uint32_t size_ = 0;
};

}  // namespace nbdferry
