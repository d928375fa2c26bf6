// Status as JSON and as text.
#include <string>

#include <boost/json.hpp>
#include <doctest/doctest.h>

#include "proxy/status_json.hpp"
#include "proxy/status_text.hpp"

namespace nbdferry::proxy {
namespace {

namespace json = boost::json;

// Every field differs from its default and from its neighbours.
ExportStatus full_status() {
  ExportStatus s;
  s.name = "vm1";
  s.disk = "/disks/vm1.img";
  s.role = "owner";
  s.peer = "nbd://host/vm1";
  s.migration_id = "id-1";
  s.verdict = "4 s left";
  mirror::Status& c = s.core;
  c.phase = mirror::Phase::copying;
  c.mode = mirror::Mode::async;
  c.mode_wanted = mirror::Mode::sync;
  c.mode_reason = "a write waited too long";
  c.serving = mirror::Serving::target;
  c.size_bytes = 1ULL << 30;
  c.stale_bytes = 400ULL << 20;
  c.buffered_bytes = 100ULL << 20;
  c.copying_bytes = 12ULL << 20;
  c.copied_bytes = 500ULL << 20;
  c.zeroed_bytes = 16ULL << 20;
  c.mirrored_bytes = 7ULL << 20;
  c.suspect_bytes = 4096;
  c.quarantine_left = std::chrono::milliseconds(12345);
  c.unreadable_bytes = 8192;
  c.verified_bytes = 5;
  c.mismatched_bytes = 6;
  c.verifying = true;
  c.in_sync = true;
  c.holding = true;
  c.held_requests = 9;
  c.bytes_per_second = 112.0 * (1 << 20);
  c.last_error = "connection reset";
  s.paths = {{"nbd://host/vm1", "10.0.0.1", "up", 4, 77, 230}};
  s.guest_write_iops = 2000.5;
  s.guest_write_bytes_per_second = 8e6;
  s.guest_read_iops = 120;
  s.guest_delay_us = 11;
  s.eta_seconds = 4.2;
  s.bandwidth = 200ULL << 20;
  s.guest_connections = 2;
  return s;
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("status: JSON has what the contract names, and comes back as it was") {
  const json::object o = status_to_json(full_status());
  for (const char* field : {"phase", "mode", "size_bytes", "stale_bytes", "buffered_bytes",
                            "copied_bytes", "mirrored_bytes", "in_sync", "eta_seconds", "verdict",
                            "suspects", "role", "paths", "guest", "last_error"}) {
    CAPTURE(field);
    CHECK(o.contains(field));
  }
  CHECK(o.at("phase") == "copying");
  CHECK(o.at("debt_bytes") == 512ULL << 20);
  CHECK(o.at("suspects") == 4096);
  CHECK(o.at("quarantine_seconds") == 12.345);
  CHECK(o.at("paths").at(0).at("rtt_us") == 230);
  CHECK(o.at("guest").at("write_iops") == 2000.5);
  // Through text, as on the socket.
  const json::value parsed = json::parse(json::serialize(o));
  CHECK(status_to_json(status_from_json(parsed.as_object())) == o);
}

TEST_CASE("status: what is unknown is null") {
  const ExportStatus empty;
  const json::object o = status_to_json(empty);
  CHECK(o.at("eta_seconds").is_null());
  CHECK(o.at("last_error").is_null());
  const ExportStatus back = status_from_json(o);
  CHECK_FALSE(back.eta_seconds);
  CHECK(back.core.last_error.empty());
}

TEST_CASE("status: every phase survives the way through JSON") {
  for (int i = 0; i <= static_cast<int>(mirror::Phase::cancelled); ++i) {
    ExportStatus s;
    s.core.phase = static_cast<mirror::Phase>(i);
    CHECK(status_from_json(status_to_json(s)).core.phase == s.core.phase);
  }
}

TEST_CASE("status: JSON of something else is refused") {
  json::object o = status_to_json(full_status());
  json::object without = o;
  without.erase("stale_bytes");
  CHECK_THROWS_WITH(status_from_json(without), "stale_bytes is missing");
  json::object wrong = o;
  wrong["phase"] = "dreaming";
  CHECK_THROWS_WITH(status_from_json(wrong), "phase is dreaming, which is unknown");
  wrong = o;
  wrong["in_sync"] = 1;
  CHECK_THROWS(status_from_json(wrong));
}

TEST_CASE("status: the text says what matters") {
  const std::string text = status_to_text(full_status());
  CAPTURE(text);
  for (const char* part :
       {"/disks/vm1.img (1.0 GiB)", "owner, peer nbd://host/vm1", "copying (in sync)", "50.0%",
        "512 MiB: 400 MiB stale", "4 connections", "230 us", "2000 writes/s", "4 s left",
        "connection reset", "4.0 KiB (sent", "8.0 KiB", "9 writes"}) {
    CAPTURE(part);
    CHECK(has(text, part));
  }
  const std::string idle = status_to_text(ExportStatus{});
  CAPTURE(idle);
  CHECK(has(idle, "idle"));
  CHECK_FALSE(has(idle, "debt"));
  CHECK_FALSE(has(idle, "error"));
}

TEST_CASE("status: the progress line") {
  ExportStatus s = full_status();
  CHECK(progress_line(s, 0) ==
        " 50.0% copying, 512 MiB of 1.0 GiB, 112 MiB/s, debt 512 MiB, 4.2 s left");
  s.bandwidth = 50ULL << 20;
  CHECK(has(progress_line(s, 0), "of 1.0 GiB, 50.0 MiB/s, debt"));
  CHECK(has(progress_line(s, 10), "[#####.....]  50.0%"));
  s.eta_seconds.reset();
  CHECK_FALSE(has(progress_line(s, 0), "left"));
  s.core.stale_bytes = 2ULL << 30;  // more debt than disk, for a moment
  CHECK(has(progress_line(s, 10), "[..........]   0.0%"));
  s.core.stale_bytes = s.core.buffered_bytes = s.core.copying_bytes = 0;
  CHECK(has(progress_line(s, 10), "[##########] 100.0%"));
}

}  // namespace nbdferry::proxy
