#include "proxy/ring.hpp"

#include <array>
#include <cerrno>
#include <limits>
#include <stdexcept>
#include <system_error>

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/post.hpp>

#include "mirror/assert.hpp"

namespace nbdferry::proxy {

namespace {

constexpr unsigned drain_batch = 64;
constexpr unsigned threads_without_ring = 8;

// io_uring's advice and sync_file_range carry 32-bit lengths; 0 means "to the end of the file",
// which is what a longer range becomes: both are harmless when they cover more.
unsigned length_or_all(std::uint64_t length) {
  return length > std::numeric_limits<unsigned>::max() ? 0 : static_cast<unsigned>(length);
}

constexpr unsigned sync_range_flags =
    SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;

void fill(io_uring_sqe* sqe, const RingRequest& r) {
  const auto length = static_cast<unsigned>(r.length);
  switch (r.kind) {
    case RingRequest::Kind::read:
      io_uring_prep_read(sqe, r.fd, r.memory, length, r.offset);
      sqe->rw_flags = r.flags;
      break;
    case RingRequest::Kind::write:
      io_uring_prep_write(sqe, r.fd, r.data, length, r.offset);
      sqe->rw_flags = r.flags;
      break;
    case RingRequest::Kind::sync:
      io_uring_prep_fsync(sqe, r.fd, IORING_FSYNC_DATASYNC);
      break;
    case RingRequest::Kind::sync_range:
      io_uring_prep_sync_file_range(sqe, r.fd, length_or_all(r.length), r.offset, sync_range_flags);
      break;
    case RingRequest::Kind::fallocate:
      io_uring_prep_fallocate(sqe, r.fd, r.flags, static_cast<off_t>(r.offset),
                              static_cast<off_t>(r.length));
      break;
    case RingRequest::Kind::will_need:
      io_uring_prep_fadvise(sqe, r.fd, r.offset, length_or_all(r.length), POSIX_FADV_WILLNEED);
      break;
  }
}

// The same request as a blocking call, for hosts without io_uring.
int perform(const RingRequest& r) {
  const auto offset = static_cast<off_t>(r.offset);
  const auto length = static_cast<off_t>(r.length);
  ssize_t n = -1;
  switch (r.kind) {
    case RingRequest::Kind::read: {
      const iovec v{r.memory, r.length};
      n = ::preadv2(r.fd, &v, 1, offset, r.flags);
      break;
    }
    case RingRequest::Kind::write: {
      const iovec v{const_cast<std::byte*>(r.data), r.length};
      n = ::pwritev2(r.fd, &v, 1, offset, r.flags);
      break;
    }
    case RingRequest::Kind::sync:
      n = ::fdatasync(r.fd);
      break;
    case RingRequest::Kind::sync_range:
      n = ::sync_file_range(r.fd, offset, length, sync_range_flags);
      break;
    case RingRequest::Kind::fallocate:
      n = ::fallocate(r.fd, r.flags, offset, length);
      break;
    case RingRequest::Kind::will_need:
      return -::posix_fadvise(r.fd, offset, length, POSIX_FADV_WILLNEED);
  }
  return n < 0 ? -errno : static_cast<int>(n);
}

}  // namespace

Ring::Ring(boost::asio::io_context& io, unsigned depth, Handler on_done, bool allow_io_uring)
    : io_(io),
      on_done_(std::move(on_done)),
      depth_(depth),
      event_(io),
      alive_(std::make_shared<bool>(true)) {
  has_ring_ = allow_io_uring && io_uring_queue_init(depth, &ring_, IORING_SETUP_CLAMP) == 0;
  threads_ = std::make_unique<boost::asio::thread_pool>(has_ring_ ? 1 : threads_without_ring);
  if (!has_ring_) return;
  const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  const int refused = fd < 0 ? -errno : io_uring_register_eventfd(&ring_, fd);
  if (refused < 0) {
    if (fd >= 0) ::close(fd);
    io_uring_queue_exit(&ring_);
    throw std::system_error(-refused, std::system_category(),
                            "event descriptor of the disk's ring");
  }
  event_.assign(fd);
}

Ring::~Ring() {
  alive_.reset();
  threads_->stop();
  threads_->join();
  if (!has_ring_) return;
  // Buffers are in the kernel's hands until it has answered.
  in_ring_ -= io_uring_sq_ready(&ring_);
  while (in_ring_ > 0) {
    io_uring_cqe* cqe = nullptr;
    if (io_uring_wait_cqe(&ring_, &cqe) == 0) {
      io_uring_cqe_seen(&ring_, cqe);
      --in_ring_;
    }
  }
  io_uring_queue_exit(&ring_);
}

void Ring::start(const RingRequest& request, std::uint64_t token) {
  if (!has_ring_) {
    run([request] { return perform(request); }, token);
    return;
  }
  queue_.push_back({request, token});
  schedule_flush();
}

void Ring::run(std::function<int()> job, std::uint64_t token) {
  boost::asio::post(*threads_,
                    [this, job = std::move(job), token, alive = std::weak_ptr<bool>(alive_),
                     guard = boost::asio::make_work_guard(io_)]() mutable {
                      const int result = job();
                      // Only the loop's thread may look whether we still exist.
                      boost::asio::post(io_, [this, token, result, alive = std::move(alive)] {
                        if (!alive.expired()) on_done_(token, result);
                      });
                      guard.reset();
                    });
}

void Ring::schedule_flush() {
  if (flush_scheduled_) return;
  flush_scheduled_ = true;
  boost::asio::post(io_, [this, alive = std::weak_ptr<bool>(alive_)] {
    if (alive.expired()) return;
    flush_scheduled_ = false;
    flush();
  });
}

void Ring::flush() {
  while (!queue_.empty() && in_ring_ < depth_) {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    if (sqe == nullptr) break;  // full: the rest goes after the next submit
    fill(sqe, queue_.front().request);
    io_uring_sqe_set_data64(sqe, queue_.front().token);
    queue_.pop_front();
    ++in_ring_;
  }
  if (io_uring_sq_ready(&ring_) > 0) {
    const int n = io_uring_submit(&ring_);
    // Out of memory or a completion backlog: what wasn't taken stays in the queue for another turn.
    NBDFERRY_ASSERT(n >= 0 || n == -EAGAIN || n == -EBUSY || n == -EINTR, "io_uring submission");
    if (io_uring_sq_ready(&ring_) > 0) schedule_flush();
  }
  wait();
}

void Ring::wait() {
  if (waiting_ || in_ring_ == 0) return;
  waiting_ = true;
  event_.async_wait(boost::asio::posix::stream_descriptor::wait_read,
                    [this, alive = std::weak_ptr<bool>(alive_)](boost::system::error_code) {
                      if (alive.expired()) return;
                      waiting_ = false;
                      // Read before draining: a completion after the drain then signals anew.
                      eventfd_t count = 0;
                      (void)::eventfd_read(event_.native_handle(), &count);
                      drain();
                      if (!queue_.empty()) schedule_flush();
                      wait();
                    });
}

void Ring::drain() {
  struct Answer {
    std::uint64_t token;
    int result;
  };
  std::array<io_uring_cqe*, drain_batch> cqes{};
  std::array<Answer, drain_batch> answers{};
  while (const unsigned n = io_uring_peek_batch_cqe(&ring_, cqes.data(), drain_batch)) {
    for (unsigned i = 0; i < n; ++i) answers[i] = {io_uring_cqe_get_data64(cqes[i]), cqes[i]->res};
    io_uring_cq_advance(&ring_, n);
    in_ring_ -= n;
    for (unsigned i = 0; i < n; ++i) on_done_(answers[i].token, answers[i].result);
  }
}

}  // namespace nbdferry::proxy
