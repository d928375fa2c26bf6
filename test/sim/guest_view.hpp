// GuestView: the guest's side of the contract. Knows every open request and judges every reply.
//
// What must hold: one reply to each request; its result is the serving disk's result (rule 1); what
// is read was written (rule 4); what a flush or FUA covers is on the medium; in async mode a write
// is answered with the source's answer, in sync mode soon after (rule 1's bounds).
#pragma once

#include <string>
#include <vector>

#include "mirror/engine.hpp"
#include "test/sim/oracle.hpp"
#include "test/sim/setup.hpp"
#include "test/sim/target_model.hpp"

namespace nbdferry::sim {

class GuestView {
 public:
  struct Request {
    RequestId id{};
    Command command = Command::read;
    ByteRange range;
    bool fua = false;
    bool no_hole = false;
    bool fast_zero = false;
    Payload payload;
    std::uint64_t event = 0;  // of its arrival
    std::uint32_t write = 0;  // the oracle's number
    bool again = false;       // asked once more: an earlier attempt may have done it
    bool submitted = false;   // writes: to the source
    bool done = false;        // writes: the source has answered
    OpId source_op{};
    IoError source_error = IoError::none;
    Time submitted_at{0};
    Time done_at{0};
    bool async = false;  // the mode when it was submitted
  };

  GuestView(const Setup& setup, const DiskImage& source) : setup_(setup), oracle_(source) {}

  void arrived(const mirror::GuestRequest& request, std::uint64_t event);
  // A source operation that writes: it must be one that the guest asked for, as it asked for it.
  void source_submitted(const mirror::DiskOp& op, Time now, std::uint64_t event);
  void source_done(OpId op, IoError error, Time now);
  // A read or flush of the serving disk failed: errors of requests that it touches are explained.
  void disk_failed(Command command, ByteRange range, std::uint64_t event);

  struct Authority {
    mirror::Serving serving;
    const DiskImage* image;     // of the serving disk
    bool unreachable;           // pivoted: the target has been away longer than I/O waits for it
    bool target_failed;         // pivoted: some operation of it failed, or it was lost
    const TargetModel* target;  // pivoted: units that zombies wrote are not held against it
  };
  void replied(const mirror::Reply& reply, const Authority& authority, std::uint64_t event);

  // After each event: the mode in force, for the requests submitted or answered in it.
  void after_event(bool async, mirror::Serving serving);
  void check_delays(Time now) const;

  [[nodiscard]] const std::vector<Request>& open() const { return open_; }
  // Writes that their source has answered, and the guest not been told.
  [[nodiscard]] std::size_t waiting_for_target() const;
  [[nodiscard]] std::uint64_t open_write_bytes(std::uint64_t align) const;
  [[nodiscard]] Oracle& oracle() { return oracle_; }

  // The server was killed: what is open is asked once more, in order, as QEMU does.
  [[nodiscard]] std::vector<mirror::GuestRequest> ask_again();

  // Of the present migration: what pacing may take.
  void set_max_delay(Duration d) { max_delay_ = d; }

 private:
  void judge_success(const Request& r, const mirror::Reply& reply, const Authority& authority,
                     std::uint64_t event);
  void judge_error(const Request& r, IoError error, const Authority& authority) const;

  struct DiskFailure {
    Command command;
    ByteRange range;
    std::uint64_t event;
  };

  const Setup& setup_;
  Oracle oracle_;
  std::vector<Request> open_;
  std::vector<DiskFailure> failures_;
  std::vector<RequestId> submitted_now_;  // in the current event
  RequestId done_now_{};                  // one whose source answered well in the current event
  Duration max_delay_{0};
};

}  // namespace nbdferry::sim
