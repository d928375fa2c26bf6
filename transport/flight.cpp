// How each command of ours becomes one of NBD's, and the answer one of ours.
#include "transport/flight.hpp"

#include <algorithm>
#include <new>

#include <sys/mman.h>

#include <fmt/format.h>
#include <libnbd.h>

#include "mirror/assert.hpp"

namespace nbdferry::transport {

namespace {

constexpr std::uint64_t cost_per_op = 4096;                  // a request without data isn't free
constexpr std::uint64_t small_request_bytes = 16ULL * 1024;  // the latency of these is the path's
constexpr std::uint64_t request_max = 0xFFFF'FFFF;
constexpr std::uint64_t zeroes_max = 32ULL * 1024 * 1024;

// base:allocation's flags (NBD protocol, "base:allocation metadata context").
constexpr std::uint32_t state_hole = 1;
constexpr std::uint32_t state_zero = 2;

// A readable area of zeroes that costs address space only: all of it is the kernel's zero page.
const void* zeroes() {
  static const void* const area = [] {
    void* p = ::mmap(nullptr, zeroes_max, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return p;
  }();
  return area;
}

}  // namespace

std::string private_context(std::string_view name, const std::string& value) {
  return fmt::format("x-nbdferry:{}={}", name, value);
}

void Connection::Flight::start(Connection& owner, mirror::DiskOp&& operation, std::uint64_t number,
                               Clock::time_point now) {
  connection = &owner;
  op = std::move(operation);
  sequence = number;
  const bool sends = op.command == Command::write || op.as_data;
  sent_bytes = sends ? op.range.length() : 0;
  cost = cost_per_op + sent_bytes + (op.command == Command::read ? op.range.length() : 0);
  started = now;
  error = 0;
  busy = true;
}

Answer Connection::Flight::finish(IoError result, Clock::time_point now) {
  Answer a;
  a.done.id = op.id;
  a.done.error = result;
  a.sequence = sequence;
  a.cost = cost;
  if (result == IoError::none) {
    a.done.data = std::move(buffer).freeze();
    a.done.extents = std::move(extents);
    a.done.checksum = std::uint64_t{sum_high.value_or(0)} << 32 | sum_low.value_or(0);
    // Of another range than was asked for, or not told at all.
    if (op.command == Command::checksum && !(sum_low && sum_high)) {
      a.done.error = IoError::not_supported;
    }
    a.sent_bytes = sent_bytes;
    a.wrote = is_write(op.command);
    const bool data = op.command == Command::read || op.command == Command::write;
    if (data && op.range.length() <= small_request_bytes) a.latency = now - started;
  }
  buffer = {};
  extents = {};
  sum_low.reset();
  sum_high.reset();
  op.payload = {};
  busy = false;
  return a;
}

// --- sending
// --------------------------------------------------------------------------------------

namespace {

// The server's extents, clamped to the range; equal neighbours become one.
void add_extents(const ByteRange& range, const std::uint32_t* entries, std::size_t count,
                 std::vector<Extent>& out) {
  std::uint64_t room = range.length();
  for (std::size_t i = 0; i + 1 < count && room > 0; i += 2) {
    const std::uint64_t length = std::min<std::uint64_t>(entries[i], room);
    const bool hole = (entries[i + 1] & state_hole) != 0;
    const bool zero = (entries[i + 1] & state_zero) != 0;
    room -= length;
    if (!out.empty() && out.back().hole == hole && out.back().zero == zero) {
      out.back().length += length;
    } else if (length > 0) {
      out.push_back({length, hole, zero});
    }
  }
}

}  // namespace

void Connection::Flight::note_status(std::string_view context, const std::uint32_t* entries,
                                     std::size_t count) {
  if (op.command == Command::block_status) {
    if (context == LIBNBD_CONTEXT_BASE_ALLOCATION) add_extents(op.range, entries, count, extents);
    return;
  }
  if (count != 2 || entries[0] != op.range.length()) return;
  if (context == sum_low_context) sum_low = entries[1];
  if (context == sum_high_context) sum_high = entries[1];
}

// Returns libnbd's cookie, or -1: not sent, and the callback will not be called.
std::int64_t Connection::issue(Flight& flight) {
  const auto completion =
      nbd_completion_callback{[](void* user, int* error) {
                                auto* f = static_cast<Flight*>(user);
                                f->error = *error;
                                f->connection->completed_.push_back(f);
                                return 1;  // retire the command: we keep the books
                              },
                              &flight, nullptr};
  const auto& op = flight.op;
  const std::uint64_t length = op.range.length();
  NBDFERRY_ASSERT(length <= request_max, "a request's length has 32 bits");
  const std::uint32_t fua = op.fua && offer_.info.can_fua ? LIBNBD_CMD_FLAG_FUA : 0;
  switch (op.command) {
    case Command::read:
      flight.buffer = Buffer(length);
      return nbd_aio_pread(handle_, flight.buffer.data(), length, op.range.begin, completion, 0);
    case Command::write:
      NBDFERRY_ASSERT(op.payload.size() == length, "a write's payload is as long as its range");
      return nbd_aio_pwrite(handle_, op.payload.data(), length, op.range.begin, completion, fua);
    case Command::zero: {
      if (op.as_data) {
        NBDFERRY_ASSERT(length <= offer_.info.payload_max, "zeroes sent as data fit one request");
        return nbd_aio_pwrite(handle_, zeroes(), length, op.range.begin, completion, fua);
      }
      const std::uint32_t no_hole = op.may_hole ? 0 : LIBNBD_CMD_FLAG_NO_HOLE;
      const std::uint32_t fast = op.fast_only ? LIBNBD_CMD_FLAG_FAST_ZERO : 0;
      return nbd_aio_zero(handle_, length, op.range.begin, completion, fua | no_hole | fast);
    }
    case Command::trim:
      return nbd_aio_trim(handle_, length, op.range.begin, completion, fua);
    case Command::flush:
      return nbd_aio_flush(handle_, completion, 0);
    case Command::block_status:
    case Command::checksum: {
      const auto extent =
          nbd_extent_callback{[](void* user, const char* context, std::uint64_t,
                                 std::uint32_t* entries, std::size_t count, int*) {
                                static_cast<Flight*>(user)->note_status(context, entries, count);
                                return 0;
                              },
                              &flight, nullptr};
      const std::uint32_t one = op.command == Command::checksum ? LIBNBD_CMD_FLAG_REQ_ONE : 0;
      return nbd_aio_block_status(handle_, length, op.range.begin, extent, completion, one);
    }
    case Command::cache:
      break;
  }
  NBDFERRY_ASSERT(false, "cache is answered without the server");
  return -1;
}

}  // namespace nbdferry::transport
