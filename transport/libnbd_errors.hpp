// The one place where libnbd's errors become ours.
#pragma once

#include <string>

#include "mirror/types.hpp"

namespace nbdferry::transport {

// What a completion callback was given. 0 is success; the server's answers are NBD's eight codes,
// everything else comes from libnbd itself. Says nothing about whether the server answered at all:
// that is for the connection to know (a dead handle's commands are `lost`).
[[nodiscard]] IoError error_of_errno(int error);

// libnbd's last error on this thread, without the name of the function at its front.
[[nodiscard]] std::string last_libnbd_error();

}  // namespace nbdferry::transport
