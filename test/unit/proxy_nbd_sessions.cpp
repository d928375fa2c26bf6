// Clients that come, go, stall and misbehave: limits, disconnects, rule 8's front, stopping.
#include <algorithm>
#include <chrono>
#include <fstream>

#include <doctest/doctest.h>

#include "mirror/assert.hpp"
#include "proxy/limits.hpp"
#include "test/unit/proxy_nbd_fixture.hpp"
#include "test/unit/proxy_nbd_zombie.hpp"

namespace nbdferry::proxy::test {
namespace {

using Type = nbd::RequestType;
using When = MemoryFront::When;

constexpr std::uint64_t size = 64ULL << 20;

RawClient client_of(ServerThread& server) {
  RawClient client = RawClient::unix_socket(server.path());
  client.go();
  return client;
}

void set(ServerThread& server, When when) {
  server.on_loop([&] { return server.front.when = when; });
}

std::size_t held(ServerThread& server) {
  return server.on_loop([&] { return server.front.held.size(); });
}

}  // namespace

TEST_CASE("DISC: outstanding requests are answered, then the connection closes") {
  ServerThread server(size);
  set(server, When::held);
  RawClient client = client_of(server);
  client.send_request(Type::write, 0, 3, 0, "abc", 1);
  client.send_request(Type::read, 0, 3, 0, "", 2);
  client.send_request(Type::disc, 0, 0);
  client.send("after DISC there is nothing to be read");
  REQUIRE(server.eventually([&] { return server.front.held.size() == 2; }));
  CHECK(server.on_loop([&] { return server.server->sessions(); }) == 1);
  server.on_loop([&] {
    server.front.release();
    return 0;
  });
  CHECK(client.reply().cookie == 1);
  CHECK(client.reply(3).body == "abc");
  CHECK(client.is_closed());
  CHECK(server.eventually([&] { return server.front.attached() == 0; }));
}

TEST_CASE("a client that vanishes in the middle of a request leaves nothing behind") {
  ServerThread server(size);
  const std::string large = request_header(Type::write, 0, 1 << 20) + std::string(100'000, 'x');
  const std::string small = request_header(Type::write, 0, 4096) + std::string(4095, 'x');
  for (const auto& part : {large, small, small.substr(0, 27), small.substr(0, 1)}) {
    for (const bool tcp : {false, true}) {
      RawClient client =
          tcp ? RawClient::tcp(server.port()) : RawClient::unix_socket(server.path());
      client.go();
      client.send(part);
    }
  }
  CHECK(server.eventually([&] { return server.front.attached() == 0; }));
  CHECK(server.on_loop([&] { return server.front.seen.size(); }) == 0);
}

TEST_CASE("a client that vanishes with requests outstanding: late answers go nowhere") {
  ServerThread server(size);
  set(server, When::held);
  {
    RawClient client = client_of(server);
    for (int i = 0; i < 20; ++i) client.send_request(Type::read, 0, 512 * 1024);
    REQUIRE(server.eventually([&] { return server.front.held.size() == 20; }));
  }
  CHECK(server.eventually([&] { return server.server->sessions() == 0; }));
  server.on_loop([&] {
    server.front.release();
    return 0;
  });
  set(server, When::at_once);
  RawClient client = client_of(server);
  CHECK(client.ask(Type::read, 0, 512).error == 0);
}

TEST_CASE("requests in flight are bounded in number and in bytes") {
  ServerThread server(size);
  set(server, When::held);
  SUBCASE("number") {
    RawClient client = client_of(server);
    std::string requests;
    for (int i = 0; i < 1000; ++i) requests += request_header(Type::trim, 0, 512);
    client.send(requests);
    REQUIRE(server.eventually([&] { return server.front.held.size() == 256; }));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(held(server) == limits::requests_in_flight_max);
    set(server, When::at_once);
    server.on_loop([&] {
      server.front.release();
      return 0;
    });
    for (int i = 0; i < 1000; ++i) CHECK(client.reply().error == 0);
  }
  SUBCASE("bytes") {
    RawClient client = client_of(server);
    constexpr auto quarter = static_cast<std::uint32_t>(limits::bytes_in_flight_max / 4);
    for (int i = 0; i < 20; ++i) client.send_request(Type::read, 0, quarter);
    REQUIRE(server.eventually([&] { return server.front.held.size() == 4; }));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(held(server) == 4);
  }
}

TEST_CASE("the bytes in flight are bounded over all clients, and each has its part") {
  ServerThread server(size);
  set(server, When::held);
  constexpr std::size_t count = 8;
  constexpr std::uint64_t mib = 1 << 20;
  constexpr std::size_t part = limits::bytes_in_flight_max / count / mib;
  std::vector<RawClient> clients;
  for (std::size_t i = 0; i < count; ++i) clients.push_back(client_of(server));
  for (auto& client : clients) {
    for (std::size_t i = 0; i < 2 * part; ++i) client.send_request(Type::read, 0, mib, 0, "", i);
  }
  REQUIRE(server.eventually([&] { return server.front.held.size() == count * part; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK(held(server) == count * part);
  SUBCASE("all go on when replies are taken") {
    set(server, When::at_once);
    server.on_loop([&] {
      server.front.release();
      return 0;
    });
    for (std::size_t i = 0; i < 2 * part; ++i) {
      for (auto& client : clients) CHECK(client.reply(mib).cookie == i);
    }
  }
  SUBCASE("one request alone passes, however large and whatever the others hold") {
    RawClient late = client_of(server);
    late.send_request(Type::read, 0, 32 * mib);
    CHECK(server.eventually([&] { return server.front.held.size() == count * part + 1; }));
  }
  SUBCASE("who is left has more") {
    clients.erase(clients.begin() + 1, clients.end());
    const auto to_one = [&] {
      const auto first = [](const auto& request) { return session_of(request.id) == 1; };
      return std::count_if(server.front.seen.begin(), server.front.seen.end(), first);
    };
    server.on_loop([&] {
      server.front.release();
      return 0;
    });
    for (std::size_t i = 0; i < part; ++i) CHECK(clients[0].reply(mib).cookie == i);
    clients[0].send_request(Type::read, 0, mib);
    // Its second half and that one more, none of which has been answered.
    CHECK(server.eventually([&] { return to_one() == 2 * part + 1; }));
  }
}

TEST_CASE("the answers to BLOCK_STATUS count among the bytes in flight") {
  ServerThread server(size);
  set(server, When::held);
  constexpr std::size_t count = 16;
  constexpr std::size_t part =
      limits::bytes_in_flight_max / count / (limits::extents_max * std::size_t{8});
  static_assert(part < limits::requests_in_flight_max);
  std::vector<RawClient> clients;
  for (std::size_t i = 0; i < count; ++i) {
    clients.push_back(RawClient::unix_socket(server.path()));
    clients.back().go(true, {"base:allocation"});
  }
  for (std::size_t i = 0; i < 2 * part; ++i) {
    clients[0].send_request(Type::block_status, 0, 4096, 0, "", i);
  }
  REQUIRE(server.eventually([&] { return server.front.held.size() == part; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK(held(server) == part);
  set(server, When::at_once);
  server.on_loop([&] {
    server.front.release();
    return 0;
  });
  for (std::size_t i = 0; i < 2 * part; ++i) CHECK(clients[0].reply().cookie == i);
}

TEST_CASE("a client that never reads its replies holds bounded memory and hinders nobody") {
  ServerThread server(size);
  server.on_loop([&] { return server.front.keep_seen = false; });
  RawClient deaf = RawClient::tcp(server.port());
  deaf.go();
  const auto rss_kib = [] {
    std::ifstream status("/proc/self/statm");
    std::uint64_t total = 0, resident = 0;
    status >> total >> resident;
    return resident * 4;
  };
  const auto before = rss_kib();
  // Asks for 2 GiB and takes none of it, until the server has stopped reading.
  std::string requests;
  for (int i = 0; i < 2048; ++i) requests += request_header(Type::read, 0, 1 << 20);
  deaf.send(requests);
  RawClient other = client_of(server);
  for (int i = 0; i < 100; ++i) CHECK(other.ask(Type::read, 0, 4096).error == 0);
  CHECK(rss_kib() - before < 80 * 1024);
  deaf.close();
  CHECK(server.eventually([&] { return server.server->sessions() == 1; }));
}

TEST_CASE("connections are bounded, and room comes back") {
  ServerThread server(size);
  std::vector<RawClient> clients;
  for (std::size_t i = 0; i < limits::connections_max; ++i) clients.push_back(client_of(server));
  RawClient excess = RawClient::unix_socket(server.path());
  CHECK(excess.is_closed());
  CHECK(clients.back().ask(Type::read, 0, 512).error == 0);
  clients.clear();
  RawClient again = client_of(server);
  CHECK(again.ask(Type::read, 0, 512).error == 0);
}

TEST_CASE("a handshake that never ends is cut off after ten seconds") {
  ServerThread server(size);
  RawClient idle = RawClient::unix_socket(server.path());
  RawClient busy = RawClient::unix_socket(server.path());
  RawClient in_use = client_of(server);
  busy.greet();
  const auto begin = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  try {
    while (elapsed() < 20) {
      (void)busy.option(3);
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
  } catch (const std::runtime_error&) {  // closed
  }
  CHECK(elapsed() > 9);
  CHECK(elapsed() < 12);
  CHECK(server.eventually([&] { return server.server->sessions() == 1; }));
  CHECK(in_use.ask(Type::read, 0, 512).error == 0);
}

TEST_CASE("fence drops a connection at once, with what it has sent") {
  ServerThread server(size);
  set(server, When::held);
  RawClient client = client_of(server);
  client.send_request(Type::write, 0, 4096, 0, std::string(4096, 'x'));
  REQUIRE(server.eventually([&] { return server.front.held.size() == 1; }));
  server.on_loop([&] {
    server.front.fence_all();
    server.front.release();
    return 0;
  });
  CHECK(client.is_closed());
  CHECK(server.eventually([&] { return server.front.attached() == 0; }));
  CHECK(server.on_loop([&] { return server.front.seen.size(); }) == 1);
}

TEST_CASE("stopping: outstanding requests are answered, no new ones taken, then all is closed") {
  ServerThread server(size);
  set(server, When::held);
  RawClient client = client_of(server);
  RawClient idle = client_of(server);
  RawClient negotiating = RawClient::unix_socket(server.path());
  negotiating.greet();
  client.send_request(Type::write, 0, 3, 0, "abc", 5);
  REQUIRE(server.eventually([&] { return server.front.held.size() == 1; }));
  bool done = false;
  server.on_loop([&] {
    server.server->stop();
    server.server->close_sessions([&] { done = true; });
    return 0;
  });
  CHECK(idle.is_closed());
  CHECK(negotiating.is_closed());
  CHECK_THROWS(RawClient::unix_socket(server.path()));
  CHECK_FALSE(server.on_loop([&] { return done; }));
  server.on_loop([&] {
    server.front.release();
    return 0;
  });
  CHECK(client.reply().cookie == 5);
  CHECK(client.is_closed());
  CHECK(server.eventually([&] { return done; }));
}

TEST_CASE("rule 8: what a lost connection left unread never follows its successor's write") {
  for (const auto successor : {Successor::newcomer, Successor::open_already}) {
    for (const bool tcp : {false, true}) {
      CAPTURE(tcp);
      CHECK(survivor_of_two_clients(tcp, false, successor) == 'n');
      // With DISC the old write counts, in its place: before the new one.
      CHECK(survivor_of_two_clients(tcp, true, successor) == 'n');
    }
  }
}

#ifdef NBDFERRY_MUTANTS
TEST_CASE("rule 8: the front's mutant is caught") {
  for (const auto successor : {Successor::newcomer, Successor::open_already}) {
    for (const bool tcp : {false, true}) {
      active_mutant = "front_keeps_unparsed";
      CHECK(survivor_of_two_clients(tcp, false, successor) == 'o');
      active_mutant = nullptr;
    }
  }
}
#endif

TEST_CASE("rule 8: an orderly client's last words are all admitted when its successor comes") {
  ServerThread server(size);
  set(server, When::held);
  {
    RawClient old_client = client_of(server);
    std::string unread;
    for (int i = 0; i < 300; ++i) {
      unread += request_header(Type::write, i * 512U, 512) + std::string(512, 'o');
    }
    // The last one is large: its payload is received in place.
    unread += request_header(Type::write, 1 << 20, 50'000) + std::string(50'000, 'L');
    unread += request_header(Type::read, 0, 512) + request_header(Type::disc, 0, 0);
    old_client.send(unread);
    REQUIRE(server.eventually([&] { return server.front.held.size() == 256; }));
  }
  RawClient new_client = client_of(server);
  CHECK(held(server) == 301);
  set(server, When::at_once);
  server.on_loop([&] {
    server.front.release();
    return 0;
  });
  CHECK(server.eventually([&] { return server.server->sessions() == 1; }));
  CHECK(new_client.ask(Type::read, 299 * 512, 512).error == 0);
  CHECK(server.on_loop([&] { return server.front.data[(1 << 20) + 49'999]; }) == std::byte{'L'});
}

TEST_CASE("a socket in use is refused, a stale one replaced") {
  ServerThread server(size);
  boost::asio::io_context io;
  MemoryFront front(io, size);
  const std::string path = server.path() + "2";
  Server other(io, {&front});
  CHECK_THROWS_WITH_AS(other.listen_unix(server.path()), doctest::Contains("in use"),
                       std::runtime_error);
  CHECK_THROWS_AS(other.listen_tcp("127.0.0.1", server.port()), std::runtime_error);
  CHECK_THROWS_AS(other.listen_tcp("no.such.host.invalid", 0), std::runtime_error);
  REQUIRE(run_command("python3 -c \"import socket; socket.socket(1).bind(\\\"" + path + "\\\")\"")
              .status == 0);
  CHECK_NOTHROW(other.listen_unix(path));
}

}  // namespace nbdferry::proxy::test
