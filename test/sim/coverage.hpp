// How often the hard cases happened, by history: a simulator that never reaches them proves
// nothing.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace nbdferry::sim {

enum class Case : unsigned {
  overflow_during_copy,
  armed_with_writes_in_flight,
  superseded,
  superseded_by_trim,
  debt_while_prepared,
  sync_timeout,
  read_back,
  copy_discarded,
  flush_failure,
  replayed_write,
  zombie_after_reconnect,
  server_restart,
  record_failure,
  abort_while_sealed,
  pivoted,
  pivot_with_loss,
  released,
  unfenced,
  migrated_again,
  corruption_found,
  unreadable,
  unreadable_mended,
  unreadable_left_out,
  held_write,
  torn_read,
  zeroes_undone,
  zeroes_failed,
  refused_after_up,
  refused_during_commit,
  refused_after_pivot,
  sync_beyond_window,
  mode_changed,
  paced_write,
  consistent_with_backlog,
  epoch_waited,
  merged,
  hot_left_for_last,
  overwritten,
  crashed,
  resumed,
  crashed_with_suspects,
  crashed_after_pivot,
  died_with_target,
  suspended,
  distrusted,
  path_used,
  path_refused,
  path_lost,
  count,
};

inline constexpr std::array<std::string_view, static_cast<unsigned>(Case::count)> case_names = {
    "overflow_during_copy",
    "armed_with_writes_in_flight",
    "superseded",
    "superseded_by_trim",
    "debt_while_prepared",
    "sync_timeout",
    "read_back",
    "copy_discarded",
    "flush_failure",
    "replayed_write",
    "zombie_after_reconnect",
    "server_restart",
    "record_failure",
    "abort_while_sealed",
    "pivoted",
    "pivot_with_loss",
    "released",
    "unfenced",
    "migrated_again",
    "corruption_found",
    "unreadable",
    "unreadable_mended",
    "unreadable_left_out",
    "held_write",
    "torn_read",
    "zeroes_undone",
    "zeroes_failed",
    "refused_after_up",
    "refused_during_commit",
    "refused_after_pivot",
    "sync_beyond_window",
    "mode_changed",
    "paced_write",
    "consistent_with_backlog",
    "epoch_waited",
    "merged",
    "hot_left_for_last",
    "overwritten",
    "crashed",
    "resumed",
    "crashed_with_suspects",
    "crashed_after_pivot",
    "died_with_target",
    "suspended",
    "distrusted",
    "path_used",
    "path_refused",
    "path_lost",
};

// Plain data: lives in memory shared with the worker processes.
struct Coverage {
  std::uint64_t histories = 0;
  std::uint64_t events = 0;
  std::array<std::uint64_t, static_cast<unsigned>(Case::count)> hit{};  // histories that had it

  void add(const Coverage& o) {
    histories += o.histories;
    events += o.events;
    for (std::size_t i = 0; i < hit.size(); ++i) hit[i] += o.hit[i];
  }
};

// The cases of one history.
class Cases {
 public:
  void saw(Case c) { seen_[static_cast<unsigned>(c)] = true; }
  void saw_if(bool condition, Case c) {
    if (condition) saw(c);
  }
  void count_into(Coverage& coverage) const {
    for (std::size_t i = 0; i < seen_.size(); ++i) coverage.hit[i] += seen_[i] ? 1 : 0;
  }

 private:
  std::array<bool, static_cast<unsigned>(Case::count)> seen_{};
};

}  // namespace nbdferry::sim
