// A status as a person reads it: the whole, and the one line of a progress bar.
#pragma once

#include <string>

#include "proxy/export.hpp"

namespace nbdferry::proxy {

// Several lines, each with its newline.
[[nodiscard]] std::string status_to_text(const ExportStatus& status);

// One line without newline: phase, share that the target holds, bytes, rate, debt, time left.
// `bar_width` characters of bar; 0: none, for logs.
[[nodiscard]] std::string progress_line(const ExportStatus& status, unsigned bar_width);

}  // namespace nbdferry::proxy
