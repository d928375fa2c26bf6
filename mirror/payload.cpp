// Where payloads live. Two levels, both by size class, so that capacities can be counted honestly:
//
//  - Spans: page-aligned allocations of their own, for the large classes, and for slabs.
//  - Slabs: spans cut into slots of one class, for the small ones. A slab that is all free becomes a
//    span again, but for the last one of its class.
//
// What must hold: spans that nobody uses add up to `spare_bytes_max` at most, over all classes; the
// rest is freed. That it goes back to the kernel then is the program's doing (proxy/cli_serve.cpp).
#include "mirror/payload.hpp"

#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "mirror/assert.hpp"

namespace nbdferry {

namespace detail {
struct Slab {
  std::byte* memory;
  std::vector<Storage> slots;
  std::vector<Storage*> free;
  std::size_t place = 0;  // among the slabs of its class that have free slots
};
}  // namespace detail

namespace {

using detail::Slab;
using detail::Storage;

constexpr std::size_t page = 4096;
constexpr std::size_t capacity_min = 512;
constexpr std::size_t capacity_max = 64UL * 1024 * 1024;  // larger than any request
constexpr std::size_t slot_max = 32UL * 1024;
constexpr std::size_t slab_bytes = 256UL * 1024;
constexpr std::size_t spare_bytes_max = 8UL * 1024 * 1024;

// Powers of two up to a page; from there four classes to each doubling, in whole pages.
struct SizeClass {
  unsigned index;
  std::size_t capacity;
};
constexpr SizeClass class_of(std::size_t size) {
  if (size <= page) {
    const std::size_t capacity = std::bit_ceil(std::max(size, capacity_min));
    return {static_cast<unsigned>(std::countr_zero(capacity / capacity_min)), capacity};
  }
  const std::size_t doubled = std::bit_ceil(size);
  const std::size_t step = std::max(page, doubled / 8);
  const std::size_t capacity = (size + step - 1) / step * step;
  const auto quarter = static_cast<unsigned>((capacity - doubled / 2) / (doubled / 8));  // 1 to 4
  return {static_cast<unsigned>(std::countr_zero(doubled / page)) * 4 - 1 + quarter, capacity};
}
constexpr unsigned class_count = class_of(capacity_max).index + 1;

class Pool {
 public:
  Storage* allocate(std::size_t size) {
    const SizeClass c = class_of(size);
    if (c.capacity > slot_max) {
      return new Storage{span(c), nullptr, 1, static_cast<std::uint32_t>(c.capacity)};
    }
    auto& partial = partial_[c.index];
    if (partial.empty()) add_slab(c);
    Slab& slab = *partial.back();
    Storage* s = slab.free.back();
    slab.free.pop_back();
    if (slab.free.empty()) partial.pop_back();
    s->refs = 1;
    return s;
  }

  void free(Storage* s) {
    const SizeClass c = class_of(s->capacity);
    if (s->slab == nullptr) {
      keep(c, s->data);
      delete s;
      return;
    }
    Slab& slab = *s->slab;
    auto& partial = partial_[c.index];
    if (slab.free.empty()) {
      slab.place = partial.size();
      partial.push_back(&slab);
    }
    slab.free.push_back(s);
    if (slab.free.size() < slab.slots.size() || partial.size() == 1) return;
    partial.back()->place = slab.place;
    std::swap(partial[slab.place], partial.back());
    partial.pop_back();
    keep(class_of(slab_bytes), slab.memory);
    delete &slab;
  }

 private:
  void add_slab(SizeClass c) {
    auto* slab = new Slab{span(class_of(slab_bytes)), {}, {}};
    const std::size_t count = slab_bytes / c.capacity;
    slab->slots.reserve(count);
    slab->free.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      slab->slots.push_back(
          {slab->memory + i * c.capacity, slab, 0, static_cast<std::uint32_t>(c.capacity)});
    }
    for (std::size_t i = count; i-- > 0;) slab->free.push_back(&slab->slots[i]);
    partial_[c.index].push_back(slab);
  }

  std::byte* span(SizeClass c) {
    auto& list = spare_[c.index];
    if (!list.empty()) {
      std::byte* memory = list.back();
      list.pop_back();
      spare_bytes_ -= c.capacity;
      return memory;
    }
    void* memory = std::aligned_alloc(page, c.capacity);
    if (memory == nullptr) throw std::bad_alloc();
    return static_cast<std::byte*>(memory);
  }

  // For the next one; what is too much is taken from the class that has the most.
  void keep(SizeClass c, std::byte* memory) {
    spare_[c.index].push_back(memory);
    capacity_[c.index] = c.capacity;
    spare_bytes_ += c.capacity;
    while (spare_bytes_ > spare_bytes_max) {
      unsigned most = 0;
      for (unsigned i = 1; i < class_count; ++i) {
        if (spare_[i].size() * capacity_[i] > spare_[most].size() * capacity_[most]) most = i;
      }
      std::free(spare_[most].back());
      spare_[most].pop_back();
      spare_bytes_ -= capacity_[most];
    }
  }

  std::array<std::vector<Slab*>, class_count> partial_;  // slabs with free slots
  std::array<std::vector<std::byte*>, class_count> spare_;
  std::array<std::size_t, class_count> capacity_{};  // of the classes that had a spare
  std::size_t spare_bytes_ = 0;
};

Pool& pool() {
  // Leaked on purpose: payloads with static storage may outlive any destructor order.
  thread_local Pool* instance = new Pool;
  return *instance;
}

}  // namespace

Storage* detail::allocate_storage(std::size_t size) {
  NBDFERRY_ASSERT(size <= capacity_max, "payload larger than any request");
  return pool().allocate(size);
}

void detail::free_storage(Storage* s) { pool().free(s); }

std::size_t Payload::compact_bytes() const { return empty() ? 0 : class_of(size_).capacity; }

Payload Payload::compact() const {
  return storage_bytes() == compact_bytes() ? *this : copy_of(bytes());
}

Payload Payload::slice(std::size_t offset, std::size_t size) const {
  NBDFERRY_ASSERT(offset + size <= size_, "slice outside of its payload");
  Payload p = *this;
  p.offset_ += static_cast<std::uint32_t>(offset);
  p.size_ = static_cast<std::uint32_t>(size);
  return p;
}

Payload Payload::copy_of(std::span<const std::byte> bytes) {
  if (bytes.empty()) return {};
  Buffer b(bytes.size());
  std::memcpy(b.data(), bytes.data(), bytes.size());
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
