// Connections share the State; each lives in its coroutine and is known to the State by address, so
// that stop() can close it.
#include "proxy/control_server.hpp"

#include <algorithm>
#include <optional>
#include <set>
#include <stdexcept>
#include <utility>

#include <unistd.h>

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <boost/json.hpp>
#include <fmt/format.h>

#include "proxy/control_api.hpp"
#include "proxy/status_json.hpp"
#include "proxy/unix_socket.hpp"
#include "proxy/uri_escape.hpp"

namespace nbdferry::proxy {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
namespace json = boost::json;
using asio::local::stream_protocol;
using boost::system::error_code;

using Request = http::request<http::string_body>;
using Response = http::response<http::string_body>;

constexpr auto await_tuple = asio::as_tuple(asio::use_awaitable);

struct Answer {
  http::status status = http::status::ok;
  json::object body;
};

Answer error_answer(http::status status, std::string_view text) {
  return {status, {{"error", text}}};
}

// Root, and whoever runs this process. The kernel tells, so no file's mode decides alone.
bool may_command(stream_protocol::socket& socket) {
  const auto peer = unix_peer(socket.native_handle());
  return peer && (peer->uid == 0 || peer->uid == ::geteuid());
}

struct Connection {
  explicit Connection(stream_protocol::socket socket)
      : stream(std::move(socket)), obeyed(may_command(stream.socket())) {}
  beast::basic_stream<stream_protocol> stream;
  const bool obeyed;
  bool busy = false;  // a command of its is under way
};

// Where an export leaves a command's outcome; the timer is a condition variable.
struct Outcome {
  explicit Outcome(const asio::any_io_executor& executor)
      : wake(executor, asio::steady_timer::time_point::max()) {}
  asio::steady_timer wake;
  std::optional<Answer> answer;
};

CommandHandler outcome_handler(std::shared_ptr<Outcome> outcome) {
  return [outcome = std::move(outcome)](bool ok, std::string message) {
    outcome->answer = ok ? Answer{http::status::ok, {{"message", std::move(message)}}}
                         : error_answer(http::status::conflict, message);
    outcome->wake.cancel();
  };
}

asio::awaitable<Answer> wait_for(std::shared_ptr<Outcome> outcome) {
  while (!outcome->answer) co_await outcome->wake.async_wait(await_tuple);
  co_return *std::move(outcome->answer);
}

// "/status?export=vm1" in its parts.
struct RequestTarget {
  std::string path;
  std::optional<std::string> export_name;
};

RequestTarget split_target(std::string_view text) {
  const auto question = text.find('?');
  RequestTarget target{std::string(text.substr(0, question)), std::nullopt};
  if (question == std::string_view::npos) return target;
  constexpr std::string_view key = "export=";
  const std::string_view query = text.substr(question + 1);
  if (!query.starts_with(key)) throw std::invalid_argument("the query must be export=NAME");
  target.export_name = uri_unescape(query.substr(key.size()));
  if (!target.export_name) throw std::invalid_argument("the query is not properly escaped");
  return target;
}

json::object parse_body(const Request& request) {
  if (request.body().empty()) return {};
  error_code error;
  json::parse_options options;
  options.max_depth = limits::json_depth_max;
  json::value value = json::parse(request.body(), error, {}, options);
  if (error) throw std::invalid_argument("the body is not JSON: " + error.message());
  if (!value.is_object()) throw std::invalid_argument("the body is not a JSON object");
  return std::move(value.get_object());
}

// How many bytes make the UTF-8 character that `text` begins with; 0: none does (RFC 3629).
std::size_t utf8_character_bytes(std::string_view text) {
  const auto byte = [&](std::size_t i) -> unsigned {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0;
  };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  const std::size_t size = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  // Overlong forms, surrogates, and what lies beyond Unicode show in the second byte.
  const unsigned low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  const unsigned high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  bool good = first >= 0xc2 && first <= 0xf4 && byte(1) >= low && byte(1) <= high;
  for (std::size_t i = 2; i < size; ++i) good = good && (byte(i) & 0xc0) == 0x80;
  return good ? size : 0;
}

// JSON has to be UTF-8, and names of files need not be.
std::string as_utf8(std::string text) {
  for (std::size_t at = 0; at < text.size();) {
    const auto size = utf8_character_bytes(std::string_view(text).substr(at));
    if (size == 0) text[at] = '?';
    at += std::max<std::size_t>(size, 1);
  }
  return text;
}

Response make_response(const Answer& answer, unsigned version, bool keep_alive) {
  Response response(answer.status, version);
  response.set(http::field::content_type, "application/json");
  if (answer.status == http::status::method_not_allowed) response.set(http::field::allow, "POST");
  response.keep_alive(keep_alive);
  response.body() = as_utf8(json::serialize(answer.body)) + "\n";
  response.prepare_payload();
  return response;
}

// How a request that could not be read is answered; nothing: the client is gone or too slow.
std::optional<Answer> read_error_answer(const error_code& error) {
  if (error == http::error::body_limit) {
    return error_answer(http::status::payload_too_large, "the body is too large");
  }
  if (error == http::error::header_limit) {
    return error_answer(http::status::request_header_fields_too_large, "the header is too large");
  }
  if (error == http::error::end_of_stream || error == http::error::partial_message ||
      error.category() != make_error_code(http::error::bad_method).category()) {
    return std::nullopt;
  }
  return error_answer(http::status::bad_request, "not an HTTP request: " + error.message());
}

}  // namespace

struct ControlServer::State {
  State(asio::io_context& io, const std::string& path, std::vector<Export*> served,
        ControlLimits limit)
      : acceptor(io),
        file(std::in_place, acceptor, path, 0600),
        exports(std::move(served)),
        limits(limit) {}

  stream_protocol::acceptor acceptor;
  std::optional<SocketFile> file;
  std::vector<Export*> exports;
  ControlLimits limits;
  std::set<Connection*> connections;
  bool stopping = false;

  Export* find(const std::optional<std::string>& name) const;
  asio::awaitable<Answer> answer(const Request& request);
  asio::awaitable<Answer> post(const RequestTarget& target, const json::object& body);

  static asio::awaitable<void> accept(std::shared_ptr<State> self);
  static asio::awaitable<void> serve(std::shared_ptr<State> self, stream_protocol::socket socket);
  asio::awaitable<void> converse(Connection& connection);
  asio::awaitable<bool> exchange(Connection& connection, beast::flat_buffer& buffer);
};

// Throws std::invalid_argument when it isn't clear which; null when there is no such export.
Export* ControlServer::State::find(const std::optional<std::string>& name) const {
  if (!name) {
    if (exports.size() == 1) return exports.front();
    throw std::invalid_argument("several disks are served here: say which export");
  }
  const auto found = std::find_if(exports.begin(), exports.end(),
                                  [&](const Export* e) { return e->info().name == *name; });
  return found == exports.end() ? nullptr : *found;
}

asio::awaitable<Answer> ControlServer::State::answer(const Request& request) {
  // co_await is not allowed in a handler: the error's text leaves the try block.
  std::string problem;
  try {
    const RequestTarget target =
        split_target(std::string_view(request.target().data(), request.target().size()));
    if (request.method() == http::verb::get) {
      if (target.path != "/status") {
        co_return error_answer(http::status::not_found, "there is only GET /status");
      }
      const Export* const disk = find(target.export_name);
      if (disk == nullptr) co_return error_answer(http::status::not_found, "no such export");
      co_return Answer{http::status::ok, status_to_json(disk->status())};
    }
    if (request.method() != http::verb::post) {
      co_return error_answer(http::status::method_not_allowed, "neither GET nor POST");
    }
    const json::object body = parse_body(request);
    co_return co_await post(target, body);
  } catch (const std::invalid_argument& e) {
    problem = e.what();
  }
  co_return error_answer(http::status::bad_request, problem);
}

asio::awaitable<Answer> ControlServer::State::post(const RequestTarget& target,
                                                   const json::object& body) {
  std::optional<std::string> name = target.export_name;
  if (const json::value* const field = body.if_contains("export")) {
    if (!field->is_string()) throw std::invalid_argument("\"export\" must be a name");
    name = std::string(field->get_string());
  }
  const auto outcome = std::make_shared<Outcome>(acceptor.get_executor());
  if (target.path == "/migrate") {
    MigrateRequest request = migrate_from_json(body);
    Export* const disk = find(name);
    if (disk == nullptr) co_return error_answer(http::status::not_found, "no such export");
    disk->migrate(std::move(request), outcome_handler(outcome));
  } else if (target.path == "/set") {
    mirror::Set request = set_from_json(body);
    Export* const disk = find(name);
    if (disk == nullptr) co_return error_answer(http::status::not_found, "no such export");
    disk->set(request, outcome_handler(outcome));
  } else {
    const std::optional<Verb> verb = verb_of(target.path, body);
    if (!verb) co_return error_answer(http::status::not_found, "no such command");
    Export* const disk = find(name);
    if (disk == nullptr) co_return error_answer(http::status::not_found, "no such export");
    disk->command(*verb, outcome_handler(outcome));
  }
  co_return co_await wait_for(outcome);
}

// One request and its answer. True: the connection can take another.
asio::awaitable<bool> ControlServer::State::exchange(Connection& connection,
                                                     beast::flat_buffer& buffer) {
  http::request_parser<http::string_body> parser;
  parser.header_limit(limits.header_bytes);
  parser.body_limit(limits.body_bytes);
  const auto time = connection.obeyed ? limits.idle : limits::control_stranger_timeout;
  connection.stream.expires_after(time);
  const auto [read_error, received] =
      co_await http::async_read(connection.stream, buffer, parser, await_tuple);
  Response response;
  if (read_error) {
    const std::optional<Answer> reply = read_error_answer(read_error);
    if (!reply) co_return false;
    response = make_response(*reply, 11, false);
  } else if (!connection.obeyed) {
    // Read first: who is cut off while writing never sees the reason.
    response = make_response(error_answer(http::status::forbidden,
                                          "only root and the user that "
                                          "runs nbdferry serve may control it"),
                             parser.get().version(), false);
  } else {
    const Request request = parser.release();
    connection.busy = true;
    connection.stream.expires_never();  // a command takes the time that it takes
    const Answer reply = co_await answer(request);
    connection.busy = false;
    response = make_response(reply, request.version(), request.keep_alive() && !stopping);
  }
  connection.stream.expires_after(time);
  const auto [write_error, sent] =
      co_await http::async_write(connection.stream, response, await_tuple);
  co_return !write_error && response.keep_alive();
}

asio::awaitable<void> ControlServer::State::converse(Connection& connection) {
  beast::flat_buffer buffer(limits.header_bytes + limits.body_bytes);
  while (co_await exchange(connection, buffer)) {
  }
}

asio::awaitable<void> ControlServer::State::serve(std::shared_ptr<State> self,
                                                  stream_protocol::socket socket) {
  Connection connection(std::move(socket));
  self->connections.insert(&connection);
  // A failure of one conversation (no memory) ends it, not the server.
  try {
    co_await self->converse(connection);
  } catch (const std::exception& e) {
    fmt::print(stderr, "nbdferry: control connection failed: {}\n", e.what());
  }
  self->connections.erase(&connection);
}

asio::awaitable<void> ControlServer::State::accept(std::shared_ptr<State> self) {
  while (!self->stopping) {
    auto [error, socket] = co_await self->acceptor.async_accept(await_tuple);
    if (self->stopping) co_return;
    if (error || self->connections.size() >= self->limits.connections) {
      // Out of descriptors, or of places: the client waits in the queue, or is turned away.
      asio::steady_timer pause(self->acceptor.get_executor(), std::chrono::milliseconds(50));
      if (error) co_await pause.async_wait(await_tuple);
      continue;
    }
    asio::co_spawn(self->acceptor.get_executor(), serve(self, std::move(socket)), asio::detached);
  }
}

ControlServer::ControlServer(asio::io_context& io, const std::string& path,
                             std::vector<Export*> exports, ControlLimits limits)
    : state_(std::make_shared<State>(io, path, std::move(exports), limits)) {
  asio::co_spawn(io, State::accept(state_), asio::detached);
}

ControlServer::~ControlServer() { stop(); }

void ControlServer::serve(UniqueFd socket) {
  stream_protocol::socket connected(state_->acceptor.get_executor());
  connected.assign(stream_protocol(), socket.release());
  asio::co_spawn(state_->acceptor.get_executor(), State::serve(state_, std::move(connected)),
                 asio::detached);
}

std::size_t ControlServer::connections() const { return state_->connections.size(); }

void ControlServer::stop() {
  state_->stopping = true;
  error_code ignored;
  state_->acceptor.close(ignored);
  state_->file.reset();
  for (Connection* const connection : state_->connections) {
    if (!connection->busy) connection->stream.close();
  }
}

}  // namespace nbdferry::proxy
