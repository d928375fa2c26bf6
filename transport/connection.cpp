// The life of a connection: dial, handshake, waits, end. What it sends is in flights.cpp.
#include "transport/connection.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <string_view>

#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/post.hpp>
#include <fmt/format.h>
#include <libnbd.h>

#include "mirror/assert.hpp"
#include "transport/certificate_check.hpp"
#include "transport/flight.hpp"
#include "transport/libnbd_errors.hpp"

namespace nbdferry::transport {

namespace {

// Replies handled before the loop gets its turn. libnbd handles one a call, and the socket must be
// known to be readable before each.
constexpr int replies_per_turn_max = 64;
constexpr int records_per_turn_max = 64;  // the same for what is sent

// What to do about it.
constexpr const char* check_server = "check the server there, and the export's name";

constexpr int checks_per_answer_timeout = 4;

bool set_corked(int fd, bool on) {
  const int value = on ? 1 : 0;
  return ::setsockopt(fd, IPPROTO_TCP, TCP_CORK, &value, sizeof value) == 0;
}

constexpr std::uint32_t payload_limit = 32 * 1024 * 1024;  // NBD protocol: portable maximum

}  // namespace

Connection::Connection(const boost::asio::any_io_executor& executor, ConnectionOptions options,
                       ConnectionOwner& owner)
    : options_(std::move(options)),
      owner_(&owner),
      executor_(executor),
      timer_(executor),
      watched_(executor),
      elsewhere_(executor) {}

Connection::~Connection() { shut(); }

void Connection::open() {
  timer_.expires_after(options_.connect_timeout);
  timer_.async_wait([weak = weak_from_this()](const boost::system::error_code& error) {
    if (auto self = weak.lock(); self && !error) self->on_timeout();
  });
  dial_ = std::make_shared<Dial>(executor_, options_.endpoint,
                                 [weak = weak_from_this()](int fd, const std::string& error) {
                                   if (auto self = weak.lock()) {
                                     self->on_dialled(fd, error);
                                   } else if (fd >= 0) {
                                     ::close(fd);
                                   }
                                 });
  dial_->start();
}

void Connection::on_timeout() {
  if (stage_ == Stage::ready || stage_ == Stage::ended) return;
  if (certificate_check_) {
    fail(explain_certificate(CertificateFault::unknown, *options_.endpoint.tls));
    return;
  }
  const auto seconds = std::chrono::duration<double>(options_.connect_timeout).count();
  fail(stage_ == Stage::dialling
           ? fmt::format("cannot connect: no answer within {:g} s: {}", seconds, check_address)
           : fmt::format("connected, but the NBD handshake did not end within {:g} s: {}", seconds,
                         check_server));
}

// --- a server that hangs
// --------------------------------------------------------------------------------------

void Connection::watch_answers() {
  timer_.expires_after(options_.answer_timeout / checks_per_answer_timeout);
  timer_.async_wait([weak = weak_from_this()](const boost::system::error_code& error) {
    if (auto self = weak.lock(); self && !error && self->stage_ == Stage::ready) {
      self->check_answers();
    }
  });
}

void Connection::check_answers() {
  const auto now = Clock::now();
  const int unsent = unsent_bytes();
  // What we add to it is no sign of life: a guest that goes on writing would hide that nobody is there.
  if (std::exchange(moved_, false) || ops_ == 0 || unsent < unsent_bytes_) moved_at_ = now;
  unsent_bytes_ = unsent;
  if (now - moved_at_ < options_.answer_timeout) {
    watch_answers();
    return;
  }
  hung_ = true;
  fail(fmt::format("the server hangs: requests unanswered, and nothing moving for {:g} s",
                   std::chrono::duration<double>(options_.answer_timeout).count()));
}

// What our kernel has taken and the peer's not.
int Connection::unsent_bytes() {
  int bytes = 0;
  return ::ioctl(watched_.native_handle(), SIOCOUTQ, &bytes) == 0 ? bytes : 0;
}

void Connection::on_dialled(int fd, const std::string& error) {
  dial_.reset();
  if (fd < 0) {
    fail(error);
    return;
  }
  const auto failure = start_handshake(fd);
  if (!failure.empty()) {
    fail(failure);
    return;
  }
  if (!dead_) wait_as_directed();
  progress();
}

// Takes the descriptor over; returns why it failed, or nothing. What libnbd has to say comes by progress().
std::string Connection::start_handshake(int fd) {
  const int watched = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (watched < 0) {
    const int error = errno;
    ::close(fd);
    return fmt::format("cannot duplicate a socket: {}", std::strerror(error));
  }
  watched_.assign(watched);
  stage_ = Stage::handshaking;
  handle_ = nbd_create();
  // We send nothing that the server didn't offer; where libnbd's view differs, the server decides.
  // Buffers are always filled before they are used, so that clearing them first is wasted.
  const bool configured =
      handle_ != nullptr && nbd_set_strict_mode(handle_, 0) == 0 &&
      nbd_set_pread_initialize(handle_, false) == 0 &&
      nbd_set_export_name(handle_, options_.endpoint.export_name.c_str()) == 0 &&
      nbd_add_meta_context(handle_, LIBNBD_CONTEXT_BASE_ALLOCATION) == 0 && add_private_contexts();
  if (!configured) {
    ::close(fd);
    return last_libnbd_error();
  }
  const auto& tls = options_.endpoint.tls;
  if (tls) {
    tls_files_ = tls_files_version(*tls);
    auto why = prepare_tls(handle_, *tls);
    if (!why.empty()) {
      ::close(fd);
      return why;
    }
  }
  // From here on the descriptor is libnbd's, even when this fails. With a server that is quick enough the
  // handshake may have ended when it returns.
  if (nbd_aio_connect_socket(handle_, fd) == -1) {
    dead_ = true;
    return {};
  }
  if (tls && !will_verify(handle_, *tls)) {
    return "this libnbd would not verify the server's name: use --tls-psk, or another version";
  }
  return {};
}

// In this order: a session is one of a migration.
bool Connection::add_private_contexts() {
  if (options_.migration_id.empty()) return true;
  const auto add = [this](std::string_view name, const std::string& value) {
    return nbd_add_meta_context(handle_, private_context(name, value).c_str()) == 0;
  };
  const bool sums = nbd_add_meta_context(handle_, sum_low_context) == 0 &&
                    nbd_add_meta_context(handle_, sum_high_context) == 0;
  if (options_.probe) return sums && add("knows", options_.session);
  return sums && add("migration", options_.migration_id) && add("session", options_.session) &&
         add("holds", options_.migration_id);
}

void Connection::learn_offer() {
  auto& info = offer_.info;
  const auto block_size = [this](int which) {
    return static_cast<std::uint64_t>(
        std::max<std::int64_t>(0, nbd_get_block_size(handle_, which)));
  };
  info.size = static_cast<std::uint64_t>(std::max<std::int64_t>(0, nbd_get_size(handle_)));
  // Zero means that the server didn't say. libnbd has checked that it is a power of two ≤ 64 KiB.
  info.block_min =
      static_cast<std::uint32_t>(std::max<std::uint64_t>(1, block_size(LIBNBD_SIZE_MINIMUM)));
  const auto payload_max = block_size(LIBNBD_SIZE_MAXIMUM);
  info.payload_max =
      payload_max == 0
          ? payload_limit
          : static_cast<std::uint32_t>(std::min<std::uint64_t>(payload_max, payload_limit));
  info.read_only = nbd_is_read_only(handle_) == 1;
  info.can_flush = nbd_can_flush(handle_) == 1;
  info.can_fua = nbd_can_fua(handle_) == 1;
  info.can_trim = nbd_can_trim(handle_) == 1;
  info.can_zero = nbd_can_zero(handle_) == 1;
  info.has_allocation = nbd_can_meta_context(handle_, LIBNBD_CONTEXT_BASE_ALLOCATION) == 1;
  offer_.multi_conn = nbd_can_multi_conn(handle_) == 1;
  offer_.can_fast_zero = nbd_can_fast_zero(handle_) == 1;
  const auto accepted = [this](std::string_view name, const std::string& value) {
    return !options_.migration_id.empty() &&
           nbd_can_meta_context(handle_, private_context(name, value).c_str()) == 1;
  };
  info.incoming = accepted("migration", options_.migration_id);
  info.fenced = info.incoming && accepted("session", options_.session);
  info.proven = info.incoming && accepted("holds", options_.migration_id);
  info.can_checksum = nbd_can_meta_context(handle_, sum_low_context) == 1 &&
                      nbd_can_meta_context(handle_, sum_high_context) == 1;
  offer_.knows_session = accepted("knows", options_.session);
}

// libnbd begins most errors of the handshake with that word, yet not those of the socket.
std::string Connection::handshake_failed(std::string_view why) const {
  const auto& tls = options_.endpoint.tls;
  auto explained = explain_tls_failure(why, tls ? &*tls : nullptr);
  if (!explained.empty()) return explained;
  constexpr std::string_view prefix = "handshake: ";
  if (why.starts_with(prefix)) why.remove_prefix(prefix.size());
  return fmt::format("the NBD handshake failed: {}: {}", why, check_server);
}

std::string Connection::why_dead() const {
  const bool closed = nbd_aio_is_closed(handle_) == 1;
  const auto why = closed                     ? "the server closed the connection"
                   : !died_elsewhere_.empty() ? died_elsewhere_
                                              : last_libnbd_error();
  return stage_ == Stage::handshaking ? handshake_failed(why) : why;
}

bool Connection::doubts_certificate() const {
  return stage_ == Stage::handshaking && options_.endpoint.tls &&
         is_certificate_refused(last_libnbd_error());
}

// The handshake's time limit holds for this, too.
void Connection::ask_for_certificate() {
  let_go();
  certificate_check_ = std::make_shared<CertificateCheck>(
      executor_, options_.endpoint, [weak = weak_from_this()](CertificateFault fault) {
        if (auto self = weak.lock()) {
          self->fail(explain_certificate(fault, *self->options_.endpoint.tls));
        }
      });
  certificate_check_->start();
}

// --- waiting
// --------------------------------------------------------------------------------------

// To be called after every call into libnbd. Never tells the owner: progress() does.
void Connection::wait_as_directed() {
  const unsigned direction = nbd_aio_get_direction(handle_);
  if (direction == 0) {
    dead_ = true;
    return;
  }
  if ((direction & LIBNBD_AIO_DIRECTION_READ) != 0 && !reading_) {
    reading_ = true;
    watched_.async_wait(boost::asio::posix::descriptor_base::wait_read,
                        [self = shared_from_this()](const boost::system::error_code& error) {
                          self->reading_ = false;
                          if (!error && self->handle_ != nullptr) self->on_readable();
                        });
  }
  if ((direction & LIBNBD_AIO_DIRECTION_WRITE) != 0 && !writing_) {
    writing_ = true;
    watched_.async_wait(boost::asio::posix::descriptor_base::wait_write,
                        [self = shared_from_this()](const boost::system::error_code& error) {
                          self->writing_ = false;
                          if (!error && self->handle_ != nullptr) self->on_writable();
                        });
  }
}

bool Connection::is_now(short events) {
  pollfd p{watched_.native_handle(), events, 0};
  return ::poll(&p, 1, 0) == 1;
}

void Connection::on_readable() {
  if (elsewhere_.is_busy()) return;  // it is asked again
  moved_ = true;
  read_some();
  wait_as_directed();
  progress();
}

void Connection::on_writable() {
  if (dead_ || elsewhere_.is_busy()) return;  // progress() is posted
  moved_ = true;
  if (stage_ == Stage::ready && options_.endpoint.tls && Elsewhere::exists()) {
    write_elsewhere();
    return;
  }
  write_some();
  wait_as_directed();
  progress();
}

void Connection::read_some() {
  for (int replies = 0; replies < replies_per_turn_max; ++replies) {
    if (elsewhere_.is_recalled()) break;
    if ((nbd_aio_get_direction(handle_) & LIBNBD_AIO_DIRECTION_READ) == 0) break;
    // A speculative call would park the handle where new commands queue unsent. With TLS nothing waits
    // elsewhere: libnbd goes on for as long as GnuTLS holds decrypted bytes.
    if (!is_now(POLLIN)) break;
    if (nbd_aio_notify_read(handle_) == -1) break;
  }
}

void Connection::write_some() {
  // With TLS libnbd sends a record of 16 KiB a call.
  for (int records = 0; records < records_per_turn_max; ++records) {
    if ((nbd_aio_get_direction(handle_) & LIBNBD_AIO_DIRECTION_WRITE) == 0) break;
    if (records != 0 && (elsewhere_.is_recalled() || !is_now(POLLOUT))) break;
    if (nbd_aio_notify_write(handle_) == -1) break;
  }
}

// Encryption is most of the work of a copy: others get the processors that the loop would leave idle, and the
// guest the loop.
void Connection::write_elsewhere() {
  elsewhere_.start(
      [this] {
        write_some();
        read_some();
        if (nbd_aio_get_direction(handle_) == 0) died_elsewhere_ = last_libnbd_error();
      },
      [this] { on_back(); });
}

void Connection::on_back() {
  wait_as_directed();
  for (Flight* flight : std::exchange(to_send_, {})) send(*flight);
  progress();
}

// Tells the owner what has happened. Runs on the executor, outside of every other call.
void Connection::progress() {
  if (handle_ == nullptr || elsewhere_.is_busy()) return;
  const auto self = shared_from_this();  // the owner may drop us
  collect();
  if (dead_) {
    if (doubts_certificate()) {
      ask_for_certificate();
    } else {
      fail(why_dead());
    }
    return;
  }
  if (stage_ == Stage::handshaking && nbd_aio_is_ready(handle_) == 1) {
    const auto& tls = options_.endpoint.tls;
    if (tls && tls_files_version(*tls) != tls_files_) {
      fail("the TLS files changed during the handshake: start again when they are complete");
      return;
    }
    stage_ = Stage::ready;
    timer_.cancel();
    learn_offer();
    moved_at_ = Clock::now();
    watch_answers();
    owner_->on_ready(*this);
  } else if (!answers_.empty()) {
    owner_->on_answers(*this);
  }
}

// --- sending
// --------------------------------------------------------------------------------------

void Connection::post(mirror::DiskOp&& op, std::uint64_t sequence, Clock::time_point now) {
  NBDFERRY_ASSERT(stage_ == Stage::ready, "operations go to ready connections only");
  if (ops_ == 0) moved_ = true;  // it could not answer earlier
  Flight& flight = take_flight(std::move(op), sequence, now);
  if (elsewhere_.is_busy()) {
    to_send_.push_back(&flight);
    return;
  }
  send(flight);
  if ((dead_ || !completed_.empty()) && !progress_posted_) {
    progress_posted_ = true;
    boost::asio::post(executor_, [self = shared_from_this()] {
      self->progress_posted_ = false;
      self->progress();
    });
  }
}

// TLS makes records of its own, and a unix socket no packets.
void Connection::cork() {
  if (!corked_ && is_ready() && !options_.endpoint.tls && !options_.endpoint.is_unix()) {
    corked_ = set_corked(watched_.native_handle(), true);
  }
}

void Connection::uncork() {
  if (std::exchange(corked_, false) && watched_.is_open()) {
    set_corked(watched_.native_handle(), false);
  }
}

// By a handle that died a moment ago nothing is answered: the flight ends as lost with all the others.
void Connection::send(Flight& flight) {
  if (dead_) return;
  if (issue(flight) == -1) {
    flight.error = nbd_get_errno() == 0 ? EIO : nbd_get_errno();
    completed_.push_back(&flight);
  }
  wait_as_directed();
}

Connection::Flight& Connection::take_flight(mirror::DiskOp&& op, std::uint64_t sequence,
                                            Clock::time_point now) {
  if (idle_.empty()) {
    flights_.push_back(std::make_unique<Flight>());
    idle_.push_back(flights_.back().get());
  }
  Flight& flight = *idle_.back();
  idle_.pop_back();
  flight.start(*this, std::move(op), sequence, now);
  ++ops_;
  cost_ += flight.cost;
  return flight;
}

void Connection::collect() {
  if (completed_.empty()) return;
  const auto now = Clock::now();
  for (Flight* flight : completed_) {
    // An error that came with the handle's death is nobody's answer.
    const bool lost = dead_ && flight->error != 0;
    answer(*flight, lost ? IoError::lost : error_of_errno(flight->error), now);
  }
  completed_.clear();
}

void Connection::answer(Flight& flight, IoError error, Clock::time_point now) {
  answers_.push_back(flight.finish(error, now));
  --ops_;
  cost_ -= flight.cost;
  idle_.push_back(&flight);
}

void Connection::take_answers(std::vector<Answer>& out) {
  for (auto& a : answers_) out.push_back(std::move(a));
  answers_.clear();
}

// --- the end
// --------------------------------------------------------------------------------------

void Connection::fail(const std::string& reason) {
  if (stage_ == Stage::ended) return;
  const auto self = shared_from_this();
  shut();
  owner_->on_ended(*this, reason);
}

void Connection::close() {
  elsewhere_.recall();
  if (stage_ == Stage::ready && !dead_ && ops_ == 0) {
    // Everything we sent was answered: nothing can be applied later, so the server may have its
    // DISC.
    if (!options_.endpoint.is_unix()) let_linger(watched_.native_handle());
    (void)nbd_aio_disconnect(handle_, 0);
  }
  shut();
}

void Connection::shut() {
  stage_ = Stage::ended;
  timer_.cancel();
  if (dial_) dial_->cancel();
  dial_.reset();
  if (certificate_check_) certificate_check_->cancel();
  certificate_check_.reset();
  let_go();
  dead_ = true;
  collect();
  for (auto& flight : flights_) {
    if (flight->busy) answer(*flight, IoError::lost, Clock::now());
  }
}

// Of the socket, and of libnbd.
void Connection::let_go() {
  elsewhere_.recall();
  if (watched_.is_open()) {
    // Not watched_.close(): Asio leaves the epoll registration to the close of the last descriptor,
    // which may be libnbd's.
    ::close(watched_.release());
  }
  if (handle_ != nullptr) nbd_close(std::exchange(handle_, nullptr));
}

}  // namespace nbdferry::transport
