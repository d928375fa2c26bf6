// TLS options as JSON: in the control API, the saved migration and the ownership record.
//
//   {"use":"off|on|require", "certificates":"/DIR", "psk":"/FILE", "verify_peer":false}     each may be absent
#pragma once

#include <boost/json/object.hpp>
#include <boost/json/value.hpp>

#include "transport/tls.hpp"

namespace nbdferry::proxy {

// Without what is as by default.
[[nodiscard]] boost::json::object tls_to_json(const transport::TlsOptions& tls);

// Throws std::invalid_argument: which field, and what it must be.
[[nodiscard]] transport::TlsOptions tls_from_json(const boost::json::value& value);

}  // namespace nbdferry::proxy
