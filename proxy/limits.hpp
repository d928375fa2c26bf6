// Every bound on what a client of ours can make us hold or wait for, in one place.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

namespace nbdferry::proxy::limits {

// --- connections
// ----------------------------------------------------------------------------------

// Open at once on one server, handshakes included (CVE-2024-7409); one more is closed at once.
inline constexpr std::size_t connections_max = 64;
// From accept to the transmission phase.
inline constexpr std::chrono::seconds handshake_timeout{10};
// At a graceful stop: for outstanding requests and for a client that does not read its replies.
inline constexpr std::chrono::seconds drain_timeout{10};

// --- handshake
// ------------------------------------------------------------------------------------

// Longest option that is kept to be understood; of longer ones the data is skipped. It fits the
// longest name and a dozen of the longest queries.
inline constexpr std::uint32_t option_data_bytes_max = 64 * 1024;
// NBD protocol, "Conventions": no string is longer.
inline constexpr std::uint32_t string_bytes_max = 4096;
// In one handshake: clients send a dozen; this many keep us busy for a moment, not for its time.
inline constexpr std::uint32_t options_max = 256;

// --- transmission, per client
// ---------------------------------------------------------------------

// Requests from their header's arrival until their reply has left. Beyond: the socket is not read.
inline constexpr std::size_t requests_in_flight_max = 256;
// Bytes of reads and writes, counted in the same way, of all clients of a server: each may have an
// equal part of it, or one request alone (of 32 MiB at most, ExportInfo::payload_max: what clients
// that are all out for memory can get is connections_max of these). What it got while they were
// fewer, it keeps until it has taken its replies.
inline constexpr std::uint64_t bytes_in_flight_max = 16ULL * 1024 * 1024;
// One large receive: about thirty 4 KiB writes.
inline constexpr std::size_t input_bytes = 128UL * 1024;
// Writes up to this size are copied once out of the input; larger ones are received in place.
inline constexpr std::uint32_t copied_write_bytes_max = 16 * 1024;
// What is read ahead behind a payload that is received in place: it has to be copied.
inline constexpr std::size_t read_ahead_bytes = 4096;
// Receives before a busy client lets the others on the loop have their turn.
inline constexpr int receives_per_turn_max = 8;
// Replies leave in batches of about this size: one large batch puts client and server in lockstep,
// single replies cost a system call each (shared/FAST-PATH.md).
inline constexpr std::size_t reply_batch_max = 8;
inline constexpr std::size_t reply_batch_bytes = 32UL * 1024;
// Descriptors in one reply to BLOCK_STATUS, and what a reply counts for among the bytes in flight.
inline constexpr std::size_t extents_max = 8192;
inline constexpr std::uint64_t status_reply_bytes = extents_max * 8;
// Of what one request can ask a checksum, which is read as a whole.
inline constexpr std::uint32_t checksum_bytes_max = 1024 * 1024;
// What a client that has hung up may have left unread and is still looked at (rule 8).
inline constexpr std::size_t last_words_bytes_max = 16UL * 1024 * 1024;
// They are all admitted at once, beyond the limits above: more than these are dropped instead.
inline constexpr std::size_t last_words_requests_max = 4096;
// Unix sockets: a 1 MiB reply leaves in one piece. TCP sizes its buffers by itself.
inline constexpr int unix_send_buffer_bytes = 4 * 1024 * 1024;

// --- a pivoted disk's journal, in memory
// ----------------------------------------------------------------

// Of writes that it can hold. At first: it is made while the guest's writes are held (0.1 ms; 4 MiB would
// take 1.3 ms). Soon after it has the buffer's size, and at most:
inline constexpr std::uint64_t journal_first_bytes = 512UL * 1024;
inline constexpr std::uint64_t journal_bytes_max = 256ULL * 1024 * 1024;

// --- the control socket
// ---------------------------------------------------------------------------

inline constexpr std::size_t control_connections_max = 32;
inline constexpr std::uint32_t control_header_bytes_max = 8 * 1024;
inline constexpr std::uint64_t control_body_bytes_max = 64 * 1024;
// A whole request must have come by then, or an answer gone; also how long a connection may idle.
inline constexpr std::chrono::seconds control_timeout{60};
// The same for a user who gets no more than a refusal.
inline constexpr std::chrono::seconds control_stranger_timeout{2};
// Of a body; the deepest that means something has two levels.
inline constexpr std::size_t json_depth_max = 8;
// The ownership record has to hold it, twice.
inline constexpr std::size_t uri_bytes_max = 1536;

}  // namespace nbdferry::proxy::limits
