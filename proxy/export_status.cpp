// Export: what it tells the operator, and how it stops.
#include <algorithm>

#include <fmt/format.h>

#include "proxy/export_impl.hpp"
#include "proxy/log.hpp"
#include "proxy/verdict.hpp"

namespace nbdferry::proxy {

namespace {

constexpr Duration measure_period = std::chrono::milliseconds(500);
constexpr double progress_weight = 0.3;
constexpr Duration stop_poll = std::chrono::milliseconds(5);
constexpr Duration stop_limit = std::chrono::seconds(60);

}  // namespace

void ExportImpl::measure_progress() {
  const Time t = now();
  if (t - measured_at_ < measure_period) return;
  const std::uint64_t debt = debt_bytes(engine_->status());
  const double seconds = std::chrono::duration<double>(t - measured_at_).count();
  if (measured_at_ != Time{0} && measured_debt_ > debt) {
    const double sample = static_cast<double>(measured_debt_ - debt) / seconds;
    progress_ = progress_ == 0 ? sample : progress_ + (sample - progress_) * progress_weight;
  } else {
    progress_ *= 1 - progress_weight;
  }
  measured_at_ = t;
  measured_debt_ = debt;
}

ExportStatus ExportImpl::status() const {
  ExportStatus s;
  s.name = options_.name;
  s.disk = options_.disk;
  s.role = to_string(ownership_.role);
  s.peer = ownership_.peer;
  s.core = engine_->status();
  const bool migrating = s.core.phase != mirror::Phase::idle;
  if (migrating) s.migration_id = migration_id_;
  if (migrating) s.bandwidth = request_.options.bandwidth;
  if (migrating && s.peer.empty() && !request_.uris.empty()) s.peer = request_.uris.front();
  if (target_) {
    for (auto& p : target_->paths()) {
      s.paths.push_back({std::move(p.uri), std::move(p.via), std::move(p.state), p.connections,
                         p.sent_bytes, p.rtt_us});
    }
  }
  const auto& rates = meter_.rates(now());
  s.guest_read_iops = rates.read_iops;
  s.guest_write_iops = rates.write_iops;
  s.guest_write_bytes_per_second = rates.write_bytes_per_second;
  s.guest_delay_us = static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::microseconds>(s.core.pacing_delay).count());
  s.guest_connections = static_cast<std::uint32_t>(sessions_.size());
  const std::uint64_t debt = debt_bytes(s.core);
  if (s.core.phase == mirror::Phase::copying && progress_ > 1) {
    const double quarantine = std::chrono::duration<double>(s.core.quarantine_left).count();
    s.eta_seconds = std::max(static_cast<double>(debt) / progress_, quarantine);
  } else if (s.core.in_sync) {
    s.eta_seconds = 0;
  }
  s.verdict = verdict_of(s);
  return s;
}

// --- stopping ---

void ExportImpl::stop(std::function<void(std::string)> done) {
  stop_handler_ = std::move(done);
  stop_deadline_ = now() + stop_limit;
  stop_when_quiet();
}

void ExportImpl::stop_when_quiet() {
  const bool quiet = engine_->open_requests() == 0 && !record_busy_;
  if (!quiet && now() < stop_deadline_) {
    stop_timer_.expires_after(stop_poll);
    stop_timer_.async_wait([this](const boost::system::error_code&) { stop_when_quiet(); });
    return;
  }
  if (!quiet) stop_error_ = "requests were still open after 60 s";
  // Through the core: it knows whether the disk or the target serves.
  mirror::GuestRequest flush;
  flush.id = make_request_id(internal_session, 0);
  flush.command = Command::flush;
  post(std::move(flush));
  stop_when_flushed();
}

void ExportImpl::stop_when_flushed() {
  if (stop_was_flushed_) {
    if (engine_->status().serving != mirror::Serving::target) {
      // What is on its way is waited for; the next start goes on from the rest.
      post(mirror::Suspend{remember([](bool, const std::string&) {})});
    } else if (target_) {
      target_->close();
    }
    stop_when_closed();
    return;
  }
  if (now() >= stop_deadline_) {
    stop_error_ = "the disk's flush was not answered in 60 s";
    stop_was_flushed_ = true;
  }
  stop_timer_.expires_after(stop_poll);
  stop_timer_.async_wait([this](const boost::system::error_code&) { stop_when_flushed(); });
}

void ExportImpl::stop_flushed(IoError error) {
  if (error != IoError::none && error != IoError::shutdown && !options_.read_only) {
    stop_error_ = fmt::format("the disk could not be flushed: {}", to_string(error));
  }
  stop_was_flushed_ = true;
}

void ExportImpl::stop_when_closed() {
  if (target_ && now() < stop_deadline_) {
    stop_timer_.expires_after(stop_poll);
    stop_timer_.async_wait([this](const boost::system::error_code&) { stop_when_closed(); });
    return;
  }
  ticks_.cancel();
  turn_timer_.cancel();
  stop_handler_(stop_error_);
}

}  // namespace nbdferry::proxy
