#include "test/sim/source_model.hpp"

#include "test/sim/trace.hpp"

namespace nbdferry::sim {

SourceModel::SourceModel(const Setup& setup, Prng& prng)
    : image(setup.engine.size),
      setup_(setup),
      prng_(prng),
      unreadable_(image.units()),
      read_failed_(image.units()) {
  // Data and holes, by blocks or in large runs.
  const std::uint64_t run = prng.pick({block_size_min, block_size_min * 4, chunk_size});
  for (std::uint64_t at = 0; at < image.size(); at += run) {
    if (prng.chance(1, 2)) image.preset(ByteRange{at, std::min(at + run, image.size())}, 1);
  }
}

void SourceModel::check(const mirror::DiskOp& op) const {
  if (op.command == Command::flush) return;
  require(!op.range.empty() && op.range.end <= image.size(), "source: {} is not within the disk",
          op);
  if (op.command == Command::write) {
    require(op.payload.size() == op.range.length(), "source: {} carries {} bytes", op,
            op.payload.size());
  }
  if (!is_write(op.command)) return;
  const ByteRange wide = op.range.widened(setup_.engine.source_align);
  for (const auto& f : flights_) {
    require(!f.writes() || !f.op().range.widened(setup_.engine.source_align).overlaps(wide),
            "source: {} while {} is in flight", op, f.op());
  }
}

bool SourceModel::submit(mirror::DiskOp&& op) {
  check(op);
  if (is_write(op.command)) mended_ = set_read_failed(op.range, false) || mended_;
  bool beside_read = false;
  for (const auto& f : flights_) {
    beside_read =
        beside_read || (is_write(op.command) && f.reads() && f.op().range.overlaps(op.range));
  }
  IoError error = IoError::none;
  bool inert = op.command == Command::trim && prng_.chance(1, 4);
  if (op.fast_only && prng_.chance(1, 2)) {
    error = IoError::not_supported;
    inert = true;
  }
  if (!healthy_ && setup_.source_errors && prng_.chance(1, 30)) {
    error = prng_.pick({IoError::io, IoError::io, IoError::no_space});
    inert = prng_.chance(1, 3);
  }
  flights_.emplace_back(std::move(op), error, inert, image);
  return beside_read;
}

void SourceModel::progress() {
  if (flights_.empty()) return;
  flights_[prng_.below(flights_.size())].progress(image, prng_);
}

mirror::SourceDone SourceModel::complete() {
  const std::size_t i = prng_.below(flights_.size());
  Flight f = std::move(flights_[i]);
  flights_[i] = std::move(flights_.back());
  flights_.pop_back();
  const auto& op = f.op();
  last_ = op;
  for (std::uint64_t u = op.range.begin / unit_size; u * unit_size < op.range.end; ++u) {
    if (f.reads() && unreadable_[u]) f.fail(IoError::io);
  }
  f.finish(image, false, prng_);  // the guest learns of a failed flush: it is the guest's to act

  mirror::SourceDone done{op.id, f.error(), f.changed(), {}, {}};
  for (std::uint64_t u = op.range.begin / unit_size; u * unit_size < op.range.end; ++u) {
    if (f.writes() && f.error() == IoError::none && unreadable_[u]) {
      unreadable_[u] = false;
      --unreadable_count_;
    }
  }
  if (f.reads() && f.error() != IoError::none) {
    const std::uint64_t block = std::max<std::uint64_t>(block_size_min, setup_.target.block_min);
    if (op.range.length() <= block) (void)set_read_failed(op.range, true);
  }
  if (f.error() != IoError::none) return done;
  if (op.command == Command::read) done.data = f.take_data();
  if (op.command == Command::checksum) done.checksum = f.checksum();
  if (op.command == Command::block_status) {
    f.make_extents(image, unit_size, false, nullptr, prng_);
    done.extents = std::move(f.extents());
  }
  return done;
}

void SourceModel::crash() {
  for (auto& f : flights_) {
    if (prng_.chance(2, 3)) f.progress(image, prng_);
  }
  flights_.clear();
}

bool SourceModel::set_read_failed(ByteRange range, bool failed) {
  const std::uint64_t block = std::max<std::uint64_t>(block_size_min, setup_.target.block_min);
  const ByteRange r = range.widened(block).intersect({0, image.size()});
  bool any = false;
  for (std::uint64_t u = r.begin / unit_size; u * unit_size < r.end; ++u) {
    any = any || read_failed_[u];
    read_failed_[u] = failed;
  }
  return any;
}

void SourceModel::break_sector() {
  const std::uint64_t unit = prng_.below(image.units());
  if (unreadable_[unit]) return;
  unreadable_[unit] = true;
  ++unreadable_count_;
}

void SourceModel::heal() {
  healthy_ = true;
  for (auto& f : flights_) f.heal();
  if (setup_.stays_unreadable) return;
  unreadable_.assign(image.units(), false);
  unreadable_count_ = 0;
}

}  // namespace nbdferry::sim
