// What a status amounts to: one number of debt, one line for a person that says where things stand
// and what to do next.
#pragma once

#include <cstdint>
#include <string>

#include "proxy/export.hpp"

namespace nbdferry::proxy {

// All that the target does not hold for sure: stale, queued or unanswered, being copied. Suspect
// blocks are stale, so they are counted.
[[nodiscard]] std::uint64_t debt_bytes(const mirror::Status& status);

// What may go to the target: as much as it takes, and no more than --bandwidth. 0: not known yet.
[[nodiscard]] double most_bytes_per_second(const ExportStatus& status);

// Of a status whose other fields are filled in.
[[nodiscard]] std::string verdict_of(const ExportStatus& status);

}  // namespace nbdferry::proxy
