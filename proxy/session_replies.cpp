// Session: one client's connection. Answers, encoded and sent; session.cpp has the input.
#include <algorithm>
#include <utility>

#include "mirror/assert.hpp"
#include "proxy/limits.hpp"
#include "proxy/nbd_errors.hpp"
#include "proxy/session.hpp"

namespace nbdferry::proxy {
namespace {

MessageHead simple_reply(const nbd::Request& request, std::uint32_t error) {
  MessageHead head;
  head.add(nbd::magic_simple_reply).add(error).add(request.cookie);
  return head;
}

// `body_bytes` is the length of the chunk's body, of which the caller adds the start.
MessageHead chunk(const nbd::Request& request, nbd::Chunk type, std::uint16_t flags,
                  std::size_t body_bytes) {
  MessageHead head;
  head.add(nbd::magic_structured_reply).add(flags).add(static_cast<std::uint16_t>(type));
  head.add(request.cookie).add(static_cast<std::uint32_t>(body_bytes));
  return head;
}

// The descriptors of a status chunk: within the request, no two alike in a row.
std::vector<std::byte> descriptors(const nbd::Request& request,
                                   const std::vector<Extent>& extents) {
  const std::size_t count_max = (request.flags & nbd::cmd_req_one) != 0 ? 1 : limits::extents_max;
  std::vector<std::pair<std::uint32_t, std::uint32_t>> runs;  // length, flags
  std::uint64_t left = request.length;
  for (const Extent& extent : extents) {
    // 32 bits suffice: a request's length has no more.
    const auto length = static_cast<std::uint32_t>(std::min(extent.length, left));
    if (length == 0) continue;
    const std::uint32_t flags =
        (extent.hole ? nbd::state_hole : 0) | (extent.zero ? nbd::state_zero : 0);
    if (!runs.empty() && runs.back().second == flags) {
      runs.back().first += length;
    } else if (runs.size() < count_max) {
      runs.emplace_back(length, flags);
    } else {
      break;
    }
    left -= length;
  }
  NBDFERRY_ASSERT(!runs.empty(), "a block status says something about the first byte");
  std::vector<std::byte> bytes;
  bytes.reserve(runs.size() * 8);
  for (const auto& [length, flags] : runs) {
    nbd::append(bytes, length);
    nbd::append(bytes, flags);
  }
  return bytes;
}

}  // namespace

void Session::reply(mirror::Reply&& reply) {
  const auto index = slot_of(reply.id);
  NBDFERRY_ASSERT(index < slots_.size() && slots_[index].open, "each request has one reply");
  const nbd::Request request = slots_[index].request;
  slots_[index].open = false;
  free_slots_.push_back(index);
  answer(request, std::move(reply), {1, nbd::bytes_held(request)});
  if (!in_turn_) schedule();
}

// Answers what the export doesn't get to see: an error, or success where there is nothing to do.
void Session::refuse(const nbd::Request& request, IoError error) {
  ++in_flight_.requests;
  mirror::Reply reply;
  reply.error = error;
  answer(request, std::move(reply), {1, 0});
}

void Session::answer(const nbd::Request& request, mirror::Reply&& reply, Credit credit) {
  using nbd::RequestType;
  const bool fast_zero =
      request.type == RequestType::write_zeroes && (request.flags & nbd::cmd_fast_zero) != 0;
  const std::uint32_t error = nbd::error_code(reply.error, fast_zero);
  // Once negotiated, structured replies are a must for reads, errors included; and for status.
  const bool structured = rights_.structured_replies && (request.type == RequestType::read ||
                                                         request.type == RequestType::block_status);
  if (error != 0 && structured) {
    constexpr std::size_t body_bytes =
        6;  // the error, and the length of a message that isn't there
    push(chunk(request, nbd::Chunk::error, nbd::reply_done, body_bytes)
             .add(error)
             .add(std::uint16_t{0}),
         {}, credit);
  } else if (error != 0) {
    push(simple_reply(request, error), {}, credit);
  } else if (request.type == RequestType::read) {
    answer_read(request, std::move(reply.data), credit);
  } else if (request.type == RequestType::block_status) {
    answer_block_status(request, reply, credit);
  } else {
    push(simple_reply(request, 0), {}, credit);
  }
}

void Session::answer_read(const nbd::Request& request, Payload data, Credit credit) {
  NBDFERRY_ASSERT(data.size() == request.length, "a read returns what was asked for");
  if (!rights_.structured_replies) {
    push(simple_reply(request, 0), std::move(data), credit);
  } else if (data.empty()) {
    // A data chunk holds at least a byte.
    push(chunk(request, nbd::Chunk::none, nbd::reply_done, 0), {}, credit);
  } else {
    // One chunk: DF is honoured always.
    const auto body_bytes = sizeof request.offset + data.size();
    push(chunk(request, nbd::Chunk::offset_data, nbd::reply_done, body_bytes).add(request.offset),
         std::move(data), credit);
  }
}

// One chunk for each selected context. Most of the private ones have nothing to tell: all blocks are
// alike. Those of a checksum tell half of it each; then nothing is known of the allocation.
void Session::answer_block_status(const nbd::Request& request, const mirror::Reply& reply,
                                  Credit credit) {
  const std::uint32_t summed = checksums_ ? nbd::checksum_bytes(request) : 0;
  const std::uint32_t length = summed != 0 ? summed : request.length;
  const auto push_context = [&](std::uint32_t id, std::span<const std::byte> bytes, bool last) {
    push(chunk(request, nbd::Chunk::block_status, last ? nbd::reply_done : std::uint16_t{0},
               sizeof id + bytes.size())
             .add(id),
         Payload::copy_of(bytes), last ? credit : Credit{});
  };
  const auto one = [&](std::uint32_t flags) {
    std::vector<std::byte> bytes;
    nbd::append(bytes, length);
    nbd::append(bytes, flags);
    return bytes;
  };
  std::size_t left = private_contexts_.size();
  if (allocation_) {
    push_context(allocation_context_id, summed != 0 ? one(0) : descriptors(request, reply.extents),
                 left == 0);
  }
  for (const std::uint32_t id : private_contexts_) {
    std::uint32_t flags = 0;
    if (id == sum_low_context_id) flags = static_cast<std::uint32_t>(reply.checksum);
    if (id == sum_high_context_id) flags = static_cast<std::uint32_t>(reply.checksum >> 32);
    push_context(id, one(flags), --left == 0);
  }
}

void Session::push(const MessageHead& head, Payload payload, Credit credit) {
  if (broken_ || fenced_) return take_back(credit);
  replies_.push(head, std::move(payload), credit);
  const bool batch = replies_.messages() >= limits::reply_batch_max ||
                     replies_.bytes() >= limits::reply_batch_bytes;
  if (batch) send();
}

void Session::send() {
  if (replies_.empty() || waiting_writable_) return;
  Credit credit;
  if (fenced_) {
    replies_.drop(credit);
    return take_back(credit);
  }
  switch (replies_.send(socket_.native_handle(), credit)) {
    case ReplyQueue::Result::sent:
      break;
    case ReplyQueue::Result::blocked:
      wait_writable();
      break;
    case ReplyQueue::Result::broken:
      broken_ = true;
      replies_.drop(credit);
      break;
  }
  take_back(credit);
}

void Session::take_back(const Credit& credit) {
  in_flight_.requests -= credit.requests;
  in_flight_.bytes -= credit.bytes;
}

}  // namespace nbdferry::proxy
