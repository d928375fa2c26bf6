// The handshake of one connection: fixed newstyle negotiation (NBD protocol, "Handshake phase").
#include "proxy/handshake.hpp"

#include <algorithm>
#include <optional>
#include <utility>

#include <fmt/format.h>

#include "mirror/assert.hpp"
#include "proxy/limits.hpp"

namespace nbdferry::proxy {
namespace {

using nbd::Option;
using nbd::OptionReply;

constexpr std::string_view allocation_context = "base:allocation";
constexpr std::string_view migration_prefix = "x-nbdferry:migration=";
constexpr std::string_view session_prefix = "x-nbdferry:session=";
constexpr std::string_view holds_prefix = "x-nbdferry:holds=";
constexpr std::string_view sum_low_context = "x-nbdferry:xxh3-low";
constexpr std::string_view sum_high_context = "x-nbdferry:xxh3-high";
constexpr std::string_view knows_prefix = "x-nbdferry:knows=";
constexpr std::size_t session_max = 64;

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

void append_text(std::vector<std::byte>& to, std::string_view text) {
  const auto bytes = bytes_of(text);
  to.insert(to.end(), bytes.begin(), bytes.end());
}

// Reads an option's data field by field; a field beyond the end, or a string that the protocol
// forbids, makes it bad for good.
class Fields {
 public:
  explicit Fields(std::span<const std::byte> data) : data_(data) {}

  template <typename T>
  T number() {
    const auto bytes = take(sizeof(T));
    return good_ ? nbd::load<T>(bytes.data()) : T{0};
  }

  std::string_view text(std::uint32_t size) {
    const auto bytes = take(size);
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    if (size > limits::string_bytes_max || text.find('\0') != text.npos) good_ = false;
    return good_ ? text : std::string_view{};
  }

  [[nodiscard]] bool good() const { return good_; }
  [[nodiscard]] bool at_end() const { return good_ && data_.empty(); }

 private:
  std::span<const std::byte> take(std::size_t size) {
    if (!good_ || size > data_.size()) {
      good_ = false;
      return {};
    }
    const auto taken = data_.first(size);
    data_ = data_.subspan(size);
    return taken;
  }

  std::span<const std::byte> data_;
  bool good_ = true;
};

bool is_known(Option option) {
  switch (option) {
    case Option::export_name:
    case Option::abort:
    case Option::list:
    case Option::info:
    case Option::go:
    case Option::structured_reply:
    case Option::list_meta_context:
    case Option::set_meta_context:
      return true;
    case Option::starttls:
      break;
  }
  return false;
}

}  // namespace

std::uint16_t transmission_flags(const ExportInfo& info, bool structured_replies) {
  unsigned flags = nbd::has_flags | nbd::send_flush | nbd::send_fua | nbd::send_trim |
                   nbd::send_write_zeroes | nbd::send_fast_zero | nbd::send_cache |
                   nbd::can_multi_conn;
  if (info.read_only) flags |= nbd::read_only;
  if (info.rotational) flags |= nbd::rotational;
  if (structured_replies) flags |= nbd::send_df;
  return static_cast<std::uint16_t>(flags);
}

Handshake::Handshake(const std::vector<Front*>& fronts) : fronts_(fronts) {
  NBDFERRY_ASSERT(!fronts.empty(), "a server has at least one export");
  nbd::append(output_, nbd::magic_init);
  nbd::append(output_, nbd::magic_option);
  nbd::append(output_, static_cast<std::uint16_t>(nbd::flag_fixed_newstyle | nbd::flag_no_zeroes));
}

std::size_t Handshake::consume(std::span<const std::byte> input) {
  NBDFERRY_ASSERT(state_ == State::negotiating, "the handshake goes on");
  switch (expect_) {
    case Expect::client_flags:
      if (input.size() < sizeof(std::uint32_t)) return 0;
      take_client_flags(nbd::load<std::uint32_t>(input.data()));
      return sizeof(std::uint32_t);
    case Expect::option:
      return take_option(input);
    case Expect::skipped_data:
      break;
  }
  const auto skipped = std::min<std::size_t>(skip_bytes_, input.size());
  skip_bytes_ -= static_cast<std::uint32_t>(skipped);
  if (skip_bytes_ == 0) {
    expect_ = Expect::option;
    // ABORT is answered whatever it carries.
    if (option_ == Option::abort) {
      answer({});
    } else if (is_known(option_)) {
      refuse(OptionReply::err_too_big, "the option's data is too long");
    } else {
      refuse(OptionReply::err_unsup, "this option is not supported");
    }
  }
  return skipped;
}

void Handshake::take_client_flags(std::uint32_t flags) {
  if ((flags & ~std::uint32_t{nbd::flag_fixed_newstyle | nbd::flag_no_zeroes}) != 0) {
    return fail(fmt::format("unknown client flags 0x{:x}", flags));
  }
  no_zeroes_ = (flags & nbd::flag_no_zeroes) != 0;
  expect_ = Expect::option;
}

// The header, and the data when it is there as a whole; or the header alone when the data is to be
// skipped.
std::size_t Handshake::take_option(std::span<const std::byte> input) {
  if (input.size() < nbd::option_header_bytes) return 0;
  if (nbd::load<std::uint64_t>(input.data()) != nbd::magic_option) {
    fail("not an NBD option: wrong magic number");
    return 0;
  }
  option_ = Option{nbd::load<std::uint32_t>(input.data() + 8)};
  const auto length = nbd::load<std::uint32_t>(input.data() + 12);
  if (option_ == Option::export_name && length > limits::string_bytes_max) {
    fail("the export name is too long");
    return 0;
  }
  const bool skip = !is_known(option_) || length > limits::option_data_bytes_max;
  if (!skip && input.size() < nbd::option_header_bytes + length) return 0;
  if (++options_ > limits::options_max) {
    fail("too many options");
    return 0;
  }
  if (skip) {
    skip_bytes_ = length;
    expect_ = Expect::skipped_data;
    // Without data nothing more comes that would end the skipping.
    return nbd::option_header_bytes + (length == 0 ? consume({}) : 0);
  }
  answer(input.subspan(nbd::option_header_bytes, length));
  return nbd::option_header_bytes + length;
}

void Handshake::answer(std::span<const std::byte> data) {
  switch (option_) {
    case Option::export_name:
      return answer_export_name(data);
    case Option::abort:
      reply(OptionReply::ack);
      state_ = State::finished;
      return;
    case Option::list:
      return answer_list(data);
    case Option::info:
      return answer_info(data, false);
    case Option::go:
      return answer_info(data, true);
    case Option::structured_reply:
      return answer_structured_reply(data);
    case Option::list_meta_context:
      return answer_meta_context(data, false);
    case Option::set_meta_context:
      return answer_meta_context(data, true);
    case Option::starttls:
      break;
  }
  NBDFERRY_ASSERT(false, "only known options are answered");
}

// This option knows no error: an export that does not exist ends the connection.
void Handshake::answer_export_name(std::span<const std::byte> data) {
  Fields fields(data);
  const auto name = fields.text(static_cast<std::uint32_t>(data.size()));
  Front* front = fields.good() ? find(name) : nullptr;
  if (front == nullptr) return fail(fmt::format("there is no export \"{}\"", name));
  nbd::append(output_, front->info().size);
  nbd::append(output_, transmission_flags(front->info(), negotiated_.structured_replies));
  if (!no_zeroes_) output_.resize(output_.size() + nbd::export_name_padding_bytes);
  enter_transmission(*front);
}

void Handshake::answer_list(std::span<const std::byte> data) {
  if (!data.empty()) return refuse(OptionReply::err_invalid, "LIST has no data");
  for (const Front* front : fronts_) {
    const ExportInfo& info = front->info();
    std::vector<std::byte> entry;
    nbd::append(entry, static_cast<std::uint32_t>(info.name.size()));
    append_text(entry, info.name);
    append_text(entry, info.description);
    reply(OptionReply::server, entry);
  }
  reply(OptionReply::ack);
}

void Handshake::answer_info(std::span<const std::byte> data, bool go) {
  Fields fields(data);
  const auto name = fields.text(fields.number<std::uint32_t>());
  bool wants_name = false;
  bool wants_description = false;
  for (auto left = fields.number<std::uint16_t>(); left > 0 && fields.good(); --left) {
    const auto info = nbd::Info{fields.number<std::uint16_t>()};
    wants_name |= info == nbd::Info::name;
    wants_description |= info == nbd::Info::description;
  }
  if (!fields.at_end()) return refuse(OptionReply::err_invalid, "malformed request");
  Front* front = find(name);
  if (front == nullptr) return refuse(OptionReply::err_unknown, "there is no such export");

  const ExportInfo& info = front->info();
  const auto reply_info = [this](nbd::Info type, auto&& fill) {
    std::vector<std::byte> entry;
    nbd::append(entry, static_cast<std::uint16_t>(type));
    fill(entry);
    reply(OptionReply::info, entry);
  };
  reply_info(nbd::Info::export_, [&](auto& entry) {
    nbd::append(entry, info.size);
    nbd::append(entry, transmission_flags(info, negotiated_.structured_replies));
  });
  // Asked for or not: clients ignore what they don't know.
  reply_info(nbd::Info::block_size, [&](auto& entry) {
    nbd::append(entry, info.block_min);
    nbd::append(entry, info.block_preferred);
    nbd::append(entry, info.payload_max);
  });
  if (wants_name) reply_info(nbd::Info::name, [&](auto& e) { append_text(e, info.name); });
  if (wants_description) {
    reply_info(nbd::Info::description, [&](auto& e) { append_text(e, info.description); });
  }
  reply(OptionReply::ack);
  if (go) enter_transmission(*front);
}

void Handshake::answer_structured_reply(std::span<const std::byte> data) {
  if (!data.empty()) return refuse(OptionReply::err_invalid, "STRUCTURED_REPLY has no data");
  negotiated_.structured_replies = true;
  reply(OptionReply::ack);
}

// LIST_META_CONTEXT and SET_META_CONTEXT.
void Handshake::answer_meta_context(std::span<const std::byte> data, bool set) {
  if (set) {
    negotiated_.contexts = {};
    contexts_of_ = nullptr;
  }
  if (!negotiated_.structured_replies) {
    return refuse(OptionReply::err_invalid, "structured replies come first");
  }
  Fields fields(data);
  const auto name = fields.text(fields.number<std::uint32_t>());
  const auto queries = fields.number<std::uint32_t>();
  Front* front = find(name);
  Contexts selected;
  for (std::uint32_t i = 0; i < queries && fields.good(); ++i) {
    const auto query = fields.text(fields.number<std::uint32_t>());
    if (fields.good() && front != nullptr) select(query, *front, set, selected);
  }
  if (!fields.at_end()) return refuse(OptionReply::err_invalid, "malformed request");
  if (front == nullptr) return refuse(OptionReply::err_unknown, "there is no such export");
  if (queries == 0 && !set) selected.allocation = true;

  const auto reply_context = [&](std::uint32_t id, const std::string& context) {
    std::vector<std::byte> entry;
    nbd::append(entry, set ? id : 0);
    append_text(entry, context);
    reply(OptionReply::meta_context, entry);
  };
  if (selected.allocation) reply_context(allocation_context_id, std::string(allocation_context));
  const auto reply_value = [&](std::uint32_t id, std::string_view prefix,
                               const std::string& value) {
    if (!value.empty()) reply_context(id, std::string(prefix) + value);
  };
  reply_value(migration_context_id, migration_prefix, selected.migration);
  reply_value(session_context_id, session_prefix, selected.session);
  reply_value(holds_context_id, holds_prefix, selected.holds);
  if (selected.sum_low) reply_context(sum_low_context_id, std::string(sum_low_context));
  if (selected.sum_high) reply_context(sum_high_context_id, std::string(sum_high_context));
  reply_value(knows_context_id, knows_prefix, selected.knows);
  reply(OptionReply::ack);
  if (!set) return;
  negotiated_.contexts = std::move(selected);
  contexts_of_ = front;
}

// Adds what `query` finds; namespaces and names that we don't know find nothing.
void Handshake::select(std::string_view query, const Front& front, bool set,
                       Contexts& selected) const {
  if (query == allocation_context || (query == "base:" && !set)) selected.allocation = true;
  // Anybody's: it tells nothing that can't be read.
  if (query == sum_low_context) selected.sum_low = true;
  if (query == sum_high_context) selected.sum_high = true;
  if (query.starts_with(migration_prefix)) {
    const auto value = query.substr(migration_prefix.size());
    // One client, one migration: the first one that is known.
    if (!value.empty() && selected.migration.empty() && front.knows_migration(value)) {
      selected.migration = value;
    }
  } else if (query.starts_with(session_prefix)) {
    const auto value = query.substr(session_prefix.size());
    if (!selected.migration.empty() && value.size() <= session_max) selected.session = value;
  } else if (query.starts_with(holds_prefix)) {
    const auto value = query.substr(holds_prefix.size());
    if (!value.empty() && front.holds_migration(value)) selected.holds = value;
  } else if (query.starts_with(knows_prefix)) {
    const auto value = query.substr(knows_prefix.size());
    if (!value.empty() && front.knows_session(value)) selected.knows = value;
  }
}

void Handshake::enter_transmission(Front& front) {
  if (contexts_of_ != &front) negotiated_.contexts = {};
  negotiated_.front = &front;
  state_ = State::transmission;
}

Front* Handshake::find(std::string_view name) const {
  if (name.empty()) return fronts_.front();
  const auto found = std::find_if(fronts_.begin(), fronts_.end(),
                                  [&](const Front* f) { return f->info().name == name; });
  return found == fronts_.end() ? nullptr : *found;
}

void Handshake::reply(OptionReply type, std::span<const std::byte> data) {
  nbd::append(output_, nbd::magic_option_reply);
  nbd::append(output_, static_cast<std::uint32_t>(option_));
  nbd::append(output_, static_cast<std::uint32_t>(type));
  nbd::append(output_, static_cast<std::uint32_t>(data.size()));
  output_.insert(output_.end(), data.begin(), data.end());
}

void Handshake::refuse(OptionReply type, std::string_view message) {
  reply(type, bytes_of(message));
}

void Handshake::fail(std::string why) {
  why_ = std::move(why);
  state_ = State::failed;
}

}  // namespace nbdferry::proxy
