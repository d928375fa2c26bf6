// Flight: an operation between its submission and its answer, on either disk.
//
// It takes effect unit by unit (512 bytes), in any order, at moments of the simulator's choosing;
// so a read beside a write is torn, and a write that fails, or whose connection is lost, has been
// done in part.
#pragma once

#include <cstdint>
#include <vector>

#include "mirror/events.hpp"
#include "test/sim/disk_image.hpp"

namespace nbdferry::sim {

class Flight {
 public:
  // `error` is how it will end; `inert`: it leaves the disk alone (a refusal, a trim without
  // effect).
  Flight(mirror::DiskOp op, IoError error, bool inert, const DiskImage& image);

  [[nodiscard]] const mirror::DiskOp& op() const { return op_; }
  [[nodiscard]] bool writes() const { return is_write(op_.command); }
  [[nodiscard]] bool reads() const {
    return op_.command == Command::read || op_.command == Command::checksum;
  }

  // Some of the units that are left, by chance.
  void progress(DiskImage& image, Prng& prng);
  // The rest of it, as far as its end allows. `forgetful`: a flush that fails leaves units that no
  // later flush will write.
  void finish(DiskImage& image, bool forgetful, Prng& prng);
  // Overrides how it ends: a read of an unreadable sector.
  void fail(IoError error) { error_ = error; }
  // It will end well after all.
  void heal() {
    if (error_ != IoError::none) inert_ = false;
    error_ = IoError::none;
  }
  // The units that were not done, each or not, as a server does that lost its client. Returns
  // whether anything was left to do.
  bool haunt(DiskImage& image, Prng& prng);

  [[nodiscard]] IoError error() const { return error_; }
  [[nodiscard]] bool changed() const { return !inert_; }
  [[nodiscard]] Payload take_data() { return std::move(data_).freeze(); }
  [[nodiscard]] std::uint64_t checksum() const;

  // Block status, truthful at the moment it is made: runs of at least `grain`, a prefix at times.
  // `vague`: a hole need not read as zeroes, zeroes need not be seen. `lagging`: units of which
  // only the durable content is seen; may be null.
  void make_extents(const DiskImage& image, std::uint64_t grain, bool vague,
                    const std::vector<bool>* lagging, Prng& prng);
  [[nodiscard]] std::vector<Extent>& extents() { return extents_; }

  std::uint64_t event = 0;  // target only: of its submission
  unsigned connection = 0;  // target only
  bool doomed = false;      // target only: its connection is lost, it can only be answered as lost

 private:
  void touch(DiskImage& image, std::uint64_t unit);
  void touch_some(DiskImage& image, std::uint64_t mask_or, Prng& prng);

  mirror::DiskOp op_;
  IoError error_;
  bool inert_;
  std::uint64_t first_unit_ = 0;
  std::uint64_t unit_count_ = 0;
  std::vector<std::uint64_t> left_;  // a bit for each unit that is not done
  Buffer data_;                      // read, or of which the checksum is made
  std::vector<Extent> extents_;
  DiskImage::Covered covered_;  // flush
};

}  // namespace nbdferry::sim
