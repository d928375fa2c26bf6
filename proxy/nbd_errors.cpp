// The one mapping from our errors to the protocol's.
#include "proxy/nbd_errors.hpp"

namespace nbdferry::proxy::nbd {

std::uint32_t error_code(IoError error, bool fast_zero) {
  // The specification's numbers, which need not be this system's errno values.
  constexpr std::uint32_t eperm = 1;
  constexpr std::uint32_t eio = 5;
  constexpr std::uint32_t enomem = 12;
  constexpr std::uint32_t einval = 22;
  constexpr std::uint32_t enospc = 28;
  constexpr std::uint32_t enotsup = 95;
  constexpr std::uint32_t eshutdown = 108;
  switch (error) {
    case IoError::none:
      return 0;
    case IoError::not_permitted:
      return eperm;
    case IoError::no_memory:
      return enomem;
    case IoError::invalid:
    case IoError::overflow:
      return einval;
    case IoError::no_space:
      return enospc;
    case IoError::not_supported:
      return fast_zero ? enotsup : einval;
    case IoError::shutdown:
      return eshutdown;
    case IoError::io:
    case IoError::lost:
      break;
  }
  return eio;
}

}  // namespace nbdferry::proxy::nbd
