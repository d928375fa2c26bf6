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

// --- transmission, per client
// ---------------------------------------------------------------------

// Requests from their header's arrival until their reply has left. Beyond: the socket is not read.
inline constexpr std::size_t requests_in_flight_max = 256;
// Bytes of reads and writes, counted in the same way, of all clients of a server: each may have an
// equal part of it, or one request alone. What it got while they were fewer, it keeps until it has
// taken its replies.
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
// Descriptors in one reply to BLOCK_STATUS.
inline constexpr std::size_t extents_max = 8192;
// What a client that has hung up may have left unread and is still looked at (rule 8).
inline constexpr std::size_t last_words_bytes_max = 16UL * 1024 * 1024;
// Unix sockets: a 1 MiB reply leaves in one piece. TCP sizes its buffers by itself.
inline constexpr int unix_send_buffer_bytes = 4 * 1024 * 1024;

}  // namespace nbdferry::proxy::limits
