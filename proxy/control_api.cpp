// Tables for both directions; bounds are checked where the JSON is read, on the server's side.
#include "proxy/control_api.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

#include <boost/json.hpp>
#include <fmt/format.h>

#include "proxy/limits.hpp"
#include "proxy/log.hpp"
#include "proxy/tls_json.hpp"

namespace nbdferry::proxy {
namespace {

namespace json = boost::json;
using mirror::MigrateOptions;

struct TimeField {
  const char* name;  // milliseconds
  Duration MigrateOptions::*member;
  std::int64_t ms_min;
};
constexpr std::array<TimeField, 7> time_fields{{
    {"max_delay_ms", &MigrateOptions::max_delay, 0},
    {"downtime_limit_ms", &MigrateOptions::downtime_limit, 1},
    {"sync_timeout_ms", &MigrateOptions::sync_timeout, 1},
    {"prepare_timeout_ms", &MigrateOptions::prepare_timeout, 1},
    {"quarantine_ms", &MigrateOptions::quarantine, 0},
    {"reconnect_delay_ms", &MigrateOptions::reconnect_delay, 0},
    {"deadline_ms", &MigrateOptions::deadline, 0},
}};
constexpr std::int64_t time_max_ms = std::int64_t{30} * 24 * 3600 * 1000;
constexpr std::uint64_t answer_timeout_min_ms = 100;  // less is slow, not hung
constexpr std::uint64_t buffer_bytes_min = 64 * 1024;
constexpr std::uint64_t bandwidth_min = 64 * 1024;
constexpr std::uint64_t buffer_bytes_max = std::uint64_t{1} << 40;

constexpr std::array<std::pair<const char*, mirror::Mode>, 3> modes{
    {{"async", mirror::Mode::async},
     {"sync", mirror::Mode::sync},
     {"auto", mirror::Mode::automatic}}};
constexpr std::array<std::pair<const char*, mirror::SwitchWhen>, 3> switch_times{
    {{"manual", mirror::SwitchWhen::manual},
     {"pivot", mirror::SwitchWhen::pivot},
     {"release", mirror::SwitchWhen::release}}};

constexpr std::array<std::pair<const char*, mirror::Consistency>, 2> consistencies{
    {{"none", mirror::Consistency::none}, {"crash", mirror::Consistency::crash}}};

// What `set` changes; under the names, and within the bounds, of a migration's start.
template <class T>
struct SetField {
  const char* name;
  T MigrateOptions::*option;
  std::optional<T> mirror::Set::*change;
};
constexpr std::tuple set_fields{
    SetField{"mode", &MigrateOptions::mode, &mirror::Set::mode},
    SetField{"bandwidth_bytes_per_second", &MigrateOptions::bandwidth, &mirror::Set::bandwidth},
    SetField{"buffer_bytes", &MigrateOptions::buffer_bytes, &mirror::Set::buffer_bytes},
    SetField{"max_delay_ms", &MigrateOptions::max_delay, &mirror::Set::max_delay},
    SetField{"downtime_limit_ms", &MigrateOptions::downtime_limit, &mirror::Set::downtime_limit},
    SetField{"deadline_ms", &MigrateOptions::deadline, &mirror::Set::deadline}};
template <class F>
void for_each_set_field(F&& f) {
  std::apply([&](const auto&... field) { (f(field), ...); }, set_fields);
}

constexpr std::array<std::pair<Verb, ControlCall>, 14> calls{{
    {Verb::pause, {"/pause"}},
    {Verb::resume, {"/resume"}},
    {Verb::cancel, {"/cancel"}},
    {Verb::verify, {"/verify"}},
    {Verb::acknowledge, {"/acknowledge"}},
    {Verb::promote, {"/promote"}},
    {Verb::unfence, {"/unfence"}},
    {Verb::prepare, {"/switch", "action", "prepare"}},
    {Verb::seal, {"/switch", "action", "seal"}},
    {Verb::commit_pivot, {"/switch", "action", "commit-pivot"}},
    {Verb::commit_release, {"/switch", "action", "commit-release"}},
    {Verb::switch_pivot, {"/switch", "action", "pivot"}},
    {Verb::switch_release, {"/switch", "action", "release"}},
    {Verb::abort, {"/switch", "action", "abort"}},
}};

[[noreturn]] void refuse(std::string_view field, std::string_view why) {
  throw std::invalid_argument(fmt::format("\"{}\" {}", field, why));
}

std::uint64_t read_number(const json::value& value, std::string_view field, std::uint64_t min,
                          std::uint64_t max) {
  boost::system::error_code error;
  const auto number = value.to_number<std::uint64_t>(error);
  if (error || number < min || number > max) {
    refuse(field, fmt::format("must be a whole number from {} to {}", min, max));
  }
  return number;
}

template <class Enum, std::size_t N>
Enum read_name(const json::value& value, std::string_view field,
               const std::array<std::pair<const char*, Enum>, N>& names) {
  std::string known;
  for (const auto& [name, meaning] : names) {
    if (value.is_string() && value.get_string() == name) return meaning;
    known += known.empty() ? name : fmt::format(", {}", name);
  }
  refuse(field, fmt::format("must be one of {}", known));
}

template <class Enum, std::size_t N>
const char* name_of(Enum meaning, const std::array<std::pair<const char*, Enum>, N>& names) {
  return std::find_if(names.begin(), names.end(),
                      [&](const auto& entry) { return entry.second == meaning; })
      ->first;
}

std::vector<std::string> read_texts(const json::value& value, std::string_view field) {
  const json::array* const list = value.if_array();
  if (list == nullptr || list->empty()) refuse(field, "must be a list of at least one");
  std::vector<std::string> texts;
  for (const json::value& entry : *list) {
    const json::string* const text = entry.if_string();
    if (text == nullptr || text->empty()) refuse(field, "must hold texts that are not empty");
    if (std::any_of(text->begin(), text->end(), is_control)) {
      refuse(field, "must hold no control characters");
    }
    texts.emplace_back(*text);
  }
  return texts;
}

// At the start rather than when the ownership record turns out to be too short for them.
void check_length(const MigrateRequest& request) {
  const std::size_t paths = std::max(request.uris.size(), request.vias.size());
  std::size_t bytes = request.tls.certificates.size() + request.tls.psk_file.size();
  for (std::size_t i = 0; i < paths; ++i) {
    bytes += request.uris[std::min(i, request.uris.size() - 1)].size();
    if (i < request.vias.size()) bytes += request.vias[i].size();
  }
  if (bytes > limits::uri_bytes_max) {
    refuse("uris",
           fmt::format("vias and tls must have at most {} bytes in all", limits::uri_bytes_max));
  }
}

bool read_flag(const json::value& value, std::string_view field) {
  if (!value.is_bool()) refuse(field, "must be true or false");
  return value.get_bool();
}

// Too little is a mistake in the unit rather than a wish.
std::uint64_t read_bandwidth(const json::value& value, std::string_view field) {
  const std::uint64_t rate = read_number(value, field, 0, buffer_bytes_max);
  if (rate != 0 && rate < bandwidth_min) {
    refuse(field, fmt::format("must be 0 (no limit) or at least {}", bandwidth_min));
  }
  return rate;
}

void read_field(MigrateRequest& request, std::string_view field, const json::value& value) {
  MigrateOptions& options = request.options;
  const auto time = std::find_if(time_fields.begin(), time_fields.end(),
                                 [&](const TimeField& t) { return t.name == field; });
  if (time != time_fields.end()) {
    const auto ms = read_number(value, field, static_cast<std::uint64_t>(time->ms_min),
                                static_cast<std::uint64_t>(time_max_ms));
    options.*time->member = std::chrono::milliseconds(static_cast<std::int64_t>(ms));
  } else if (field == "uris") {
    request.uris = read_texts(value, field);
  } else if (field == "vias") {
    request.vias = read_texts(value, field);
  } else if (field == "tls") {
    request.tls = tls_from_json(value);
  } else if (field == "connections") {
    request.connections = static_cast<unsigned>(read_number(value, field, 0, connections_max));
  } else if (field == "answer_timeout_ms") {
    const auto ms =
        read_number(value, field, answer_timeout_min_ms, static_cast<std::uint64_t>(time_max_ms));
    request.answer_timeout = std::chrono::milliseconds(static_cast<std::int64_t>(ms));
  } else if (field == "mode") {
    options.mode = read_name(value, field, modes);
  } else if (field == "switch") {
    options.switch_when = read_name(value, field, switch_times);
  } else if (field == "consistency") {
    options.consistency = read_name(value, field, consistencies);
  } else if (field == "buffer_bytes") {
    options.buffer_bytes = read_number(value, field, buffer_bytes_min, buffer_bytes_max);
  } else if (field == "bandwidth_bytes_per_second") {
    options.bandwidth = read_bandwidth(value, field);
  } else if (field == "skip_unreadable") {
    options.skip_unreadable = read_flag(value, field);
  } else if (field == "verify") {
    options.verify = read_flag(value, field);
  } else if (field == "trust_target") {
    options.trust_target = read_flag(value, field);
  } else if (field != "export") {
    refuse(field, "is not a field of a migration");
  }
}

}  // namespace

json::object migrate_to_json(const MigrateRequest& request) {
  const MigrateOptions& options = request.options;
  const auto answer_timeout =
      std::chrono::duration_cast<std::chrono::milliseconds>(request.answer_timeout);
  json::object o{{"connections", request.connections},
                 {"answer_timeout_ms", answer_timeout.count()},
                 {"mode", name_of(options.mode, modes)},
                 {"switch", name_of(options.switch_when, switch_times)},
                 {"consistency", name_of(options.consistency, consistencies)},
                 {"buffer_bytes", options.buffer_bytes},
                 {"bandwidth_bytes_per_second", options.bandwidth},
                 {"skip_unreadable", options.skip_unreadable},
                 {"verify", options.verify},
                 {"trust_target", options.trust_target}};
  o["uris"] = json::array(request.uris.begin(), request.uris.end());
  if (!request.vias.empty()) o["vias"] = json::array(request.vias.begin(), request.vias.end());
  if (request.tls != transport::TlsOptions{}) o["tls"] = tls_to_json(request.tls);
  for (const TimeField& time : time_fields) {
    o[time.name] =
        std::chrono::duration_cast<std::chrono::milliseconds>(options.*time.member).count();
  }
  return o;
}

MigrateRequest migrate_from_json(const json::object& body) {
  MigrateRequest request;
  for (const auto& [field, value] : body) {
    read_field(request, {field.data(), field.size()}, value);
  }
  if (request.uris.empty()) refuse("uris", "is missing: where should the disk go?");
  check_length(request);
  return request;
}

json::object set_to_json(const mirror::Set& request) {
  MigrateRequest as_migration;
  for_each_set_field([&](const auto& field) {
    if (const auto& change = request.*field.change) as_migration.options.*field.option = *change;
  });
  const json::object all = migrate_to_json(as_migration);
  json::object o;
  for_each_set_field([&](const auto& field) {
    if (request.*field.change) o[field.name] = all.at(field.name);
  });
  return o;
}

mirror::Set set_from_json(const json::object& body) {
  mirror::Set request;
  MigrateRequest as_migration;
  for (const auto& [key, value] : body) {
    const std::string_view name(key.data(), key.size());
    bool known = name == "export";
    for_each_set_field([&](const auto& field) {
      if (name != field.name) return;
      read_field(as_migration, name, value);
      request.*field.change = as_migration.options.*field.option;
      known = true;
    });
    if (!known) refuse(name, "cannot be changed in a running migration");
  }
  return request;
}

const ControlCall& call_of(Verb verb) {
  return std::find_if(calls.begin(), calls.end(),
                      [&](const auto& entry) { return entry.first == verb; })
      ->second;
}

std::optional<Verb> verb_of(std::string_view path, const json::object& body) {
  const char* wanted = nullptr;  // the field that this path needs
  std::string known;
  for (const auto& [verb, call] : calls) {
    if (path != call.path) continue;
    wanted = call.field;
    for (const auto& [field, value] : body) {
      if (field != "export" && (wanted == nullptr || field != wanted)) {
        refuse({field.data(), field.size()}, fmt::format("is not a field of {}", path));
      }
    }
    if (wanted == nullptr) return verb;
    const json::value* const value = body.if_contains(wanted);
    if (value != nullptr && value->is_string() && value->get_string() == call.value) return verb;
    known += known.empty() ? call.value : fmt::format(", {}", call.value);
  }
  if (wanted != nullptr) refuse(wanted, fmt::format("must be one of {}", known));
  return std::nullopt;
}

}  // namespace nbdferry::proxy
