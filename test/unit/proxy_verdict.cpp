// The verdict: it says where things stand, and what to do next.
#include <doctest/doctest.h>

#include "proxy/verdict.hpp"

namespace nbdferry::proxy {
namespace {

using mirror::Phase;
using mirror::Serving;

ExportStatus at(Phase phase, Serving serving = Serving::source) {
  ExportStatus s;
  s.role = "owner";
  s.core.phase = phase;
  s.core.serving = serving;
  return s;
}

bool says(const ExportStatus& status, const std::string& part) {
  const std::string text = verdict_of(status);
  CAPTURE(text);
  CHECK(text.find('\n') == std::string::npos);
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("verdict: every phase has one") {
  for (int i = 0; i <= static_cast<int>(Phase::cancelled); ++i) {
    CAPTURE(i);
    CHECK_FALSE(verdict_of(at(static_cast<Phase>(i))).empty());
  }
}

TEST_CASE("verdict: after a release it says where the disk is, and to promote it there") {
  ExportStatus s = at(Phase::switched, Serving::nobody);
  s.role = "retired";
  s.peer = "nbd://host/vm";
  CHECK(says(s, "released"));
  CHECK(says(s, "nbd://host/vm"));
  CHECK(says(s, "nbdferry promote"));
  // After a restart, too, when no migration is remembered.
  s.core.phase = Phase::idle;
  CHECK(says(s, "nbd://host/vm"));
  CHECK(says(s, "fenced"));
}

TEST_CASE("verdict: after a pivot the guest stays, the disk is there") {
  ExportStatus s = at(Phase::switched, Serving::target);
  s.role = "pivoted";
  s.peer = "nbd://host/vm";
  CHECK(says(s, "served from here"));
  CHECK(says(s, "nbd://host/vm"));
  // The process that held the connections has ended: nobody serves any more.
  s.core.phase = Phase::idle;
  s.core.serving = Serving::nobody;
  CHECK(says(s, "fenced"));
}

TEST_CASE("verdict: a quarantine is waited for in plain sight, with the seconds left") {
  ExportStatus s = at(Phase::cancelled);
  CHECK(says(s, "goes on here"));
  CHECK_FALSE(says(s, "new migration"));
  s.core.suspect_bytes = 8192;
  s.core.quarantine_left = std::chrono::milliseconds(41'200);
  CHECK(says(s, "new migration can be in sync in 42 s"));
  s.core.phase = Phase::copying;
  s.core.stale_bytes = 8192;
  CHECK(says(s, "waiting 42 s more"));
  s.core.stale_bytes = 1 << 20;
  s.eta_seconds = 50;
  CHECK(says(s, "about 50 s left"));
}

TEST_CASE("verdict: a deadline that cannot be kept is named early, with both rates") {
  ExportStatus s = at(Phase::copying);
  s.core.stale_bytes = 1 << 30;
  s.core.deadline_left = std::chrono::seconds(100);
  s.core.needed_bytes_per_second = 10 << 20;
  CHECK(says(s, "by the deadline in 100 s, at 10.0 MiB/s"));
  s.core.bytes_per_second = 5 << 20;
  CHECK(says(s, "cannot be in sync by the deadline"));
  CHECK(says(s, "needs 10.0 MiB/s, the target takes 5.0 MiB/s"));
  SUBCASE("of which one may be a limit of the operator's") {
    s.bandwidth = 2 << 20;
    CHECK(says(s, "needs 10.0 MiB/s, --bandwidth allows 2.0 MiB/s"));
    s.core.bytes_per_second = 0;  // nor need the target have been tried
    CHECK(says(s, "needs 10.0 MiB/s, --bandwidth allows 2.0 MiB/s"));
    s.bandwidth = 20 << 20;
    CHECK(says(s, "by the deadline in 100 s"));
    s.core.bytes_per_second = 5 << 20;
    CHECK(says(s, "the target takes 5.0 MiB/s"));
  }
  s.core.deadline_left = Duration{0};
  CHECK(says(s, "the deadline is over"));
}

TEST_CASE("verdict: a guest that outruns the target, with both rates and what would help") {
  ExportStatus s = at(Phase::copying);
  s.core.stale_bytes = 1 << 30;
  s.core.bytes_per_second = 5 << 20;
  s.core.new_bytes_per_second = 10 << 20;
  CHECK(says(s, "does not converge"));
  CHECK(says(s, "10.0 MiB/s"));
  CHECK(says(s, "5.0 MiB/s"));
  CHECK(says(s, "a faster path would help"));
  s.core.bytes_per_second = 50 << 20;
  CHECK_FALSE(says(s, "does not converge"));
  s.bandwidth = 5 << 20;
  CHECK(says(s, "does not converge"));
  CHECK(says(s, "--bandwidth allows 5.0 MiB/s"));
  CHECK(says(s, "a higher --max-delay or --bandwidth would help"));
  s.core.bytes_per_second = 0;  // nor need the target have been tried
  CHECK(says(s, "--bandwidth allows 5.0 MiB/s"));
  CHECK(says(s, "a higher --max-delay or --bandwidth would help"));
  s.eta_seconds = 12;  // and it does get less
  CHECK(says(s, "about 12 s left"));
}

TEST_CASE("verdict: a target that says nothing") {
  ExportStatus s = at(Phase::copying);
  s.eta_seconds = 1;
  s.core.target_silent = std::chrono::milliseconds(900);
  CHECK(says(s, "about 1 s left"));
  s.core.target_silent = std::chrono::milliseconds(4100);
  CHECK(says(s, "has not answered for 4 s"));
}

TEST_CASE("verdict: an incoming disk says what it waits for") {
  ExportStatus s = at(Phase::idle);
  CHECK(says(s, "no migration"));
  s.role = "incoming";
  CHECK(says(s, "promote"));
}

}  // namespace nbdferry::proxy
