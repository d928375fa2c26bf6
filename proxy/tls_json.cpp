#include "proxy/tls_json.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "proxy/log.hpp"

namespace nbdferry::proxy {

namespace {

namespace json = boost::json;
using transport::TlsOptions;
using transport::TlsUse;

constexpr std::array<std::pair<std::string_view, TlsUse>, 3> uses{
    {{"off", TlsUse::off}, {"on", TlsUse::on}, {"require", TlsUse::require}}};

[[noreturn]] void refuse(std::string_view field, std::string_view why) {
  throw std::invalid_argument(fmt::format("\"tls\": \"{}\" {}", field, why));
}

// Relative to what? The server's folder is not the operator's.
std::string read_path(std::string_view field, const json::value& value) {
  const auto* const text = value.if_string();
  if (text == nullptr || !text->starts_with('/') ||
      std::any_of(text->begin(), text->end(), is_control)) {
    refuse(field, "must be an absolute path");
  }
  return std::string(*text);
}

TlsUse read_use(std::string_view field, const json::value& value) {
  for (const auto& [name, use] : uses) {
    if (value.is_string() && value.get_string() == name) return use;
  }
  refuse(field, "must be one of off, on, require");
}

}  // namespace

json::object tls_to_json(const TlsOptions& tls) {
  json::object o;
  const auto* const use =
      std::ranges::find(uses, tls.use, &std::pair<std::string_view, TlsUse>::second);
  if (tls.use != TlsUse::on) o["use"] = use->first;
  if (!tls.certificates.empty()) o["certificates"] = tls.certificates;
  if (!tls.psk_file.empty()) o["psk"] = tls.psk_file;
  if (!tls.verify_peer) o["verify_peer"] = false;
  return o;
}

TlsOptions tls_from_json(const json::value& value) {
  const auto* const object = value.if_object();
  if (object == nullptr) throw std::invalid_argument("\"tls\" must be an object");
  TlsOptions tls;
  for (const auto& [key, field] : *object) {
    const std::string_view name(key.data(), key.size());
    if (name == "use") {
      tls.use = read_use(name, field);
    } else if (name == "certificates") {
      tls.certificates = read_path(name, field);
    } else if (name == "psk") {
      tls.psk_file = read_path(name, field);
    } else if (name == "verify_peer") {
      if (!field.is_bool()) refuse(name, "must be true or false");
      tls.verify_peer = field.get_bool();
    } else {
      refuse(name, "is unknown");
    }
  }
  return tls;
}

}  // namespace nbdferry::proxy
