// The NBD protocol's numbers and layouts, as its specification has them (NetworkBlockDevice/nbd,
// doc/proto.md; section names in comments). Everything on the wire is big-endian.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace nbdferry::proxy::nbd {

// --- integers on the wire
// -------------------------------------------------------------------------

template <std::unsigned_integral T>
[[nodiscard]] T big_endian(T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (std::endian::native == std::endian::big) return value;
  if constexpr (sizeof(T) == 2) return __builtin_bswap16(value);
  if constexpr (sizeof(T) == 4) return __builtin_bswap32(value);
  if constexpr (sizeof(T) == 8) return __builtin_bswap64(value);
}

template <std::unsigned_integral T>
[[nodiscard]] T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return big_endian(value);
}

// Returns where the next field goes.
template <std::unsigned_integral T>
std::byte* store(std::byte* at, T value) {
  value = big_endian(value);
  std::memcpy(at, &value, sizeof value);
  return at + sizeof value;
}

template <std::unsigned_integral T>
void append(std::vector<std::byte>& to, T value) {
  to.resize(to.size() + sizeof(T));
  store(to.data() + to.size() - sizeof(T), value);
}

// --- handshake ("Newstyle negotiation")
// -----------------------------------------------------------

inline constexpr std::uint64_t magic_init = 0x4e42444d41474943;    // "NBDMAGIC"
inline constexpr std::uint64_t magic_option = 0x49484156454f5054;  // "IHAVEOPT"
inline constexpr std::uint64_t magic_option_reply = 0x0003e889045565a9;

// Handshake flags, and the client's answer to them, which uses the same bits.
inline constexpr std::uint16_t flag_fixed_newstyle = 1 << 0;
inline constexpr std::uint16_t flag_no_zeroes = 1 << 1;

inline constexpr std::size_t option_header_bytes = 16;  // magic, option, length
inline constexpr std::size_t export_name_padding_bytes = 124;

enum class Option : std::uint32_t {
  export_name = 1,
  abort = 2,
  list = 3,
  starttls = 5,
  info = 6,
  go = 7,
  structured_reply = 8,
  list_meta_context = 9,
  set_meta_context = 10,
};

enum class OptionReply : std::uint32_t {
  ack = 1,
  server = 2,
  info = 3,
  meta_context = 4,
  err_unsup = 0x80000001,
  err_invalid = 0x80000003,
  err_unknown = 0x80000006,
  err_too_big = 0x80000009,
};

enum class Info : std::uint16_t { export_ = 0, name = 1, description = 2, block_size = 3 };

// "Transmission flags".
inline constexpr std::uint16_t has_flags = 1 << 0;
inline constexpr std::uint16_t read_only = 1 << 1;
inline constexpr std::uint16_t send_flush = 1 << 2;
inline constexpr std::uint16_t send_fua = 1 << 3;
inline constexpr std::uint16_t rotational = 1 << 4;
inline constexpr std::uint16_t send_trim = 1 << 5;
inline constexpr std::uint16_t send_write_zeroes = 1 << 6;
inline constexpr std::uint16_t send_df = 1 << 7;
inline constexpr std::uint16_t can_multi_conn = 1 << 8;
inline constexpr std::uint16_t send_cache = 1 << 10;
inline constexpr std::uint16_t send_fast_zero = 1 << 11;

// --- transmission ("Transmission phase")
// ----------------------------------------------------------

inline constexpr std::uint32_t magic_request = 0x25609513;
inline constexpr std::uint32_t magic_simple_reply = 0x67446698;
inline constexpr std::uint32_t magic_structured_reply = 0x668e33ef;

inline constexpr std::size_t request_header_bytes =
    28;                                                // magic, flags, type, cookie, offset, length
inline constexpr std::size_t simple_reply_bytes = 16;  // magic, error, cookie
inline constexpr std::size_t chunk_header_bytes = 20;  // magic, flags, type, cookie, length

enum class RequestType : std::uint16_t {
  read = 0,
  write = 1,
  disc = 2,
  flush = 3,
  trim = 4,
  cache = 5,
  write_zeroes = 6,
  block_status = 7,
};

// "Command flags".
inline constexpr std::uint16_t cmd_fua = 1 << 0;
inline constexpr std::uint16_t cmd_no_hole = 1 << 1;
inline constexpr std::uint16_t cmd_df = 1 << 2;
inline constexpr std::uint16_t cmd_req_one = 1 << 3;
inline constexpr std::uint16_t cmd_fast_zero = 1 << 4;

// "Structured reply flags" and types.
inline constexpr std::uint16_t reply_done = 1 << 0;
enum class Chunk : std::uint16_t { none = 0, offset_data = 1, block_status = 5, error = 0x8001 };

// "base:allocation" states.
inline constexpr std::uint32_t state_hole = 1 << 0;
inline constexpr std::uint32_t state_zero = 1 << 1;

// A request's header as it came; nothing but the magic has been looked at.
struct Request {
  std::uint16_t flags = 0;
  RequestType type = RequestType::read;
  std::uint64_t cookie = 0;
  std::uint64_t offset = 0;
  std::uint32_t length = 0;

  // What follows the header on the wire.
  [[nodiscard]] std::uint32_t payload_bytes() const {
    return type == RequestType::write ? length : 0;
  }
};

[[nodiscard]] inline bool has_request_magic(const std::byte* header) {
  return load<std::uint32_t>(header) == magic_request;
}

[[nodiscard]] inline Request load_request(const std::byte* header) {
  return {load<std::uint16_t>(header + 4), RequestType{load<std::uint16_t>(header + 6)},
          load<std::uint64_t>(header + 8), load<std::uint64_t>(header + 16),
          load<std::uint32_t>(header + 24)};
}

}  // namespace nbdferry::proxy::nbd
