#include "mirror/payload.hpp"

#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "mirror/assert.hpp"

namespace nbdferry {

namespace {

// Size classes are powers of two. Up to `slab_class_max` they are carved out of slabs that are kept
// for good (a burst's high-water mark, bounded by the limits on requests in flight); larger ones
// are allocated on their own, with a short free list each.
constexpr std::uint32_t class_min = 9;        // 512 bytes
constexpr std::uint32_t slab_class_max = 14;  // 16 KiB
constexpr std::uint32_t class_max = 26;       // 64 MiB
constexpr std::size_t slab_bytes = 256 * 1024;
constexpr std::size_t page = 4096;
constexpr std::size_t kept_large_bytes = 8 * 1024 * 1024;  // per class

struct Pool {
  std::array<std::vector<detail::Storage*>, class_max + 1> free;

  void grow(std::uint32_t size_class) {
    const std::size_t size = std::size_t{1} << size_class;
    const std::size_t total = size_class <= slab_class_max ? slab_bytes : size;
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(page, total));
    if (memory == nullptr) throw std::bad_alloc();
    for (std::size_t at = 0; at < total; at += size) {
      free[size_class].push_back(
          new detail::Storage{memory + at, 0, static_cast<std::uint32_t>(size), size_class});
    }
  }
};

Pool& pool() {
  // Leaked on purpose: payloads with static storage may outlive any destructor order.
  thread_local Pool* instance = new Pool;
  return *instance;
}

}  // namespace

detail::Storage* detail::allocate_storage(std::size_t size) {
  NBDFERRY_ASSERT(size <= (std::size_t{1} << class_max), "payload larger than any request");
  const auto wanted = static_cast<std::uint32_t>(std::bit_width(size == 0 ? 0 : size - 1));
  const std::uint32_t size_class = std::max(class_min, wanted);
  auto& list = pool().free[size_class];
  if (list.empty()) pool().grow(size_class);
  auto* s = list.back();
  list.pop_back();
  s->refs = 1;
  return s;
}

void detail::free_storage(Storage* s) {
  auto& list = pool().free[s->size_class];
  if (s->size_class > slab_class_max && list.size() * s->capacity >= kept_large_bytes) {
    std::free(s->data);
    delete s;
    return;
  }
  list.push_back(s);
}

Payload Payload::slice(std::size_t offset, std::size_t size) const {
  NBDFERRY_ASSERT(offset + size <= size_, "slice outside of its payload");
  Payload p = *this;
  p.offset_ += static_cast<std::uint32_t>(offset);
  p.size_ = static_cast<std::uint32_t>(size);
  return p;
}

Payload Payload::copy_of(std::span<const std::byte> bytes) {
  Buffer b(bytes.size());
  if (!bytes.empty()) std::memcpy(b.data(), bytes.data(), bytes.size());
  return std::move(b).freeze();
}

Payload Payload::zeroes(std::size_t size) {
  Buffer b(size);
  std::memset(b.data(), 0, size);
  return std::move(b).freeze();
}

Payload Buffer::freeze(std::size_t size) && {
  NBDFERRY_ASSERT(size <= size_, "freezing more than the buffer holds");
  Payload p;
  p.storage_ = std::exchange(storage_, nullptr);
  p.size_ = static_cast<std::uint32_t>(size);
  size_ = 0;
  return p;
}

}  // namespace nbdferry
