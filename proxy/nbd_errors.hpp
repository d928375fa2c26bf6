// The one mapping from our errors to the protocol's (NBD protocol, "Error values").
#pragma once

#include <cstdint>

#include "mirror/types.hpp"

namespace nbdferry::proxy::nbd {

// One of the eight codes, or 0. `fast_zero`: the request was a WRITE_ZEROES with FAST_ZERO, the
// only one that may be told ENOTSUP. EOVERFLOW is never told: no read of ours is too long for one
// chunk.
[[nodiscard]] std::uint32_t error_code(IoError error, bool fast_zero);

}  // namespace nbdferry::proxy::nbd
