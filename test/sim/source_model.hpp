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

  // Whoever asked is gone: what is under way is done in part, and never later (the disk's lock outlives
  // the operations of a killed process).
  void crash();

  // Some sector becomes unreadable until it is written.
  void break_sector();
  [[nodiscard]] bool any_unreadable() const { return unreadable_count_ != 0; }
  // A write to what could not be read has been submitted.
  [[nodiscard]] bool mended() const { return mended_; }
  // No more errors; sectors can be read again, unless they stay as they are.
  void heal();

  // Blocks of which a small read failed, and which were not written since: a copier that skips
  // unreadable sectors leaves them out.
  [[nodiscard]] bool read_failed(std::uint64_t unit) const { return read_failed_[unit]; }

  // Another migration: it has to find out for itself.
  void forget_failed_reads() { read_failed_.assign(image.units(), false); }

  DiskImage image;

 private:
  void check(const mirror::DiskOp& op) const;
  // In whole blocks of the target. Returns whether any of it had failed.
  bool set_read_failed(ByteRange range, bool failed);

  const Setup& setup_;
  Prng& prng_;
  bool healthy_ = false;
  std::vector<Flight> flights_;
  mirror::DiskOp last_;
  std::vector<bool> unreadable_;
  std::vector<bool> read_failed_;
  std::uint64_t unreadable_count_ = 0;
  bool mended_ = false;
};

}  // namespace nbdferry::sim
