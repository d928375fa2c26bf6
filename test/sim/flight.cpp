#include "test/sim/flight.hpp"

#include <cstring>

namespace nbdferry::sim {

Flight::Flight(mirror::DiskOp op, IoError error, bool inert, const DiskImage& image)
    : op_(std::move(op)), error_(error), inert_(inert) {
  if (op_.command == Command::flush) covered_ = image.begin_flush();
  if (reads()) data_ = Buffer(op_.range.length());
  if (!writes() && !reads()) return;
  first_unit_ = op_.range.begin / unit_size;
  unit_count_ = (op_.range.end + unit_size - 1) / unit_size - first_unit_;
  left_.assign((unit_count_ + 63) / 64, ~std::uint64_t{0});
  if (unit_count_ % 64 != 0) left_.back() = (std::uint64_t{1} << (unit_count_ % 64)) - 1;
}

void Flight::touch(DiskImage& image, std::uint64_t unit) {
  const ByteRange part = op_.range.intersect({unit * unit_size, (unit + 1) * unit_size});
  const std::uint64_t at = part.begin - op_.range.begin;
  if (reads()) {
    std::memcpy(data_.data() + at, image.current() + part.begin, part.length());
  } else {
    image.write(part, op_.command == Command::write ? op_.payload.data() + at : nullptr);
  }
}

void Flight::touch_some(DiskImage& image, std::uint64_t mask_or, Prng& prng) {
  for (std::size_t word = 0; word < left_.size(); ++word) {
    std::uint64_t now = left_[word] & (mask_or | prng.next());
    left_[word] &= ~now;
    for (; now != 0; now &= now - 1) {
      const auto bit = static_cast<std::uint64_t>(__builtin_ctzll(now));
      touch(image, first_unit_ + word * 64 + bit);
    }
  }
}

void Flight::progress(DiskImage& image, Prng& prng) {
  if (inert_) return;
  touch_some(image, prng.chance(1, 3) ? ~std::uint64_t{0} : 0, prng);
}

void Flight::finish(DiskImage& image, bool forgetful, Prng& prng) {
  if (op_.command == Command::flush) {
    if (error_ == IoError::none) {
      image.end_flush(covered_);
    } else if (forgetful) {
      image.fail_flush(covered_, prng);
    }
  }
  if (inert_ || error_ != IoError::none) return;
  touch_some(image, ~std::uint64_t{0}, prng);
  if (writes() && op_.fua) image.write_back(op_.range);
}

// Any will do that tells different bytes apart; this one takes eight at a time.
std::uint64_t Flight::checksum() const {
  std::uint64_t sum = 0;
  for (std::size_t at = 0; at < data_.size(); at += sizeof sum) {
    std::uint64_t word = 0;
    std::memcpy(&word, data_.data() + at, std::min(sizeof word, data_.size() - at));
    sum = (sum ^ word) * 0x9e3779b97f4a7c15;
    sum ^= sum >> 29;
  }
  return sum;
}

bool Flight::haunt(DiskImage& image, Prng& prng) {
  bool any = false;
  for (const auto word : left_) any = any || word != 0;
  touch_some(image, prng.chance(1, 2) ? ~std::uint64_t{0} : 0, prng);
  return any;
}

void Flight::make_extents(const DiskImage& image, std::uint64_t grain, bool vague,
                          const std::vector<bool>* lagging, Prng& prng) {
  extents_.clear();
  const auto reads_as_zero = [&](std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t at = begin; at < end;) {
      const std::uint64_t unit = at / unit_size;
      const std::uint64_t next = std::min((unit + 1) * unit_size, end);
      const bool late = lagging != nullptr && (*lagging)[unit];
      if (!all_zero((late ? image.durable() : image.current()) + at, next - at)) return false;
      at = next;
    }
    return true;
  };
  const std::uint64_t g = std::max(grain, unit_size);
  const bool thorough = prng.chance(1, 2);
  for (std::uint64_t at = op_.range.begin; at < op_.range.end;) {
    const std::uint64_t next = std::min((at / g + 1) * g, op_.range.end);
    Extent e{next - at, false, reads_as_zero(at, next)};
    e.hole = e.zero;
    if (vague && prng.chance(1, 8)) e.hole = !e.hole;
    if (!thorough && prng.chance(1, 16)) e.zero = e.hole = false;
    if (!extents_.empty() && extents_.back().hole == e.hole && extents_.back().zero == e.zero) {
      extents_.back().length += e.length;
    } else {
      extents_.push_back(e);
    }
    at = next;
  }
  if (prng.chance(1, 3)) extents_.resize(prng.between(1, extents_.size()));
}

}  // namespace nbdferry::sim
