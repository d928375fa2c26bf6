// Requests judged without a socket: may this one run, and what is in bytes that nobody has read
// yet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "mirror/types.hpp"
#include "proxy/front.hpp"
#include "proxy/nbd_protocol.hpp"

namespace nbdferry::proxy::nbd {

// What a connection may do, beside what its export allows.
struct Rights {
  bool structured_replies = false;
  bool block_status = false;  // a meta context is selected
  bool may_write = true;      // rule 11
};

[[nodiscard]] bool is_write(RequestType type);

// What a BLOCK_STATUS with REQ_ONE wants a checksum of, where one was negotiated: a prefix of its range.
[[nodiscard]] std::uint32_t checksum_bytes(const Request& request);

// What a request makes us hold in memory, beside its administration.
[[nodiscard]] std::uint64_t bytes_held(const Request& request);

// The error that the protocol wants for this request, or none when it may go to the export (NBD
// protocol, "Error values" and "Request types"). DISC is not judged.
[[nodiscard]] IoError check(const Request& request, const ExportInfo& info, const Rights& rights);

// Does `input`, of which the first `skip` bytes belong to a payload, consist of whole requests up
// to a DISC? Then the client had said all that it wanted to. Not with more requests than
// limits::last_words_requests_max: they all have to be admitted at once.
[[nodiscard]] bool ends_in_disc(std::span<const std::byte> input, std::size_t skip);

}  // namespace nbdferry::proxy::nbd
