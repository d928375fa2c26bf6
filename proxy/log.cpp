// Log lines: one line to standard error, `nbdferry: …`.
#include "proxy/log.hpp"

#include <algorithm>
#include <cstdio>
#include <string>

namespace nbdferry::proxy {

void log_line(std::string_view text) {
  std::string line = "nbdferry: ";
  line += text;
  std::replace_if(line.begin(), line.end(), is_control, '?');
  line += '\n';
  // One write: lines of several processes on one terminal stay whole.
  std::fwrite(line.data(), 1, line.size(), stderr);
}

}  // namespace nbdferry::proxy
