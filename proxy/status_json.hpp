// An export's status as JSON, and back: what GET /status answers and `status --json` prints.
//
// Sizes are bytes, times are in the unit of their name. Fields are added, never renamed: scripts
// read them.
#pragma once

#include <boost/json/fwd.hpp>

#include "proxy/export.hpp"

namespace nbdferry::proxy {

[[nodiscard]] boost::json::object status_to_json(const ExportStatus& status);

// Throws std::invalid_argument when a field is absent or of another type.
[[nodiscard]] ExportStatus status_from_json(const boost::json::object& object);

}  // namespace nbdferry::proxy
