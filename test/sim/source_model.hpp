// SourceModel: the local disk. Truthful, slow at times, and at times it fails.
//
// What it asserts of the core (rule 4): guest writes in flight never overlap, widened to the
// source's alignment; every operation is within the disk and carries what it should.
#pragma once

#include <vector>

#include "mirror/events.hpp"
#include "test/sim/flight.hpp"
#include "test/sim/setup.hpp"

namespace nbdferry::sim {

class SourceModel {
 public:
  SourceModel(const Setup& setup, Prng& prng);

  // Returns whether a write runs beside a read that it overlaps, which may then be torn.
  bool submit(mirror::DiskOp&& op);
  [[nodiscard]] bool busy() const { return !flights_.empty(); }
  // An operation, by chance, takes effect in part.
  void progress();
  // An operation, by chance, ends.
  [[nodiscard]] mirror::SourceDone complete();
  // What complete() ended last.
  [[nodiscard]] const mirror::DiskOp& last() const { return last_; }

  // Some sector becomes unreadable until it is written.
  void break_sector();
  [[nodiscard]] bool any_unreadable() const { return unreadable_count_ != 0; }
  // No more errors; sectors can be read again.
  void heal();

  // Blocks of which a small read failed, ever: a copier that skips unreadable sectors leaves them
  // out.
  [[nodiscard]] bool read_failed(std::uint64_t unit) const { return read_failed_[unit]; }

  DiskImage image;

 private:
  void check(const mirror::DiskOp& op) const;

  const Setup& setup_;
  Prng& prng_;
  bool healthy_ = false;
  std::vector<Flight> flights_;
  mirror::DiskOp last_;
  std::vector<bool> unreadable_;
  std::vector<bool> read_failed_;
  std::uint64_t unreadable_count_ = 0;
};

}  // namespace nbdferry::sim
