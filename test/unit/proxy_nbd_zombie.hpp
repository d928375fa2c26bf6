// Rule 8's front, as a scene: a connection with writes that the server hasn't read yet goes away, and
// its successor writes the same block. Which write is on the disk in the end?
#pragma once

#include <optional>
#include <string>

#include "test/unit/proxy_nbd_fixture.hpp"

namespace nbdferry::proxy::test {

// Who writes the block again: a connection that is made when the old one has gone, or another one
// of the same client's, open all along.
enum class Successor { newcomer, open_already };

// The byte that the disk holds: 'o' is the old client's unread write, 'n' its successor's.
// `disc`: the old client says good-bye behind its last write.
inline char survivor_of_two_clients(bool over_tcp, bool disc,
                                    Successor successor = Successor::newcomer) {
  using Type = nbd::RequestType;
  ServerThread server(1 << 20);
  // Held: the first client reaches its limit, and what it sends after that stays unread.
  server.on_loop([&] { return server.front.when = MemoryFront::When::held; });
  const auto connect = [&] {
    RawClient client =
        over_tcp ? RawClient::tcp(server.port()) : RawClient::unix_socket(server.path());
    client.go();
    return client;
  };
  constexpr std::size_t limit = 256;
  RawClient old_client = connect();
  std::optional<RawClient> new_client;
  if (successor == Successor::open_already) new_client = connect();
  std::string unread;
  for (std::size_t i = 0; i < limit; ++i) unread += request_header(Type::read, 4096, 512);
  unread += request_header(Type::write, 0, 512) + std::string(512, 'o');
  if (disc) unread += request_header(Type::disc, 0, 0);
  old_client.send(unread);
  if (!server.eventually([&] { return server.front.held.size() == limit; })) return '?';
  old_client.shut_down_sending();
  // Closed while nothing waits to be read: TCP would reset the connection and drop the rest.
  old_client.close();

  if (!new_client) new_client = connect();
  new_client->send_request(Type::write, 0, 512, 0, std::string(512, 'n'));
  const auto arrived = [&] {
    return server.front.held.back().command == Command::write &&
           session_of(server.front.held.back().id) == 2;
  };
  if (!server.eventually(arrived)) return '?';
  server.on_loop([&] {
    server.front.when = MemoryFront::When::at_once;
    server.front.release();
    return 0;
  });
  if (new_client->reply().error != 0) return '?';
  // Whatever the server still does for the old client is done when its session has gone.
  if (!server.eventually([&] { return server.server->sessions() == 1; })) return '?';
  return server.on_loop([&] { return static_cast<char>(server.front.data[0]); });
}

}  // namespace nbdferry::proxy::test
