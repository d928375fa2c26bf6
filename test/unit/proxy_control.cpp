// The control socket, server and client, over a fake export: what gets through, what is refused,
// what a bad client can't do.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sys/stat.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/write.hpp>
#include <doctest/doctest.h>

#include "proxy/control_client.hpp"
#include "proxy/control_server.hpp"
#include "test/unit/proxy_as_nobody.hpp"
#include "test/unit/proxy_control_fixture.hpp"

namespace nbdferry::proxy {
namespace {

namespace asio = boost::asio;
using asio::local::stream_protocol;
using namespace std::chrono_literals;
using test::FakeExport;

class TempDir {
 public:
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "nbdferry-XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  [[nodiscard]] std::string operator/(const char* name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

// A server on a thread of its own. Touch exports only before a request or after its answer.
class Served {
 public:
  explicit Served(std::vector<std::string> names = {""}, ControlLimits limits = {})
      : path(dir / "control.sock") {
    std::vector<Export*> served;
    for (std::string& name : names) {
      exports.push_back(std::make_unique<FakeExport>(std::move(name)));
      served.push_back(exports.back().get());
    }
    server = std::make_unique<ControlServer>(io, path, std::move(served), limits);
    thread = std::thread([this] { io.run(); });
  }
  ~Served() {
    asio::post(io, [this] { server->stop(); });
    thread.join();
  }
  FakeExport& only() { return *exports.front(); }

  TempDir dir;
  std::string path;
  asio::io_context io{1};
  std::vector<std::unique_ptr<FakeExport>> exports;
  std::unique_ptr<ControlServer> server;
  std::thread thread;
};

// Everything that comes back for `bytes`, until the server closes the connection.
std::string raw_exchange(const std::string& path, const std::string& bytes) {
  asio::io_context io;
  stream_protocol::socket socket(io);
  socket.connect(stream_protocol::endpoint(path));
  boost::system::error_code ignored;
  asio::write(socket, asio::buffer(bytes), ignored);
  std::string answer;
  asio::read(socket, asio::dynamic_buffer(answer), ignored);
  return answer;
}

std::string post_text(const std::string& target, const std::string& body) {
  return "POST " + target + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: " +
         std::to_string(body.size()) + "\r\n\r\n" + body;
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const ControlError& e) {
    return e.what();
  }
  return "no error";
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("control: a migration's request arrives as it was sent") {
  Served served;
  MigrateRequest request;
  request.uris = {"nbd://host/x"};
  request.tls = {transport::TlsUse::require, "/etc/pki", "/etc/keys", false};
  request.connections = 3;
  request.answer_timeout = 12s;
  request.options.mode = mirror::Mode::sync;
  request.options.switch_when = mirror::SwitchWhen::release;
  request.options.buffer_bytes = 1 << 20;
  request.options.max_delay = 7ms;
  request.options.downtime_limit = 8ms;
  request.options.sync_timeout = 9ms;
  request.options.prepare_timeout = 10ms;
  request.options.quarantine = 0ms;
  request.options.reconnect_delay = 11ms;
  request.options.skip_unreadable = true;
  request.options.consistency = mirror::Consistency::crash;
  request.options.deadline = 3h;
  ControlClient client(served.path, "migrate");
  CHECK(client.migrate(request) == "well done");
  REQUIRE(served.only().requests.size() == 1);
  const MigrateRequest& got = served.only().requests.front();
  CHECK(got.uris == request.uris);
  CHECK(got.tls == request.tls);
  CHECK(got.connections == 3);
  CHECK(got.answer_timeout == Duration{12s});
  CHECK(got.options.mode == mirror::Mode::sync);
  CHECK(got.options.switch_when == mirror::SwitchWhen::release);
  CHECK(got.options.buffer_bytes == 1 << 20);
  CHECK(got.options.max_delay == Duration{7ms});
  CHECK(got.options.downtime_limit == Duration{8ms});
  CHECK(got.options.sync_timeout == Duration{9ms});
  CHECK(got.options.prepare_timeout == Duration{10ms});
  CHECK(got.options.quarantine == Duration{0});
  CHECK(got.options.reconnect_delay == Duration{11ms});
  CHECK(got.options.skip_unreadable);
  CHECK(got.options.consistency == mirror::Consistency::crash);
  CHECK(got.options.deadline == Duration{3h});
}

TEST_CASE("control: what is to change arrives, and what is not named does not") {
  Served served;
  ControlClient client(served.path, "set");
  mirror::Set all;
  all.mode = mirror::Mode::automatic;
  all.bandwidth = 0;
  all.buffer_bytes = 1 << 20;
  all.max_delay = 7ms;
  all.downtime_limit = 8ms;
  all.deadline = 0s;
  client.set(all);
  mirror::Set one;
  one.bandwidth = 1 << 20;
  client.set(one);
  REQUIRE(served.only().sets.size() == 2);
  const mirror::Set& got = served.only().sets.front();
  CHECK(got.mode == all.mode);
  CHECK(got.bandwidth == all.bandwidth);
  CHECK(got.buffer_bytes == all.buffer_bytes);
  CHECK(got.max_delay == all.max_delay);
  CHECK(got.downtime_limit == all.downtime_limit);
  CHECK(got.deadline == all.deadline);
  const mirror::Set& second = served.only().sets.back();
  CHECK(second.bandwidth == one.bandwidth);
  CHECK_FALSE(second.mode);
  CHECK_FALSE(second.buffer_bytes);
  CHECK_FALSE(second.deadline);
}

TEST_CASE("control: every command arrives as itself, on one connection") {
  Served served;
  ControlClient client(served.path, "x");
  std::vector<Verb> sent;
  for (int i = 0; i <= static_cast<int>(Verb::unfence); ++i) {
    sent.push_back(static_cast<Verb>(i));
    CHECK(client.command(sent.back()) == "well done");
  }
  CHECK(served.only().verbs == sent);
}

TEST_CASE("control: a refusal reaches the client with its reason") {
  Served served;
  served.only().answer = {false, "not in sync: 3 MiB to go"};
  ControlClient client(served.path, "switch");
  CHECK(error_of([&] { client.command(Verb::switch_pivot); }) ==
        "switch: not in sync: 3 MiB to go");
  served.only().answer = {false, "cannot seal: not prepared"};
  CHECK(error_of([&] { client.command(Verb::seal); }) == "cannot seal: not prepared");
  CHECK(has(raw_exchange(served.path, post_text("/pause", "{}")), "HTTP/1.1 409 "));
}

TEST_CASE("control: an answer is UTF-8, whatever the disk's file is called") {
  Served served;
  // A byte of Latin-1, an overlong form, a surrogate, beyond Unicode, cut off; and what is good.
  served.only().status_.disk = "\xe9 \xc0\xaf \xed\xa0\x80 \xf4\x90\x80\x80 \xe2\x82";
  ControlClient client(served.path, "status");
  CHECK(client.status().disk == "? ?? ??? ???? ??");
  served.only().status_.disk = "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80";
  CHECK(client.status().disk == served.only().status_.disk);
}

TEST_CASE("control: bad requests are refused, with the reason, and reach no export") {
  Served served;
  const auto answer = [&](const std::string& target, const std::string& body) {
    return raw_exchange(served.path, post_text(target, body));
  };
  const auto refused = [&](const char* target, const char* body, const char* why) {
    const std::string text = answer(target, body);
    CAPTURE(target);
    CAPTURE(body);
    CAPTURE(text);
    CHECK(has(text, "HTTP/1.1 400 "));
    CHECK(has(text, why));
  };
  refused("/migrate", "", "uris");
  refused("/migrate", "[]", "not a JSON object");
  refused("/migrate", "{\"uris\":", "not JSON");
  refused("/migrate", R"({"uris":[]})", "at least one");
  refused("/migrate", R"({"uris":["a",""]})", "must hold");
  refused("/migrate", R"({"uris":["a"],"vias":[]})", "at least one");
  refused("/migrate", R"({"uris":[1]})", "uris");
  refused("/migrate", R"({"uris":["a"],"speed":1})", "speed");
  refused("/migrate", R"({"uris":["a"],"tls":"on"})", "must be an object");
  refused("/migrate", R"({"uris":["a"],"tls":{"use":"maybe"}})", "off, on, require");
  refused("/migrate", R"({"uris":["a"],"tls":{"psk":"keys"}})", "an absolute path");
  refused("/migrate", R"({"uris":["a"],"tls":{"certificates":"/a\n"}})", "an absolute path");
  refused("/migrate", R"({"uris":["a"],"tls":{"verify_peer":0}})", "true or false");
  refused("/migrate", R"({"uris":["a"],"tls":{"key":"x"}})", "is unknown");
  refused("/migrate", R"({"uris":["a"],"connections":65})", "connections");
  refused("/migrate", R"({"uris":["a"],"answer_timeout_ms":99})", "answer_timeout_ms");
  refused("/migrate", R"({"uris":["a"],"max_delay_ms":-1})", "max_delay_ms");
  refused("/migrate", R"({"uris":["a"],"downtime_limit_ms":0})", "downtime_limit_ms");
  refused("/migrate", R"({"uris":["a"],"buffer_bytes":1.5})", "buffer_bytes");
  refused("/migrate", R"({"uris":["a"],"mode":"fast"})", "async, sync, auto");
  refused("/migrate", R"({"uris":["a"],"bandwidth_bytes_per_second":50})", "0 (no limit)");
  refused("/set", R"({"mode":"fast"})", "async, sync, auto");
  refused("/set", R"({"quarantine_ms":1})", "cannot be changed");
  refused("/set", R"({"buffer_bytes":1})", "buffer_bytes");
  refused("/migrate", R"({"uris":["a"],"skip_unreadable":1})", "skip_unreadable");
  refused("/switch", "{}", "pivot, release");
  refused("/switch", R"({"action":"now"})", "pivot, release");
  refused("/pause", R"({"action":"now"})", "action");
  refused("/pause", R"({"export":7})", "export");
  CHECK(has(answer("/reboot", "{}"), "HTTP/1.1 404 "));
  CHECK(has(answer("/pause", R"({"export":"other"})"), "HTTP/1.1 404 "));
  CHECK(has(raw_exchange(served.path, "DELETE /status HTTP/1.1\r\nConnection: close\r\n\r\n"),
            "HTTP/1.1 405 "));
  CHECK(has(raw_exchange(served.path, "GET /status?x=1 HTTP/1.1\r\nConnection: close\r\n\r\n"),
            "HTTP/1.1 400 "));
  CHECK(served.only().verbs.empty());
  CHECK(served.only().requests.empty());
  CHECK(served.only().sets.empty());
}

TEST_CASE("control: what a client sends is bounded in size and in time") {
  ControlLimits limits;
  limits.idle = 1s;
  Served served({""}, limits);
  CHECK(has(raw_exchange(served.path, "\x01\x02garbage\r\n\r\n"), "HTTP/1.1 400 "));
  CHECK(has(raw_exchange(served.path, post_text("/migrate", std::string(70'000, ' '))),
            "HTTP/1.1 413 "));
  CHECK(has(raw_exchange(served.path, "GET /" + std::string(9'000, 'x')), "HTTP/1.1 431 "));
  CHECK(has(raw_exchange(served.path, post_text("/pause", R"({"export":)" + std::string(8, '[') +
                                                              std::string(8, ']') + "}")),
            "not JSON"));
  CHECK(has(raw_exchange(served.path, post_text("/migrate", R"({"uris":["nbd://h/)" +
                                                                std::string(2'000, 'x') + "\"]}")),
            "at most 1536 bytes"));
  CHECK(has(raw_exchange(served.path, post_text("/migrate", R"({"uris":["nbd://h/\u001b[2J"]})")),
            "no control characters"));
  // Half a request: closed without an answer.
  CHECK(raw_exchange(served.path, "POST /pause HTTP/1.1\r\nContent-Le").empty());
  ControlClient client(served.path, "status");
  CHECK(client.status().role == "owner");
}

TEST_CASE("control: who sends a request byte by byte is cut off in time") {
  ControlLimits limits;
  limits.idle = 1s;
  Served served({""}, limits);
  asio::io_context io;
  stream_protocol::socket socket(io);
  socket.connect(stream_protocol::endpoint(served.path));
  const auto begin = std::chrono::steady_clock::now();
  boost::system::error_code error;
  asio::write(socket, asio::buffer(std::string("GET /status HTTP/1.1\r\nX: ")), error);
  while (!error && std::chrono::steady_clock::now() - begin < 5s) {
    std::this_thread::sleep_for(20ms);
    asio::write(socket, asio::buffer("x", 1), error);
  }
  CHECK(error);
  CHECK(std::chrono::steady_clock::now() - begin < 3s);
}

TEST_CASE("control: other users are refused, whatever the socket's file allows") {
  Served served;
  std::filesystem::permissions(std::filesystem::path(served.path).parent_path(),
                               std::filesystem::perms(0711));
  std::filesystem::permissions(served.path, std::filesystem::perms(0666));
  std::string error;
  std::string answer;
  const bool tried = test::as_nobody([&] {
    error = error_of([&] { ControlClient(served.path, "pause").command(Verb::pause); });
    answer = raw_exchange(served.path, "GET /status HTTP/1.1\r\n\r\n");
  });
  if (!tried) return;
  CHECK(error == "pause: only root and the user that runs nbdferry serve may control it");
  CHECK(has(answer, "HTTP/1.1 403 "));
  CHECK(has(answer, "\r\n\r\n{\"error\":\"only root"));
  CHECK(served.only().verbs.empty());
  CHECK(ControlClient(served.path, "status").status().role == "owner");
}

TEST_CASE("control: no more connections than the limit") {
  ControlLimits limits;
  limits.connections = 2;
  Served served({""}, limits);
  ControlClient first(served.path, "status");
  ControlClient second(served.path, "status");
  CHECK(first.status().disk == "/disk");
  CHECK(second.status().disk == "/disk");
  ControlClient third(served.path, "status");
  CHECK(has(error_of([&] { (void)third.status(); }), "closed the connection"));
  CHECK(first.status().disk == "/disk");
}

TEST_CASE("control: of several exports the named one is asked") {
  Served served({"a", "b & c"});
  ControlClient client(served.path, "pause");
  CHECK(has(error_of([&] { client.command(Verb::pause); }), "say which export"));
  CHECK(has(error_of([&] { (void)client.status(); }), "say which export"));
  client.set_export("b & c");
  client.command(Verb::pause);
  CHECK(client.status().name == "b & c");
  CHECK(served.exports[0]->verbs.empty());
  CHECK(served.exports[1]->verbs.size() == 1);
  client.set_export("d");
  CHECK(has(error_of([&] { (void)client.status(); }), "no such export"));
}

TEST_CASE("control: a command that takes long is answered when it ends, others in between") {
  Served served;
  served.only().hold = true;
  std::string message;
  std::thread waiting(
      [&] { message = ControlClient(served.path, "verify").command(Verb::verify); });
  ControlClient other(served.path, "status");
  // Each status goes through the server's loop, so the held command becomes visible in the end.
  std::atomic<bool> arrived{false};
  for (int i = 0; i < 1000 && !arrived; ++i) {
    CHECK(other.status().role == "owner");
    asio::post(served.io, [&] { arrived = served.only().held != nullptr; });
    std::this_thread::sleep_for(1ms);
  }
  asio::post(served.io, [&] { std::exchange(served.only().held, nullptr)(true, "no difference"); });
  waiting.join();
  CHECK(message == "no difference");
}

TEST_CASE("control: stopping answers the command under way and drops idle connections") {
  auto served = std::make_unique<Served>();
  served->only().hold = true;
  ControlClient idle(served->path, "status");
  CHECK(idle.status().role == "owner");
  std::string message;
  std::thread waiting(
      [&] { message = ControlClient(served->path, "switch").command(Verb::switch_pivot); });
  std::atomic<bool> arrived{false};
  for (int i = 0; i < 1000 && !arrived; ++i) {
    asio::post(served->io, [&] { arrived = served->only().held != nullptr; });
    std::this_thread::sleep_for(1ms);
  }
  REQUIRE(arrived);
  asio::post(served->io, [&] {
    served->server->stop();
    std::exchange(served->only().held, nullptr)(true, "switched");
  });
  waiting.join();
  CHECK(message == "switched");
  CHECK(has(error_of([&] { (void)idle.status(); }), "closed the connection"));
  CHECK_FALSE(std::filesystem::exists(served->path));
}

TEST_CASE("control: the socket is its owner's alone; in use it is kept, stale it is replaced") {
  TempDir dir;
  const std::string path = dir / "c.sock";
  asio::io_context io{1};
  {
    FakeExport disk("");
    const ControlServer first(io, path, {&disk});
    struct stat status {};
    REQUIRE(::stat(path.c_str(), &status) == 0);
    CHECK((status.st_mode & 0777) == 0600);
    CHECK_THROWS_WITH(ControlServer(io, path, {&disk}), doctest::Contains("the socket is in use"));
    CHECK(std::filesystem::exists(path));
  }
  CHECK_FALSE(std::filesystem::exists(path));
  { stream_protocol::acceptor dead(io, stream_protocol::endpoint(path)); }
  REQUIRE(std::filesystem::exists(path));
  FakeExport disk("");
  CHECK_NOTHROW(ControlServer(io, path, {&disk}));

  const std::string file = dir / "file";
  std::ofstream(file) << "precious";
  CHECK_THROWS_WITH(ControlServer(io, file, {&disk}), doctest::Contains("not a socket"));
  CHECK(std::filesystem::file_size(file) == 8);
  CHECK_THROWS_WITH(ControlServer(io, dir / std::string(200, 'x').c_str(), {&disk}),
                    doctest::Contains("bytes"));
  CHECK_THROWS_WITH(ControlServer(io, dir / "absent/c.sock", {&disk}),
                    doctest::Contains("No such file"));
}

TEST_CASE("control: the client says why it can't reach a server") {
  TempDir dir;
  const auto failure = [](const std::string& path) {
    return error_of([&] { (void)ControlClient(path, "status").status(); });
  };
  CHECK(has(failure(dir / "absent"), "is nbdferry serve running?"));
  std::ofstream(dir / "file") << "x";
  CHECK(has(failure(dir / "file"), "cannot reach the control socket"));
  CHECK(has(failure(dir / std::string(200, 'x').c_str()), "cannot reach the control socket"));
}

}  // namespace nbdferry::proxy
