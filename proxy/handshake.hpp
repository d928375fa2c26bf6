// The handshake of one connection: fixed newstyle negotiation (NBD protocol, "Handshake phase").
// A state machine without a socket: bytes in, bytes out.
//
// What must hold:
//  - Nothing that a client sends makes it hold more than one option (limits::option_data_bytes_max)
//    and the answer to it: the next option is looked at when the answer has been taken.
//  - SET_META_CONTEXT replaces what was selected before, even when it fails, and counts only for
//  the
//    export that it named.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "proxy/front.hpp"
#include "proxy/nbd_protocol.hpp"

namespace nbdferry::proxy {

// What a client and we have agreed on.
struct Contexts {
  bool allocation = false;  // base:allocation was selected
  std::string migration;    // value of x-nbdferry:migration=…, if it was selected
  std::string session;      // likewise, of x-nbdferry:session=…; only of a migration
  std::string holds;        // likewise, of x-nbdferry:holds=…
  bool sum_low = false;     // x-nbdferry:xxh3-low was selected
  bool sum_high = false;    // x-nbdferry:xxh3-high
  std::string knows;        // likewise, of x-nbdferry:knows=…
};
struct Negotiated {
  Front* front = nullptr;
  bool structured_replies = false;
  Contexts contexts;
};

// Context ids in BLOCK_STATUS replies.
inline constexpr std::uint32_t allocation_context_id = 1;
inline constexpr std::uint32_t migration_context_id = 2;
inline constexpr std::uint32_t session_context_id = 3;
inline constexpr std::uint32_t holds_context_id = 4;
inline constexpr std::uint32_t sum_low_context_id = 5;
inline constexpr std::uint32_t sum_high_context_id = 6;
inline constexpr std::uint32_t knows_context_id = 7;

[[nodiscard]] std::uint16_t transmission_flags(const ExportInfo& info, bool structured_replies);

class Handshake {
 public:
  enum class State : std::uint8_t {
    negotiating,   // wants more input
    transmission,  // agreed: send the output, the rest of the input are requests
    finished,      // the client has ended it: send the output, then close
    failed,        // close at once; why() is the reason
  };

  // `fronts` are the exports, the first is the default one; not empty, and must outlive this. The
  // greeting is in the output from the start.
  explicit Handshake(const std::vector<Front*>& fronts);

  // Looks at the next piece of `input` and returns how much of it is done with; 0: more is needed.
  // Only while negotiating and when the output has been taken.
  [[nodiscard]] std::size_t consume(std::span<const std::byte> input);

  // To be sent; the caller clears it.
  [[nodiscard]] std::vector<std::byte>& output() { return output_; }
  [[nodiscard]] State state() const { return state_; }
  [[nodiscard]] const std::string& why() const { return why_; }
  [[nodiscard]] const Negotiated& negotiated() const { return negotiated_; }

 private:
  enum class Expect : std::uint8_t { client_flags, option, skipped_data };

  void take_client_flags(std::uint32_t flags);
  std::size_t take_option(std::span<const std::byte> input);
  void answer(std::span<const std::byte> data);
  void answer_export_name(std::span<const std::byte> data);
  void answer_list(std::span<const std::byte> data);
  void answer_info(std::span<const std::byte> data, bool go);
  void answer_structured_reply(std::span<const std::byte> data);
  void answer_meta_context(std::span<const std::byte> data, bool set);
  void select(std::string_view query, const Front& front, bool set, Contexts& selected) const;
  void enter_transmission(Front& front);
  [[nodiscard]] Front* find(std::string_view name) const;
  void reply(nbd::OptionReply type, std::span<const std::byte> data = {});
  void refuse(nbd::OptionReply type, std::string_view message);
  void fail(std::string why);

  const std::vector<Front*>& fronts_;
  State state_ = State::negotiating;
  Expect expect_ = Expect::client_flags;
  nbd::Option option_{};          // the one being answered
  std::uint32_t skip_bytes_ = 0;  // of its data, still to come
  std::uint32_t options_ = 0;     // so far
  bool no_zeroes_ = false;
  Front* contexts_of_ = nullptr;  // the export that the last SET_META_CONTEXT named
  Negotiated negotiated_;
  std::vector<std::byte> output_;
  std::string why_;
};

}  // namespace nbdferry::proxy
