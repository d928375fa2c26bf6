// The control socket's server against any bytes: HTTP, its JSON bodies and what they ask for, in
// pieces of any size.
//
// The input's first byte chooses: one export or two, which answer at once, later, or refuse; the
// client goes with commands under way, or stays. The second is the size of the pieces. Besides "no
// crash, no leak, no endless loop": every answer is whole, well-formed and has a JSON object that
// says what its status means; what reaches an export is within its bounds and survives the way back
// into JSON; nothing stays open when the client has gone.
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include <stdlib.h>
#include <sys/socket.h>

#include <boost/asio/buffer.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/beast/http.hpp>
#include <boost/json.hpp>

#include "proxy/control_api.hpp"
#include "proxy/control_server.hpp"
#include "test/fuzz/fuzz.hpp"
#include "test/unit/proxy_control_fixture.hpp"

namespace nbdferry::fuzz {
namespace {

using namespace proxy;
using proxy::test::FakeExport;
namespace asio = boost::asio;
namespace http = boost::beast::http;
namespace json = boost::json;

void must(bool condition, const char* what) {
  if (condition) return;
  std::printf("\nfuzz: %s\n", what);
  std::fflush(stdout);
  std::abort();
}

// What gets through must be what the vocabulary can say.
class CheckedExport final : public FakeExport {
 public:
  using FakeExport::FakeExport;
  void migrate(MigrateRequest request, CommandHandler done) override {
    must(request.uris.size() == 1 && !request.uris.front().empty(), "a migration without a URI");
    must(request.uris.front().size() <= limits::uri_bytes_max, "an endless URI");
    must(request.connections <= connections_max, "too many connections");
    const json::object as_json = migrate_to_json(request);
    must(migrate_to_json(migrate_from_json(as_json)) == as_json, "a migration changes on its way");
    later(std::move(done));
  }
  void set(mirror::Set request, CommandHandler done) override {
    const json::object as_json = set_to_json(request);
    must(set_to_json(set_from_json(as_json)) == as_json, "a change changes on its way");
    later(std::move(done));
  }
  void command(Verb verb, CommandHandler done) override {
    must(verb >= Verb{} && verb <= Verb::unfence, "an unknown command");
    later(std::move(done));
  }

  void release() {
    for (auto waiting = std::exchange(waiting_, {}); !waiting.empty(); waiting.pop_front()) {
      waiting.front()(answer.first, answer.second);
    }
  }

 private:
  void later(CommandHandler done) {
    if (hold) return waiting_.push_back(std::move(done));
    done(answer.first, answer.second);
  }
  std::deque<CommandHandler> waiting_;
};

// Takes whole answers off the front; what is left must be the start of one.
void check_output(std::string_view output) {
  while (!output.empty()) {
    http::response_parser<http::string_body> parser;
    parser.eager(true);
    boost::system::error_code error;
    const auto used = parser.put(asio::buffer(output.data(), output.size()), error);
    if (error == http::error::need_more) return;
    must(!error && parser.is_done(), "not an HTTP answer");
    const auto& response = parser.get();
    const json::value body = json::parse(response.body(), error);
    must(!error && body.is_object(), "an answer without a JSON object");
    const json::value* const why = body.get_object().if_contains("error");
    const bool ok = response.result() == http::status::ok;
    must(ok ? why == nullptr : why != nullptr && why->is_string(), "a failure without a reason");
    const unsigned status = response.result_int();
    must(ok || (status >= 400 && status < 500), "a status that we don't send");
    output.remove_prefix(used);
  }
}

// A directory for the socket that nobody connects to; gone at the end.
const std::string& socket_path() {
  struct Folder {
    Folder() {
      std::string name = "/tmp/nbdferry-fuzz-XXXXXX";
      must(::mkdtemp(name.data()) != nullptr, "mkdtemp");
      path = name;
    }
    ~Folder() { std::filesystem::remove_all(path); }
    std::string path;
  };
  static const Folder folder;
  static const std::string path = folder.path + "/s";
  return path;
}

class Scene {
 public:
  explicit Scene(unsigned mode) {
    exports_.push_back(std::make_unique<CheckedExport>(""));
    if ((mode & 1) != 0) exports_.push_back(std::make_unique<CheckedExport>("b & c"));
    std::vector<Export*> served;
    for (const auto& disk : exports_) {
      disk->hold = (mode & 2) != 0;
      if ((mode & 4) != 0) disk->answer = {false, "not now \x01\xff \"quoted\""};
      served.push_back(disk.get());
    }
    server_ = std::make_unique<ControlServer>(io_, socket_path(), std::move(served));
    int ends[2];
    must(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0,
         "socketpair");
    client_ = UniqueFd(ends[0]);
    server_->serve(UniqueFd(ends[1]));
  }

  void say(std::string_view bytes) {
    for (int tries = 0; !bytes.empty() && tries < 10'000; ++tries) {
      const auto sent = ::send(client_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent > 0) bytes.remove_prefix(static_cast<std::size_t>(sent));
      if (sent < 0 && errno != EAGAIN) return;  // turned away: as it should be with garbage
      turn();
      release();
    }
    must(bytes.empty(), "the server does not read on");
  }

  void turn() {
    io_.restart();
    io_.poll();
    char piece[65536];
    for (ssize_t got = 0; (got = ::recv(client_.get(), piece, sizeof piece, 0)) > 0;) {
      output_.append(piece, static_cast<std::size_t>(got));
    }
  }

  void release() {
    for (const auto& disk : exports_) disk->release();
  }

  void leave() {
    turn();
    client_ = UniqueFd();
    turn();
    for (int i = 0; server_->connections() > 0 && i < 10'000; ++i) {
      release();
      io_.restart();
      io_.poll();
    }
    must(server_->connections() == 0, "a connection outlives its client");
    server_->stop();
    io_.restart();
    io_.poll();
  }

  [[nodiscard]] const std::string& output() const { return output_; }

 private:
  asio::io_context io_{1};
  std::vector<std::unique_ptr<CheckedExport>> exports_;
  std::unique_ptr<ControlServer> server_;
  UniqueFd client_;
  std::string output_;
};

std::string post(const std::string& target, const std::string& body) {
  return "POST " + target + " HTTP/1.1\r\nContent-Length: " + std::to_string(body.size()) +
         "\r\n\r\n" + body;
}

}  // namespace

std::vector<std::vector<std::uint8_t>> seeds() {
  std::vector<std::vector<std::uint8_t>> all;
  const auto add = [&](const std::string& text) {
    for (const unsigned mode : {0U, 1U, 2U, 6U, 8U, 10U}) {
      std::vector<std::uint8_t> seed{static_cast<std::uint8_t>(mode),
                                     static_cast<std::uint8_t>(mode == 8 ? 7 : 0)};
      seed.insert(seed.end(), text.begin(), text.end());
      all.push_back(std::move(seed));
    }
  };
  add("GET /status HTTP/1.1\r\nHost: x\r\n\r\n");
  add("GET /status?export=b%20%26%20c HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
  add("POST /pause HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\n{}\r\n0\r\nA: b\r\n\r\n");
  add("POST /pause HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 99999\r\n\r\n");
  MigrateRequest request;
  request.uris = {"nbd://host:10809/vm"};
  const std::string migrate = json::serialize(migrate_to_json(request));
  add(post("/migrate", migrate));
  add(post("/migrate",
           R"({"uris":["nbd+unix:///\u00e9\ud83d\ude00?socket=/s"],"export":"b & c"})"));
  mirror::Set changes;
  changes.mode = mirror::Mode::sync;
  changes.bandwidth = 1 << 20;
  changes.deadline = std::chrono::minutes(5);
  add(post("/set", json::serialize(set_to_json(changes))));
  for (int verb = 0; verb <= static_cast<int>(Verb::unfence); ++verb) {
    const ControlCall& call = call_of(static_cast<Verb>(verb));
    json::object body;
    if (call.field != nullptr) body[call.field] = call.value;
    add(post(call.path, json::serialize(body)) + post(call.path, "") +
        "GET /status HTTP/1.1\r\n\r\n");
  }
  add(post("/set", R"([[[[[[[[[1e999,-0,0.5,18446744073709551616,"\ud800",null,true]]]]]]]]])"));
  return all;
}

}  // namespace nbdferry::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace nbdferry::fuzz;
  if (size < 2 || size > 1 << 20) return 0;
  const unsigned mode = data[0];
  const std::size_t piece = data[1] == 0 ? size : data[1];
  Scene scene(mode);
  std::string_view input(reinterpret_cast<const char*>(data) + 2, size - 2);
  for (int pieces = 0; !input.empty(); ++pieces) {
    // The rest in one piece, after a while: a thousand tiny ones teach nothing new.
    const auto part = input.substr(0, pieces < 200 ? piece : input.size());
    scene.say(part);
    scene.turn();
    // With 8, commands wait until the client has said all, or has gone.
    if ((mode & 8) == 0) scene.release();
    input.remove_prefix(part.size());
  }
  scene.leave();
  check_output(scene.output());
  return 0;
}
