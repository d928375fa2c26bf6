#include "proxy/checksum.hpp"

#define XXH_INLINE_ALL  // all of it is in the header: no library to ship
#include <xxhash.h>

namespace nbdferry::proxy {

std::uint64_t checksum_of(std::span<const std::byte> bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

}  // namespace nbdferry::proxy
