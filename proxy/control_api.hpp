// The control socket's vocabulary, shared by its server and its client: which HTTP request means
// which command, and what a migration's request looks like as JSON.
//
//   GET  /status                      the export's status (status_json.hpp)
//   POST /migrate {"uris":[…], "vias":[…], "tls":{…}, …}   start a migration; several: paths to one
//                                     export. tls_json.hpp says what "tls" holds
//   POST /switch  {"action":"…"}      pivot release prepare seal commit-pivot commit-release abort
//   POST /set     {"mode":"…", …}     change a running migration
//   POST /pause /resume /cancel /verify /promote /unfence
//
// Every body is a JSON object; unknown fields are refused, never ignored. Where a process serves
// several disks, "export" in the body (or ?export= for GET) names the one.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include <boost/json/fwd.hpp>

#include "proxy/export.hpp"

namespace nbdferry::proxy {

inline constexpr unsigned connections_max = 64;  // of one path

[[nodiscard]] boost::json::object migrate_to_json(const MigrateRequest& request);

// "export" is not looked at. Throws std::invalid_argument: what is wrong with which field.
[[nodiscard]] MigrateRequest migrate_from_json(const boost::json::object& body);

// The same for what is changed in a running migration.
[[nodiscard]] boost::json::object set_to_json(const mirror::Set& request);
[[nodiscard]] mirror::Set set_from_json(const boost::json::object& body);

struct ControlCall {
  const char* path;             // "/switch"
  const char* field = nullptr;  // "action", or null: the path says it all
  const char* value = nullptr;  // "pivot"
};
[[nodiscard]] const ControlCall& call_of(Verb verb);

// Nothing: no command has that path. Throws std::invalid_argument for a body that does not fit.
[[nodiscard]] std::optional<Verb> verb_of(std::string_view path, const boost::json::object& body);

}  // namespace nbdferry::proxy
