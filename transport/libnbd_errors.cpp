// libnbd reports errno values and "function: text" lines; see libnbd(3), "ERROR HANDLING".
#include "transport/libnbd_errors.hpp"

#include <cerrno>
#include <string_view>

#include <libnbd.h>

namespace nbdferry::transport {

IoError error_of_errno(int error) {
  switch (error) {
    case 0:
      return IoError::none;
    case EPERM:
      return IoError::not_permitted;
    case ENOMEM:
      return IoError::no_memory;
    case EINVAL:
      return IoError::invalid;
    case ENOSPC:
      return IoError::no_space;
    case EOVERFLOW:
      return IoError::overflow;
    case ENOTSUP:
      return IoError::not_supported;
    case ESHUTDOWN:
      return IoError::shutdown;
    default:
      return IoError::io;
  }
}

std::string last_libnbd_error() {
  const char* text = nbd_get_error();
  if (text == nullptr) return "unknown error";
  std::string_view line = text;
  constexpr std::string_view prefix = "nbd_";
  if (line.starts_with(prefix)) {
    const auto colon = line.find(": ");
    if (colon != std::string_view::npos) line.remove_prefix(colon + 2);
  }
  return std::string(line);
}

}  // namespace nbdferry::transport
