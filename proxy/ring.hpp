// Ring: everything about the local disk that may block, kept off the loop. An io_uring whose
// completions arrive through an eventfd in Asio, and one helper thread for calls that io_uring
// lacks.
//
// What must hold:
//  - Each request is answered exactly once, from the loop, never from inside start() or run().
//  - At most `depth` requests are in the kernel; later ones wait in order. All that a turn of the
//    loop starts goes out in one system call.
//  - Memory handed over stays the caller's and must live until the answer; the destructor waits for
//    what is in the kernel, drops what isn't, and answers neither.
//  - The ring keeps io_context::run() going while anything is open, and not otherwise.
//
// Where io_uring is forbidden (Docker's default seccomp profile, kernel.io_uring_disabled), the
// same requests run on a few threads instead: slower, never wrong.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/thread_pool.hpp>
#include <liburing.h>

namespace nbdferry::proxy {

struct RingRequest {
  enum class Kind : std::uint8_t {
    read,        // flags: RWF_*
    write,       // flags: RWF_*
    sync,        // fdatasync of the whole file
    sync_range,  // write back and wait for the range's dirty pages; no barrier of any sort
    fallocate,   // flags: FALLOC_FL_*
    will_need,   // readahead
  };
  Kind kind = Kind::read;
  int fd = -1;
  int flags = 0;
  std::uint64_t offset = 0;
  std::uint64_t length = 0;         // read and write: at most 1 GiB
  std::byte* memory = nullptr;      // read: filled
  const std::byte* data = nullptr;  // write
};

class Ring {
 public:
  // `result` is what the system call returns, or -errno.
  using Handler = std::function<void(std::uint64_t token, int result)>;

  Ring(boost::asio::io_context& io, unsigned depth, Handler on_done, bool allow_io_uring = true);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  void start(const RingRequest& request, std::uint64_t token);

  // A call that io_uring doesn't know, on the helper thread. It must not touch payloads or buffers,
  // whose counts belong to the loop's thread.
  void run(std::function<int()> job, std::uint64_t token);

 private:
  struct Queued {
    RingRequest request;
    std::uint64_t token;
  };

  void schedule_flush();
  void flush();
  void wait();
  void drain();

  boost::asio::io_context& io_;
  Handler on_done_;
  unsigned depth_;
  bool has_ring_ = false;
  io_uring ring_{};
  unsigned in_ring_ = 0;  // SQEs filled and not answered
  std::deque<Queued> queue_;
  bool flush_scheduled_ = false;
  bool waiting_ = false;
  boost::asio::posix::stream_descriptor event_;
  std::shared_ptr<bool> alive_;  // handlers that outlive us find it gone
  std::unique_ptr<boost::asio::thread_pool> threads_;
};

}  // namespace nbdferry::proxy
