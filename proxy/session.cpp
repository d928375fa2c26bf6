// Session: one client's connection. Taking input and the phases; session_replies.cpp has the
// output.
#include "proxy/session.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include <sys/socket.h>
#include <sys/uio.h>

#include <boost/asio/post.hpp>

#include "mirror/assert.hpp"
#include "proxy/limits.hpp"
#include "proxy/log.hpp"
#include "transport/limit_silence.hpp"

namespace nbdferry::proxy {
namespace {

Command command_of(nbd::RequestType type) {
  switch (type) {
    case nbd::RequestType::read:
      return Command::read;
    case nbd::RequestType::write:
      return Command::write;
    case nbd::RequestType::flush:
      return Command::flush;
    case nbd::RequestType::trim:
      return Command::trim;
    case nbd::RequestType::cache:
      return Command::cache;
    case nbd::RequestType::write_zeroes:
      return Command::zero;
    case nbd::RequestType::block_status:
      return Command::block_status;
    case nbd::RequestType::disc:
      break;
  }
  NBDFERRY_ASSERT(false, "only checked requests are admitted");
  return Command::read;
}

}  // namespace

Session::Session(boost::asio::io_context& io, UniqueFd socket, std::string peer,
                 const std::vector<Front*>& fronts, SessionOwner& owner)
    : owner_(&owner),
      socket_(io, socket.release()),
      peer_(std::move(peer)),
      handshake_(fronts),
      deadline_(io),
      input_(limits::input_bytes) {}

Session::~Session() { NBDFERRY_ASSERT(phase_ == Phase::closed, "a session is closed first"); }

void Session::start() {
  deadline_.expires_after(limits::handshake_timeout);
  deadline_.async_wait([self = shared_from_this()](boost::system::error_code error) {
    const bool over = self->phase_ == Phase::transmission || self->phase_ == Phase::closed;
    if (!error && !over) self->drop("the handshake takes too long");
  });
  turn();
}

// --- input
// ----------------------------------------------------------------------------------------

// Takes what is there, in large pieces, within bounds; then sends what is left to send.
void Session::turn() {
  in_turn_ = true;
  more_to_receive_ = false;
  parse();
  for (int i = 0; wants_input(); ++i) {
    if (i == limits::receives_per_turn_max) {
      more_to_receive_ = true;
      break;
    }
    const Received received = receive();
    if (received == Received::nothing) break;
    if (received == Received::ended) {
      // Requests that were complete have been parsed; what is left is less than one.
      close();
      break;
    }
    if (phase_ == Phase::transmission) owner_->before_requests(*this);
    const auto taken = requests_taken_;
    parse();
    // One request and nothing behind it: this client waits for the answer, not we for more.
    const bool alone = requests_taken_ == taken + 1 && input_.size() == 0;
    if (alone && !large_write_.under_way()) break;
  }
  in_turn_ = false;
  end_turn();
}

bool Session::wants_input() const {
  if (fenced_ || at_limit_ || last_words_) return false;
  // A handshake goes step by step: an option is looked at when the last answer has left.
  if (phase_ == Phase::handshake) return replies_.empty();
  return phase_ == Phase::transmission;
}

Session::Received Session::receive() {
  std::array<iovec, 2> pieces;
  std::size_t count = 0;
  auto room = input_.room();
  const auto in_place = large_write_.missing();
  if (in_place > 0) {
    NBDFERRY_ASSERT(input_.size() == 0, "input goes into the payload first");
    pieces[count++] = {large_write_.buffer.data() + large_write_.filled, in_place};
    room = room.first(limits::read_ahead_bytes);
  }
  pieces[count++] = {room.data(), room.size()};
  msghdr message{};
  message.msg_iov = pieces.data();
  message.msg_iovlen = count;
  ssize_t got = 0;
  do {
    got = ::recvmsg(socket_.native_handle(), &message, MSG_DONTWAIT);
  } while (got < 0 && errno == EINTR);
  if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return Received::nothing;
  if (got <= 0) return Received::ended;
  const auto size = static_cast<std::size_t>(got);
  large_write_.filled += std::min(size, in_place);
  if (size > in_place) input_.received(size - in_place);
  return Received::some;
}

void Session::parse() {
  if (phase_ == Phase::handshake) negotiate();
  if (phase_ == Phase::transmission) parse_requests();
}

void Session::negotiate() {
  while (phase_ == Phase::handshake) {
    if (auto& output = handshake_.output(); !output.empty()) {
      push({}, Payload::copy_of(output), {});
      output.clear();
      send();
    }
    switch (handshake_.state()) {
      case Handshake::State::negotiating: {
        if (!replies_.empty()) return;
        const auto taken = handshake_.consume(input_.bytes());
        input_.take(taken);
        if (taken == 0 && handshake_.state() == Handshake::State::negotiating) return;
        break;
      }
      case Handshake::State::transmission:
        return enter_transmission();
      case Handshake::State::finished:
        phase_ = Phase::finishing;
        return;
      case Handshake::State::failed:
        return drop(handshake_.why());
    }
  }
}

void Session::enter_transmission() {
  deadline_.cancel();
  owner_->before_requests(*this);
  const Negotiated& negotiated = handshake_.negotiated();
  phase_ = Phase::transmission;
  front_ = negotiated.front;
  const Contexts& contexts = negotiated.contexts;
  allocation_ = contexts.allocation;
  if (!contexts.migration.empty()) {
    private_contexts_.push_back(migration_context_id);
    // It comes back by itself, with new connections, whose number is limited: those that a dead link has left
    // behind must not keep it out. A guest may be as patient as it likes.
    transport::limit_silence(socket_.native_handle());
  }
  if (!contexts.session.empty()) private_contexts_.push_back(session_context_id);
  if (!contexts.holds.empty()) private_contexts_.push_back(holds_context_id);
  if (contexts.sum_low) private_contexts_.push_back(sum_low_context_id);
  if (contexts.sum_high) private_contexts_.push_back(sum_high_context_id);
  checksums_ = contexts.sum_low || contexts.sum_high;
  rights_.structured_replies = negotiated.structured_replies;
  rights_.block_status = allocation_ || !private_contexts_.empty();
  number_ = front_->attach(*this, {contexts.migration, contexts.session});
}

void Session::parse_requests() {
  at_limit_ = false;
  while (phase_ == Phase::transmission && !fenced_) {
    if (skip_bytes_ > 0) {
      const auto skipped = std::min<std::uint64_t>(skip_bytes_, input_.size());
      input_.take(skipped);
      skip_bytes_ -= skipped;
      if (skip_bytes_ > 0) return;
    }
    if (large_write_.under_way() && !fill_large_write()) return;
    if (!take_request()) return;
  }
}

// The next request, if it is there as a whole (a large write's header is enough) and within limits.
bool Session::take_request() {
  if (input_.size() < nbd::request_header_bytes) return false;
  const std::byte* header = input_.bytes().data();
  if (!nbd::has_request_magic(header)) {
    drop("not an NBD request: wrong magic number");
    return false;
  }
  const nbd::Request request = nbd::load_request(header);
  if (request.type == nbd::RequestType::disc) {
    phase_ = Phase::finishing;
    return false;
  }
  if (!last_words_ && !within_limits(request)) {
    at_limit_ = true;
    return false;
  }
  const IoError error = check(request);
  if (error == IoError::none && request.payload_bytes() > 0) {
    if (request.length > limits::copied_write_bytes_max) {
      input_.take(nbd::request_header_bytes);
      large_write_ = {request, Buffer(request.length), 0};
      return true;
    }
    const auto whole = nbd::request_header_bytes + request.length;
    if (input_.size() < whole) return false;
    Payload payload =
        Payload::copy_of(input_.bytes().subspan(nbd::request_header_bytes, request.length));
    input_.take(whole);
    admit(request, std::move(payload));
    return true;
  }
  input_.take(nbd::request_header_bytes);
  skip_bytes_ = request.payload_bytes();
  // Nothing to do is done at once: the export never sees an empty range.
  const bool empty = request.length == 0 && request.type != nbd::RequestType::flush;
  if (error == IoError::none && !empty) {
    admit(request, {});
  } else {
    refuse(request, error);
  }
  return true;
}

// Moves what was received into the payload; admits the write when that is all of it.
bool Session::fill_large_write() {
  const auto more = std::min(large_write_.missing(), input_.size());
  std::memcpy(large_write_.buffer.data() + large_write_.filled, input_.bytes().data(), more);
  input_.take(more);
  large_write_.filled += more;
  if (large_write_.missing() > 0) return false;
  LargeWrite write = std::exchange(large_write_, {});
  // Judged again: the right to write may have gone while the payload came.
  if (const IoError error = check(write.request); error != IoError::none) {
    refuse(write.request, error);
  } else {
    admit(write.request, std::move(write.buffer).freeze());
  }
  return true;
}

bool Session::within_limits(const nbd::Request& request) const {
  if (in_flight_.requests == 0) return true;
  return in_flight_.requests < limits::requests_in_flight_max &&
         in_flight_.bytes + nbd::bytes_held(request) <= owner_->bytes_share();
}

// Input waits that could go on now.
bool Session::may_go_on() const {
  return at_limit_ && within_limits(nbd::load_request(input_.bytes().data()));
}

IoError Session::check(const nbd::Request& request) {
  const bool writes = nbd::is_write(request.type);
  if (writes) rights_.may_write = front_->may_write(number_);
  const IoError error = nbd::check(request, front_->info(), rights_);
  // Only what changes the disk matters of what a client says while it hangs up.
  const bool pointless = last_words_ && !writes && request.type != nbd::RequestType::flush;
  return error == IoError::none && pointless ? IoError::shutdown : error;
}

void Session::admit(const nbd::Request& request, Payload payload) {
  if (free_slots_.empty()) {
    free_slots_.push_back(static_cast<std::uint32_t>(slots_.size()));
    slots_.emplace_back();
  }
  const auto slot = free_slots_.back();
  free_slots_.pop_back();
  ++requests_taken_;
  slots_[slot] = {request, true};
  ++in_flight_.requests;
  in_flight_.bytes += nbd::bytes_held(request);
  mirror::GuestRequest guest;
  guest.id = make_request_id(number_, slot);
  guest.command = command_of(request.type);
  guest.range = {request.offset, request.offset + request.length};
  if (checksums_ && nbd::checksum_bytes(request) != 0) {
    guest.command = Command::checksum;
    guest.range.end = request.offset + nbd::checksum_bytes(request);
  }
  guest.payload = std::move(payload);
  guest.fua = nbd::is_write(request.type) && (request.flags & nbd::cmd_fua) != 0;
  guest.no_hole = (request.flags & nbd::cmd_no_hole) != 0;
  guest.fast_zero = (request.flags & nbd::cmd_fast_zero) != 0;
  front_->submit(std::move(guest));
}

// --- rule 8
// ---------------------------------------------------------------------------------------

void Session::settle_hung_up() {
  if (phase_ == Phase::closed || phase_ == Phase::finishing) return;
  settle();
  end_turn();
}

// The peer has hung up. What it sent and we haven't taken is all or nothing: an orderly client's
// last requests, or the rest of one that died, whose successor may have sent the same blocks anew.
void Session::settle() {
  if (phase_ == Phase::handshake) return close();
  if (phase_ != Phase::transmission || NBDFERRY_MUTANT(front_keeps_unparsed)) return;
  input_.grow(limits::last_words_bytes_max);
  while (!input_.room().empty() && receive() == Received::some) {
  }
  if (!nbd::ends_in_disc(input_.bytes(), large_write_.missing() + skip_bytes_)) {
    if (large_write_.filled + input_.size() == 0) return close();
    return drop("hung up without DISC; what it sent last is not executed");
  }
  last_words_ = true;
  in_turn_ = true;
  parse_requests();
  in_turn_ = false;
}

// --- phases
// ---------------------------------------------------------------------------------------

void Session::end_turn() {
  if (phase_ == Phase::closed) return;
  send();
  if (fenced_) return drop("replaced by a newer migration, or by a newer session of it");
  if (broken_) settle();
  if (phase_ == Phase::closed) return;
  if (phase_ == Phase::finishing && in_flight_.requests == 0 && replies_.empty()) return close();
  if (more_to_receive_ || may_go_on()) {
    schedule();
  } else if (wants_input()) {
    wait_readable();
  }
}

void Session::run() {
  if (phase_ == Phase::closed) return;
  send();
  if (phase_ == Phase::handshake || more_to_receive_ || may_go_on()) {
    turn();
  } else {
    end_turn();
  }
}

void Session::schedule() {
  if (std::exchange(scheduled_, true)) return;
  boost::asio::post(socket_.get_executor(), [self = shared_from_this()] {
    self->scheduled_ = false;
    self->run();
  });
}

void Session::wait_readable() {
  if (std::exchange(waiting_readable_, true)) return;
  socket_.async_wait(socket_.wait_read, [self = shared_from_this()](boost::system::error_code) {
    self->waiting_readable_ = false;
    if (self->phase_ != Phase::closed) self->turn();
  });
}

void Session::wait_writable() {
  if (std::exchange(waiting_writable_, true)) return;
  socket_.async_wait(socket_.wait_write, [self = shared_from_this()](boost::system::error_code) {
    self->waiting_writable_ = false;
    self->run();
  });
}

void Session::finish() {
  if (phase_ == Phase::closed) return;
  if (phase_ == Phase::handshake) return close();
  phase_ = Phase::finishing;
  deadline_.expires_after(limits::drain_timeout);
  deadline_.async_wait([self = shared_from_this()](boost::system::error_code error) {
    if (!error && self->phase_ != Phase::closed) self->drop("it does not take its replies");
  });
  end_turn();
}

void Session::fence() {
  fenced_ = true;
  ::shutdown(socket_.native_handle(), SHUT_RDWR);
  if (!in_turn_) schedule();
}

void Session::drop(std::string_view why) {
  log("client {}: dropped: {}", peer_, why);
  close();
}

void Session::close() {
  if (std::exchange(phase_, Phase::closed) == Phase::closed) return;
  if (front_ != nullptr) front_->detach(number_);
  deadline_.cancel();
  boost::system::error_code ignored;
  socket_.close(ignored);
  owner_->session_closed(*this);
}

}  // namespace nbdferry::proxy
