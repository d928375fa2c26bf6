// Synchronous on the outside; inside a private io_context, since only asynchronous reads can be
// given up after a time.
#include "proxy/control_client.hpp"

#include <exception>
#include <utility>

#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>

#include "proxy/control_api.hpp"
#include "proxy/status_json.hpp"
#include "proxy/uri_escape.hpp"

namespace nbdferry::proxy {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
namespace json = boost::json;
using asio::local::stream_protocol;
using boost::system::error_code;

// Everything but a command that waits is answered at once by a living server.
constexpr std::chrono::seconds answer_time{10};

// One field of a JSON object as text; nothing if it isn't so.
std::optional<std::string> text_field(const std::string& body, const char* name) {
  error_code error;
  const json::value value = json::parse(body, error);
  if (error || !value.is_object()) return std::nullopt;
  const json::value* const field = value.get_object().if_contains(name);
  if (field == nullptr || !field->is_string()) return std::nullopt;
  return std::string(field->get_string());
}

}  // namespace

struct ControlClient::Link {
  explicit Link(const std::string& path) : stream(io) {
    try {
      stream.socket().connect(stream_protocol::endpoint(path));
    } catch (const boost::system::system_error& e) {  // of the path (too long), or of connecting
      const bool nobody = e.code() == asio::error::connection_refused ||
                          e.code() == boost::system::errc::no_such_file_or_directory;
      throw ControlError(fmt::format("cannot reach the control socket {}: {}{}", path,
                                     e.code().message(),
                                     nobody ? " (is nbdferry serve running?)" : ""));
    }
  }

  // Runs what was started to its end.
  void run() {
    io.restart();
    io.run();
  }

  asio::io_context io{1};
  beast::basic_stream<stream_protocol> stream;
  beast::flat_buffer buffer;
};

ControlClient::ControlClient(std::string socket_path, std::string what)
    : path_(std::move(socket_path)), what_(std::move(what)) {}

ControlClient::~ControlClient() = default;

std::string ControlClient::exchange(const char* method, const std::string& target, std::string body,
                                    std::optional<std::chrono::seconds> timeout) {
  if (!link_) link_ = std::make_unique<Link>(path_);
  http::request<http::string_body> request(http::string_to_verb(method), target, 11);
  request.set(http::field::host, "nbdferry");
  request.set(http::field::content_type, "application/json");
  request.body() = std::move(body);
  request.prepare_payload();

  error_code error;
  http::response<http::string_body> response;
  if (timeout) {
    link_->stream.expires_after(*timeout);
  } else {
    link_->stream.expires_never();
  }
  http::async_write(link_->stream, request, [&](error_code write_error, std::size_t) {
    error = write_error;
    if (error) return;
    http::async_read(link_->stream, link_->buffer, response,
                     [&](error_code read_error, std::size_t) { error = read_error; });
  });
  link_->run();
  if (error || !response.keep_alive()) link_.reset();
  if (error) {
    const bool late = error == beast::error::timeout;
    throw ControlError(fmt::format("{}: {} {}", what_, path_,
                                   late ? "does not answer (is the process stopped?)"
                                        : "closed the connection before it answered"));
  }
  if (response.result() != http::status::ok) {
    const std::string why =
        text_field(response.body(), "error").value_or("the server's answer makes no sense");
    // "cannot …: why" says itself what failed.
    throw ControlError(why.starts_with("cannot ") ? why : fmt::format("{}: {}", what_, why));
  }
  return std::move(response.body());
}

std::string ControlClient::post(const char* path, json::object body,
                                std::optional<std::chrono::seconds> timeout) {
  if (export_name_) body["export"] = *export_name_;
  return text_field(exchange("POST", path, json::serialize(body), timeout), "message").value_or("");
}

std::string ControlClient::status_text() {
  std::string target = "/status";
  if (export_name_) target += "?export=" + uri_escape(*export_name_);
  return exchange("GET", target, "", answer_time);
}

ExportStatus ControlClient::status() {
  const std::string text = status_text();
  try {
    return status_from_json(json::parse(text).as_object());
  } catch (const std::exception& e) {
    throw ControlError(fmt::format("{}: the server's status makes no sense: {}", what_, e.what()));
  }
}

std::string ControlClient::set(const mirror::Set& request) {
  return post("/set", set_to_json(request), std::nullopt);
}

std::string ControlClient::migrate(const MigrateRequest& request) {
  return post("/migrate", migrate_to_json(request), std::nullopt);
}

std::string ControlClient::command(Verb verb) {
  const ControlCall& call = call_of(verb);
  json::object body;
  if (call.field != nullptr) body[call.field] = call.value;
  return post(call.path, std::move(body), std::nullopt);
}

}  // namespace nbdferry::proxy
