// Labels in one column, values in another; lines that would say nothing are left out.
#include "proxy/status_text.hpp"

#include <algorithm>
#include <iterator>

#include <fmt/format.h>

#include "proxy/units.hpp"
#include "proxy/verdict.hpp"

namespace nbdferry::proxy {
namespace {

using mirror::Phase;

std::string size(std::uint64_t bytes) { return format_size(static_cast<double>(bytes)); }

const char* plural(std::uint64_t n) { return n == 1 ? "" : "s"; }

// The part of the disk that the target holds, 0 … 1. Mirrored writes can be queued for blocks that
// are stale, too, so debt may exceed the size for a moment.
double done_share(const mirror::Status& core) {
  if (core.size_bytes == 0) return 1;
  const double debt = static_cast<double>(debt_bytes(core));
  return 1 - std::min(1.0, debt / static_cast<double>(core.size_bytes));
}

bool has_migration(const mirror::Status& core) { return core.phase != Phase::idle; }

class Lines {
 public:
  template <class... Args>
  void add(std::string_view label, fmt::format_string<Args...> format, Args&&... args) {
    fmt::format_to(std::back_inserter(text_), "{:<10} ", label);
    fmt::format_to(std::back_inserter(text_), format, std::forward<Args>(args)...);
    text_ += '\n';
  }
  [[nodiscard]] std::string take() && { return std::move(text_); }

 private:
  std::string text_;
};

void add_migration(Lines& lines, const ExportStatus& status) {
  const mirror::Status& core = status.core;
  lines.add("progress", "{:.1f}%: {} copied, {} zero, {} mirrored, {}", done_share(core) * 100,
            size(core.copied_bytes), size(core.zeroed_bytes), size(core.mirrored_bytes),
            format_rate(most_bytes_per_second(status)));
  lines.add("debt", "{}: {} stale, {} in copies, {} buffered", size(debt_bytes(core)),
            size(core.stale_bytes), size(core.copying_bytes), size(core.buffered_bytes));
  if (core.suspect_bytes > 0) {
    lines.add("suspects", "{} (sent and unanswered at a loss: not copied before a fence)",
              size(core.suspect_bytes));
  }
  if (core.unreadable_bytes > 0) lines.add("unreadable", "{}", size(core.unreadable_bytes));
  if (core.verifying || core.verified_bytes > 0) {
    lines.add("verify", "{}{} compared, {} differed", core.verifying ? "under way: " : "",
              size(core.verified_bytes), size(core.mismatched_bytes));
  }
  if (core.holding)
    lines.add("holding", "{} write{}", core.held_requests, plural(core.held_requests));
}

}  // namespace

std::string status_to_text(const ExportStatus& status) {
  const mirror::Status& core = status.core;
  Lines lines;
  lines.add("disk", "{} ({}), export \"{}\"", status.disk, size(core.size_bytes), status.name);
  lines.add("role", "{}{}", status.role, status.peer.empty() ? "" : ", peer " + status.peer);
  lines.add("phase", "{}{}{}", to_string(core.phase), core.in_sync ? " (in sync)" : "",
            core.consistent ? ", the target is crash-consistent" : "");
  if (has_migration(core)) {
    lines.add("mode", "{}{}", to_string(core.mode),
              core.mode_reason.empty() ? "" : ": " + core.mode_reason);
    add_migration(lines, status);
  }
  for (const PathStatus& path : status.paths) {
    lines.add("path", "{}{}: {}, {} connection{}, {} sent{}", path.uri,
              path.via.empty() ? "" : " via " + path.via, path.state, path.connections,
              plural(path.connections), size(path.sent_bytes),
              path.rtt_us == 0 ? "" : fmt::format(", {} us", path.rtt_us));
  }
  lines.add("guest", "{} connection{}, {:.0f} writes/s ({}), {:.0f} reads/s{}",
            status.guest_connections, plural(status.guest_connections), status.guest_write_iops,
            format_rate(status.guest_write_bytes_per_second), status.guest_read_iops,
            status.guest_delay_us == 0
                ? ""
                : fmt::format(", each write delayed by {:.1f} ms, so that the target keeps up",
                              static_cast<double>(status.guest_delay_us) / 1000));
  if (!status.verdict.empty()) lines.add("verdict", "{}", status.verdict);
  if (!core.last_error.empty()) lines.add("error", "{}", core.last_error);
  return std::move(lines).take();
}

std::string progress_line(const ExportStatus& status, unsigned bar_width) {
  const mirror::Status& core = status.core;
  const double share = done_share(core);
  std::string bar;
  if (bar_width > 0) {
    const auto filled = static_cast<unsigned>(share * bar_width);
    bar = "[" + std::string(filled, '#') + std::string(bar_width - filled, '.') + "] ";
  }
  const std::uint64_t done =
      static_cast<std::uint64_t>(share * static_cast<double>(core.size_bytes));
  std::string line = fmt::format(
      "{}{:5.1f}% {}, {} of {}, {}, debt {}", bar, share * 100, to_string(core.phase), size(done),
      size(core.size_bytes), format_rate(most_bytes_per_second(status)), size(debt_bytes(core)));
  if (status.eta_seconds) line += ", " + format_seconds(*status.eta_seconds) + " left";
  return line;
}

}  // namespace nbdferry::proxy
