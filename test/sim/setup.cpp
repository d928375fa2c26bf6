#include "test/sim/setup.hpp"

#include "mirror/journal.hpp"

namespace nbdferry::sim {

namespace {

constexpr std::uint64_t kib = 1024;

void choose_sizes(Setup& s, Prng& prng) {
  s.engine.source_align = prng.pick({1U, 1U, 512U, 4096U});
  s.engine.promised_block_min = prng.pick({1U, 1U, 1U, 512U, 4096U});
  s.target.block_min = prng.pick({1U, 1U, 512U, 512U, 4096U, 65536U});
  // A pivot wants a target that keeps what the guest was promised.
  if (s.pivots || prng.chance(1, 2)) {
    s.target.block_min = std::min(s.target.block_min, s.engine.promised_block_min);
  }
  // A size in whole blocks of everybody; else, often, one that ends within a 4 KiB block.
  const std::uint64_t blocks = prng.chance(1, 2) ? prng.between(1, 16) : prng.between(1, 64);
  std::uint64_t size = blocks * block_size_min;
  const std::uint64_t whole = std::max(s.engine.promised_block_min, s.target.block_min);
  if (prng.chance(1, 3)) size -= prng.between(1, block_size_min - 1);
  size = std::max(whole, size / whole * whole);
  s.engine.size = size;
  s.target.size = size + (prng.chance(1, 4) ? whole * prng.between(1, 3) : 0);
}

void choose_limits(Setup& s, Prng& prng) {
  auto& l = s.engine.limits;
  l.copy_bytes = 64 * kib;
  l.copy_window_bytes = prng.pick({64 * kib, 64 * kib, 128 * kib, 256 * kib});
  l.bulk_bytes_min = prng.pick({4 * kib, 64 * kib, 1024 * kib});
  l.probe_bytes = prng.pick({64 * kib, 128 * kib, 256 * kib});
  l.merge_bytes = prng.pick({4 * kib, 16 * kib, 256 * kib});
  l.heat_region_min = prng.pick({4 * kib, 16 * kib, 64 * kib});
  l.write_piece_bytes = prng.pick({4 * kib, 16 * kib, 64 * kib});
  l.zero_piece_bytes = prng.pick({64 * kib, 128 * kib, 256 * kib});
  l.verify_bytes = prng.pick({4 * kib, 16 * kib, 64 * kib});
  l.checksum_bytes = prng.pick({64 * kib, 128 * kib, 256 * kib});
  l.flush_bytes = prng.pick({16 * kib, 64 * kib, 1024 * kib});
  l.flush_period = std::chrono::milliseconds(prng.pick({5, 20, 100, 1000}));
  l.flush_period_level = l.flush_period;
  l.sync_keep_min = prng.pick({4 * kib, 256 * kib});
  l.auto_dwell = std::chrono::milliseconds(prng.pick({1, 5, 50}));
  l.target_errors_max = prng.pick({2U, 4U, 16U});
  l.target_errors_time = Duration{0};
  // No piece is smaller than what the target can write.
  l.write_piece_bytes = std::max<std::uint64_t>(l.write_piece_bytes, s.target.block_min);
  l.verify_bytes = std::max<std::uint64_t>(l.verify_bytes, s.target.block_min);
}

void choose_target(Setup& s, Prng& prng) {
  auto& t = s.target;
  t.payload_max = prng.pick({4096U, 16384U, 65536U, 32U * 1024 * 1024});
  t.payload_max = std::max(t.payload_max, t.block_min);
  t.can_flush = s.pivots || !prng.chance(1, 8);
  t.can_fua = t.can_flush && prng.chance(1, 2);
  t.can_trim = prng.chance(1, 2);
  t.can_zero = prng.chance(2, 3);
  t.has_allocation = prng.chance(1, 2);
  t.can_checksum = prng.chance(1, 2);
  s.connections = prng.pick({1U, 2U, 4U});
  s.window_ops = prng.pick({1U, 2U, 4U, 16U});
  s.window_bytes = prng.pick({4 * kib, 16 * kib, 64 * kib, 256 * kib});
}

}  // namespace

Setup make_setup(Prng& prng) {
  using std::chrono::microseconds;
  using std::chrono::milliseconds;
  Setup s;
  s.pivots = prng.chance(1, 5);
  choose_sizes(s, prng);
  choose_limits(s, prng);
  choose_target(s, prng);

  s.sync_timeout = milliseconds(prng.pick({5, 10, 50}));
  s.downtime_limit = milliseconds(prng.pick({10, 50, 300}));
  s.prepare_timeout = milliseconds(prng.pick({20, 100, 1000}));
  s.quarantine = milliseconds(prng.pick({10, 50, 200}));
  s.reconnect_delay = milliseconds(prng.pick({10, 50, 300}));
  s.tick_period = microseconds(prng.pick({500, 2000, 10000}));
  s.step_max = microseconds(prng.pick({20, 200, 1000, 3000}));

  s.guest_requests_max = static_cast<unsigned>(prng.between(1, 12));
  s.small_writes = prng.chance(1, 2);
  s.flushes = prng.chance(1, 4);
  s.source_errors = prng.chance(1, 4);
  s.target_errors = prng.chance(1, 4);
  s.flush_errors = prng.chance(1, 8);
  if (s.target.can_zero && prng.chance(1, 8)) {
    s.zeroes_fail = prng.pick({IoError::io, IoError::not_supported, IoError::invalid});
  }
  s.unreadable = prng.chance(1, 8);
  s.stays_unreadable = s.unreadable && prng.chance(1, 2);
  s.status_lags = prng.chance(1, 2);
  s.losses = prng.chance(1, 2);
  s.restarts = prng.chance(2, 3);
  s.crashes = prng.chance(s.pivots ? 3 : 2, 4);
  s.fences = prng.chance(1, 4);
  s.paths = prng.chance(1, 3);
  s.corruption = !s.pivots && prng.chance(1, 10);
  if (!prng.chance(1, 8)) {
    s.journal_bytes = (1 + prng.pick({1U, 2U, 4U, 128U})) * mirror::Journal::slot_bytes;
    s.journal_bytes_max = s.journal_bytes + 32 * mirror::Journal::slot_bytes;
  }
  s.check_invariants = prng.chance(1, 8);
  s.tick_always = prng.chance(1, 2);

  // A disk that nobody writes to hides nothing of what the copier does.
  s.guest_weight = prng.chance(1, 8) ? 0 : prng.pick({1U, 4U, 10U, 20U});
  s.source_weight = prng.pick({10U, 25U, 50U});
  s.target_weight = prng.pick({5U, 20U, 50U});
  s.operator_weight = prng.pick({1U, 3U, 6U});
  return s;
}

mirror::MigrateOptions make_options(const Setup& s, Prng& prng) {
  mirror::MigrateOptions o;
  o.mode = prng.pick({mirror::Mode::async, mirror::Mode::sync, mirror::Mode::automatic});
  // In peace all of it is drained, whatever the rate.
  if (prng.chance(1, 8)) o.bandwidth = prng.pick({1U << 20, 8U << 20});
  if (prng.chance(1, 10)) o.deadline = std::chrono::milliseconds(prng.pick({10, 100, 1000}));
  if (prng.chance(1, 10)) o.switch_when = mirror::SwitchWhen::release;
  if (prng.chance(1, s.pivots ? 2 : 6) && !s.corruption) {
    o.switch_when = mirror::SwitchWhen::pivot;
  }
  if (prng.chance(1, 3)) o.consistency = mirror::Consistency::crash;
  o.verify = prng.chance(1, 12);
  o.skip_unreadable = s.stays_unreadable || prng.chance(1, 4);
  o.buffer_bytes = prng.pick({1 * kib, 4 * kib, 16 * kib, 64 * kib, 1024 * kib});
  o.max_delay = std::chrono::milliseconds(prng.pick({1, 10, 50}));
  o.downtime_limit = s.downtime_limit;
  o.sync_timeout = s.sync_timeout;
  o.prepare_timeout = s.prepare_timeout;
  o.quarantine = s.quarantine;
  o.reconnect_delay = s.reconnect_delay;
  return o;
}

}  // namespace nbdferry::sim
