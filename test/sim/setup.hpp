// Setup: the random conditions that one history runs under.
#pragma once

#include <cstdint>

#include "mirror/engine.hpp"
#include "test/sim/prng.hpp"

namespace nbdferry::sim {

struct Setup {
  mirror::EngineConfig engine;
  mirror::TargetInfo target;
  unsigned connections = 1;
  std::uint32_t window_ops = 8;            // of each connection
  std::uint64_t window_bytes = 64 * 1024;  // of each connection

  Duration sync_timeout{};
  Duration downtime_limit{};
  Duration prepare_timeout{};
  Duration quarantine{};
  Duration reconnect_delay{};
  Duration tick_period{};
  Duration step_max{};  // virtual time between two things that happen

  unsigned guest_requests_max = 4;  // in flight
  bool small_writes = false;        // below a block, where the promise to the guest allows
  bool flushes = false;             // the guest flushes often
  bool source_errors = false;
  bool target_errors = false;
  bool flush_errors = false;      // of the target, often
  IoError zeroes_fail{};          // of the target, always, though it offers them
  bool unreadable = false;        // sticky unreadable sectors
  bool stays_unreadable = false;  // to the very end; every migration leaves them out
  bool status_lags = false;       // block status does not see what was not flushed
  bool losses = false;
  bool restarts = false;
  bool pivots = false;   // soon
  bool crashes = false;  // of our process
  // What outlives it after a pivot, at first and in the end; none: it is not killed when that matters.
  std::uint64_t journal_bytes = 0;
  std::uint64_t journal_bytes_max = 0;
  bool fences = false;      // the target confirms that older connections are dead, and who it is
  bool paths = false;       // there are other ones, to the same target or to another one
  bool corruption = false;  // silent, on the target; such histories never pivot
  bool check_invariants = false;  // after each event
  bool tick_always = false;       // ticks even when the core does not want them

  // How often, relative to each other.
  unsigned guest_weight = 10;
  unsigned source_weight = 20;
  unsigned target_weight = 20;
  unsigned operator_weight = 3;
};

[[nodiscard]] Setup make_setup(Prng& prng);

// Options of one migration in it.
[[nodiscard]] mirror::MigrateOptions make_options(const Setup& setup, Prng& prng);

}  // namespace nbdferry::sim
