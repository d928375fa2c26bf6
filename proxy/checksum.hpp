// The checksum that both ends of a migration make of the same bytes: XXH3, 64 bits, seed 0 (as xxhsum -H3
// prints it). It finds damage, not malice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace nbdferry::proxy {

[[nodiscard]] std::uint64_t checksum_of(std::span<const std::byte> bytes);

}  // namespace nbdferry::proxy
