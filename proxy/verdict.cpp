// What a status amounts to.
#include "proxy/verdict.hpp"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "proxy/units.hpp"

namespace nbdferry::proxy {
namespace {

using mirror::Phase;

constexpr Duration silence_told = std::chrono::seconds(1);
constexpr double keeps_up = 0.9;  // of what the target takes, the guest may add so much

double quarantine_seconds(const mirror::Status& core) {
  return std::ceil(std::chrono::duration<double>(core.quarantine_left).count());
}

bool limited_by_bandwidth(const ExportStatus& status) {
  return status.bandwidth != 0 &&
         most_bytes_per_second(status) >= static_cast<double>(status.bandwidth);
}

// Why no more than most_bytes_per_second().
std::string what_limits(const ExportStatus& status) {
  return fmt::format("{} {}/s",
                     limited_by_bandwidth(status) ? "--bandwidth allows" : "the target takes",
                     format_size(most_bytes_per_second(status)));
}

std::string by_deadline(const ExportStatus& status) {
  const mirror::Status& core = status.core;
  const double left = std::ceil(std::chrono::duration<double>(*core.deadline_left).count());
  if (left == 0) {
    return "copying as fast as can be: the deadline is over" +
           (status.eta_seconds ? fmt::format(", about {:.0f} s left", *status.eta_seconds)
                               : std::string());
  }
  const double most = most_bytes_per_second(status);
  if (most > 0 && core.needed_bytes_per_second > most) {
    return fmt::format("cannot be in sync by the deadline in {:.0f} s: that needs {}/s, {}", left,
                       format_size(core.needed_bytes_per_second), what_limits(status));
  }
  return fmt::format("copying: in sync by the deadline in {:.0f} s, at {}/s", left,
                     format_size(core.needed_bytes_per_second));
}

std::string copying(const ExportStatus& status) {
  const mirror::Status& core = status.core;
  if (core.suspect_bytes != 0 && core.stale_bytes <= core.suspect_bytes) {
    return fmt::format(
        "waiting {:.0f} s more for writes that were lost with a connection and may still arrive",
        quarantine_seconds(core));
  }
  if (core.deadline_left) return by_deadline(status);
  if (status.eta_seconds) return fmt::format("copying: about {:.0f} s left", *status.eta_seconds);
  // Nothing gets less: then it matters what comes and what goes.
  const double most = most_bytes_per_second(status);
  if (most > 0 && core.new_bytes_per_second > keeps_up * most) {
    return fmt::format(
        "does not converge: the guest writes {}/s for the target, {}; mode auto or sync, a higher "
        "--max-delay or {} would help",
        format_size(core.new_bytes_per_second), what_limits(status),
        limited_by_bandwidth(status) ? "--bandwidth" : "a faster path");
  }
  return "copying";
}

std::string cancelled(const mirror::Status& core) {
  std::string text = "cancelled: the guest goes on here";
  if (core.suspect_bytes != 0) {
    text += fmt::format(
        "; a new migration can be in sync in {:.0f} s at the earliest (writes that were lost with "
        "a connection may still arrive)",
        quarantine_seconds(core));
  }
  return text;
}

// Somebody else has the disk, by this migration or by one before a restart.
std::string away(const ExportStatus& status) {
  const std::string peer = status.peer.empty() ? "its target" : status.peer;
  if (status.core.serving == mirror::Serving::target) {
    const bool reached = std::any_of(status.paths.begin(), status.paths.end(),
                                     [](const PathStatus& path) { return path.connections != 0; });
    if (!reached && !status.core.last_error.empty()) {
      return fmt::format("pivoted, and the guest waits for the target: {}", status.core.last_error);
    }
    return fmt::format("pivoted: the guest is served from here, its disk is at {}", peer);
  }
  return fmt::format(
      "{}: this copy is fenced, the disk is at {}: run `nbdferry promote` there if a nbdferry "
      "serves it, and connect the guest there",
      status.role == "pivoted" ? "pivoted" : "released", peer);
}

}  // namespace

std::uint64_t debt_bytes(const mirror::Status& status) {
  return status.stale_bytes + status.buffered_bytes + status.copying_bytes;
}

double most_bytes_per_second(const ExportStatus& status) {
  const auto limit = static_cast<double>(status.bandwidth);
  const double takes = status.core.bytes_per_second;
  if (limit == 0) return takes;
  return takes == 0 ? limit : std::min(limit, takes);
}

std::string verdict_of(const ExportStatus& status) {
  const mirror::Status& core = status.core;
  const bool moving = core.phase == Phase::copying || core.phase == Phase::in_sync;
  if (moving && core.target_silent >= silence_told) {
    return fmt::format("the target has not answered for {:.0f} s; the guest goes on",
                       std::chrono::duration<double>(core.target_silent).count());
  }
  switch (core.phase) {
    case Phase::idle:
      if (core.serving != mirror::Serving::source) return away(status);
      if (status.role == "incoming") {
        return "incoming: takes writes only from its migration; promote it when the source has "
               "switched";
      }
      return "no migration";
    case Phase::queued:
      return "waiting until the earlier migration has let go of its connections";
    case Phase::connecting:
      return "connecting to the target";
    case Phase::copying:
      return copying(status);
    case Phase::paused:
      return "paused: the guest's writes become debt until it is resumed";
    case Phase::in_sync:
      return "in sync: ready to switch";
    case Phase::prepared:
      return "prepared: seal and commit, or abort";
    case Phase::sealed:
      return "sealed: the guest's writes are held until commit or abort";
    case Phase::switching:
      return "switching";
    case Phase::switched:
      return core.serving == mirror::Serving::source ? "switched, and unfenced since"
                                                     : away(status);
    case Phase::interrupted:
      return fmt::format("interrupted: {}; the guest goes on, trying again", core.last_error);
    case Phase::failed:
      return fmt::format("failed: {}; the guest goes on here: migrate again once that is put right",
                         core.last_error);
    case Phase::cancelled:
      return cancelled(core);
  }
  return {};
}

}  // namespace nbdferry::proxy
