// Requests judged without a socket.
#include "proxy/nbd_request.hpp"

#include <algorithm>

#include "proxy/limits.hpp"

namespace nbdferry::proxy::nbd {
namespace {

// FUA is valid on every command, as we advertise it.
std::uint16_t flags_of(RequestType type, const Rights& rights) {
  switch (type) {
    case RequestType::read:
      return static_cast<std::uint16_t>(cmd_fua | (rights.structured_replies ? cmd_df : 0));
    case RequestType::write_zeroes:
      return cmd_fua | cmd_no_hole | cmd_fast_zero;
    case RequestType::block_status:
      return cmd_fua | cmd_req_one;
    default:
      return cmd_fua;
  }
}

bool is_known(RequestType type) { return type <= RequestType::block_status; }

bool moves_data(RequestType type) {
  return type == RequestType::read || type == RequestType::write;
}

}  // namespace

bool is_write(RequestType type) {
  return type == RequestType::write || type == RequestType::trim ||
         type == RequestType::write_zeroes;
}

std::uint32_t checksum_bytes(const Request& request) {
  const bool one = request.type == RequestType::block_status && (request.flags & cmd_req_one) != 0;
  return one ? std::min(request.length, limits::checksum_bytes_max) : 0;
}

std::uint64_t bytes_held(const Request& request) {
  if (request.type == RequestType::block_status) {
    return std::max<std::uint64_t>(limits::status_reply_bytes, checksum_bytes(request));
  }
  return moves_data(request.type) ? request.length : 0;
}

IoError check(const Request& request, const ExportInfo& info, const Rights& rights) {
  const RequestType type = request.type;
  if (!is_known(type) || (request.flags & ~flags_of(type, rights)) != 0) return IoError::invalid;
  if (type == RequestType::block_status && !rights.block_status) return IoError::invalid;
  if (is_write(type) && (info.read_only || !rights.may_write)) return IoError::not_permitted;
  if (type == RequestType::flush) {
    return request.offset == 0 && request.length == 0 ? IoError::none : IoError::invalid;
  }
  // The sum could wrap, the difference can't.
  if (request.offset > info.size || request.length > info.size - request.offset) {
    const bool grows = type == RequestType::write || type == RequestType::write_zeroes;
    return grows ? IoError::no_space : IoError::invalid;
  }
  // block_min is a power of two.
  if (((request.offset | request.length) & (info.block_min - 1)) != 0) return IoError::invalid;
  if (moves_data(type) && request.length > info.payload_max) return IoError::invalid;
  // A status reply has at least one extent, and an extent at least one byte.
  if (type == RequestType::block_status && request.length == 0) return IoError::invalid;
  return IoError::none;
}

bool ends_in_disc(std::span<const std::byte> input, std::size_t skip) {
  for (std::size_t requests = 0; skip <= input.size(); ++requests) {
    input = input.subspan(skip);
    if (input.size() < request_header_bytes || !has_request_magic(input.data())) return false;
    const Request request = load_request(input.data());
    if (request.type == RequestType::disc) return true;
    if (requests == limits::last_words_requests_max) return false;
    skip = request_header_bytes + request.payload_bytes();
  }
  return false;
}

}  // namespace nbdferry::proxy::nbd
