#include "test/sim/guest_view.hpp"

#include <algorithm>

#include "test/sim/trace.hpp"

namespace nbdferry::sim {

using mirror::Serving;

void GuestView::arrived(const mirror::GuestRequest& request, std::uint64_t event) {
  Request r;
  r.id = request.id;
  r.command = request.command;
  r.range = request.range;
  r.fua = request.fua;
  r.no_hole = request.no_hole;
  r.fast_zero = request.fast_zero;
  r.payload = request.payload;
  r.event = event;
  if (is_write(r.command)) r.write = oracle_.arrived(r.command, r.range, r.payload);
  open_.push_back(std::move(r));
}

void GuestView::source_submitted(const mirror::DiskOp& op, Time now, std::uint64_t event) {
  // The oldest one that fits: overlapping writes run in the order of their arrival.
  const auto it = std::find_if(open_.begin(), open_.end(), [&](const Request& r) {
    return r.command == op.command && r.range == op.range && !r.submitted;
  });
  require(it != open_.end(), "source: {}, which no guest asked for", op);
  require(op.command != Command::write || op.payload.data() == it->payload.data(),
          "source: {} with another payload than the guest's", op);
  for (auto r = open_.begin(); r != it; ++r) {
    require(!is_write(r->command) || r->submitted || !r->range.overlaps(op.range),
            "source: {} before an overlapping write that arrived earlier", op);
  }
  it->submitted = true;
  it->source_op = op.id;
  it->submitted_at = now;
  oracle_.submitted(it->write, event);
  submitted_now_.push_back(it->id);
}

void GuestView::source_done(OpId op, IoError error, Time now) {
  for (auto& r : open_) {
    if (!r.submitted || r.done || r.source_op != op) continue;
    r.done = true;
    r.done_at = now;
    r.source_error = error;
    if (error == IoError::none) done_now_ = r.id;
    return;
  }
}

void GuestView::disk_failed(Command command, ByteRange range, std::uint64_t event) {
  failures_.push_back({command, range, event});
}

void GuestView::judge_error(const Request& r, IoError error, const Authority& authority) const {
  if (error == IoError::shutdown) {
    require(authority.serving == Serving::nobody, "guest #{}: shut out of a disk that serves",
            static_cast<std::uint64_t>(r.id));
    return;
  }
  const bool explained =
      (is_write(r.command) && r.done && r.source_error == error) ||
      (error == IoError::not_supported && r.fast_zero && authority.serving == Serving::target) ||
      (authority.serving == Serving::target && authority.unreachable) ||
      (authority.serving == Serving::target && authority.target_failed &&
       (r.command == Command::flush || r.fua)) ||
      std::any_of(failures_.begin(), failures_.end(), [&](const DiskFailure& f) {
        const bool alike =
            f.command == r.command || r.fua || (is_write(f.command) && is_write(r.command));
        return f.event >= r.event && alike &&
               (f.command == Command::flush || f.range.overlaps(r.range));
      });
  require(explained, "guest #{} {} {}: {}, which its disk never said (rule 1)",
          static_cast<std::uint64_t>(r.id), to_string(r.command), r.range, to_string(error));
}

void GuestView::judge_success(const Request& r, const mirror::Reply& reply,
                              const Authority& authority, std::uint64_t event) {
  const auto number = static_cast<std::uint64_t>(r.id);
  const DiskImage& disk = *authority.image;
  const auto ignored = [&](std::uint64_t u) {
    return authority.target != nullptr && authority.target->haunted(u);
  };
  if (is_write(r.command)) {
    if (authority.serving == Serving::source) {
      require(r.done && r.source_error == IoError::none,
              "guest #{}: acknowledged before its source", number);
    }
    oracle_.acknowledged(r.write, event, r.fua);
    // A trim may change nothing, so its FUA proves nothing about what is there.
    if (!r.fua || r.command == Command::trim) return;
    const auto wrong = oracle_.wrong(r.range, disk.durable() + r.range.begin, event + 1, ignored);
    require(!wrong, "guest #{}: FUA, but byte {} is not on the medium", number, wrong.value_or(0));
  } else if (r.command == Command::flush) {
    const ByteRange all{0, setup_.engine.size};
    const auto wrong = oracle_.wrong(all, disk.durable(), r.event, ignored);
    require(!wrong, "guest #{}: flushed, but byte {} is not on the medium", number,
            wrong.value_or(0));
    oracle_.flushed(r.event, event);
  } else if (r.command == Command::read) {
    require(reply.data.size() == r.range.length(), "guest #{}: read {} gives {} bytes", number,
            r.range, reply.data.size());
    const auto wrong = oracle_.wrong(r.range, reply.data.data(), r.event);
    require(!wrong, "guest #{}: read {} gives a wrong byte {}", number, r.range, wrong.value_or(0));
  } else if (r.command == Command::block_status) {
    std::uint64_t length = 0;
    for (const auto& e : reply.extents) length += e.length;
    require(length > 0 && length <= r.range.length(), "guest #{}: block status of {} of {} bytes",
            number, length, r.range.length());
  }
}

void GuestView::replied(const mirror::Reply& reply, const Authority& authority,
                        std::uint64_t event) {
  const auto it =
      std::find_if(open_.begin(), open_.end(), [&](const Request& r) { return r.id == reply.id; });
  require(it != open_.end(), "guest #{}: a reply to no open request",
          static_cast<std::uint64_t>(reply.id));
  const Request r = std::move(*it);
  open_.erase(it);
  if (reply.error == IoError::none) {
    judge_success(r, reply, authority, event);
  } else {
    judge_error(r, reply.error, authority);
    const bool nothing = reply.error == IoError::not_supported || reply.error == IoError::shutdown;
    if (is_write(r.command) && nothing && !r.again) oracle_.refused(r.write);
  }
}

void GuestView::after_event(bool async, Serving serving) {
  for (auto& r : open_) {
    const bool now =
        std::find(submitted_now_.begin(), submitted_now_.end(), r.id) != submitted_now_.end();
    if (now) r.async = async;
    const bool may_wait = is_write(r.command) && !(r.async && async);
    require(r.id != done_now_ || may_wait || serving != Serving::source,
            "guest #{}: not answered with its source (rule 1)", static_cast<std::uint64_t>(r.id));
  }
  submitted_now_.clear();
  done_now_ = RequestId{};
}

void GuestView::check_delays(Time now) const {
  for (const auto& r : open_) {
    if (!r.done) continue;
    const Time due =
        std::max(r.done_at, r.submitted_at + std::max(setup_.sync_timeout, max_delay_)) +
        2 * setup_.tick_period;
    require(now <= due, "guest #{}: not answered {} us after its source (rule 1)",
            static_cast<std::uint64_t>(r.id),
            std::chrono::duration_cast<std::chrono::microseconds>(now - r.done_at).count());
  }
}

std::vector<mirror::GuestRequest> GuestView::ask_again() {
  std::vector<mirror::GuestRequest> out;
  for (auto& r : open_) {
    r.submitted = r.done = r.async = false;
    r.again = true;
    r.source_error = IoError::none;
    mirror::GuestRequest& q = out.emplace_back();
    q.id = r.id;
    q.command = r.command;
    q.range = r.range;
    q.payload = r.payload;
    q.fua = r.fua;
    q.no_hole = r.no_hole;
    q.fast_zero = r.fast_zero;
  }
  return out;
}

std::size_t GuestView::waiting_for_target() const {
  return static_cast<std::size_t>(
      std::count_if(open_.begin(), open_.end(), [](const Request& r) { return r.done; }));
}

std::uint64_t GuestView::open_write_bytes(std::uint64_t align) const {
  std::uint64_t sum = 0;
  for (const auto& r : open_) {
    if (is_write(r.command)) sum += r.range.widened(align).length();
  }
  return sum;
}

}  // namespace nbdferry::sim
