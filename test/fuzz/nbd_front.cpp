// The NBD server against any bytes: handshake and requests, in pieces of any size.
//
// The input's first byte chooses: from the greeting on, or behind a handshake with structured
// replies and a context; the export answers at once, later, or the client goes first. The second is
// the size of the pieces. Besides "no crash, no leak, no endless loop": every byte that the server
// sends belongs to a well-formed message, and nothing stays open when the client has gone.
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include <sys/socket.h>

#include "test/fuzz/fuzz.hpp"
#include "test/unit/proxy_nbd_fixture.hpp"

namespace nbdferry::fuzz {
namespace {

using namespace proxy;
using namespace proxy::test;
using Type = nbd::RequestType;

constexpr std::uint64_t disk_bytes = 256 * 1024;

void must(bool condition, const char* what) {
  if (condition) return;
  std::printf("\nfuzz: %s\n", what);
  std::fflush(stdout);
  std::abort();
}

std::string option(std::uint32_t number, const std::string& data) {
  return "IHAVEOPT" + wire(number) + wire(static_cast<std::uint32_t>(data.size())) + data;
}

std::string handshake() {
  const auto contexts =
      context_request("", {"base:allocation", "x-nbdferry:xxh3-low", "x-nbdferry:xxh3-high"});
  return wire(3U) + option(8, "") + option(10, contexts) + option(7, info_request(""));
}

// Takes whole messages off the front; what is left must be the start of one (the server may have
// been cut off).
void check_output(std::string_view output, bool structured) {
  if (output.size() < 18) return;
  must(output.substr(0, 16) == "NBDMAGICIHAVEOPT", "the greeting is wrong");
  output.remove_prefix(18);
  const auto has = [&](std::size_t bytes) { return output.size() >= bytes; };
  while (has(4)) {
    std::uint64_t size = 0;
    const auto magic = unwire<std::uint32_t>(output);
    if (magic == nbd::magic_option_reply >> 32) {
      if (!has(20)) return;
      size = 20 + std::uint64_t{unwire<std::uint32_t>(output.substr(16))};
      must(unwire<std::uint64_t>(output) == nbd::magic_option_reply, "wrong option reply");
    } else if (magic == nbd::magic_structured_reply) {
      if (!has(20)) return;
      must(structured, "a structured reply that was not negotiated");
      size = 20 + std::uint64_t{unwire<std::uint32_t>(output.substr(16))};
      must(unwire<std::uint16_t>(output.substr(4)) <= 1, "unknown reply flags");
    } else {
      must(magic == nbd::magic_simple_reply, "not a message");
      size = 16;
    }
    if (!has(size)) return;
    output.remove_prefix(size);
  }
}

class Scene {
 public:
  explicit Scene(MemoryFront::When when) : front_(io_, disk_bytes), server_(io_, {&front_}) {
    int ends[2];
    must(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0,
         "socketpair");
    client_ = UniqueFd(ends[0]);
    front_.when = when;
    front_.known_migration = "id";
    server_.serve(UniqueFd(ends[1]), "fuzz");
  }

  void say(std::string_view bytes) {
    while (!bytes.empty()) {
      const auto sent = ::send(client_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent > 0) bytes.remove_prefix(static_cast<std::size_t>(sent));
      if (sent < 0 && errno != EAGAIN) return;  // dropped: as it should be with garbage
      turn();
    }
  }

  void turn() {
    io_.restart();
    io_.poll();
    front_.release();
    char piece[65536];
    for (ssize_t got = 0; (got = ::recv(client_.get(), piece, sizeof piece, 0)) > 0;) {
      output_.append(piece, static_cast<std::size_t>(got));
    }
  }

  void leave() {
    turn();
    client_ = UniqueFd();
    turn();
    turn();
    must(server_.sessions() == 0, "a session outlives its client");
    must(front_.attached() == 0, "a session is closed but attached");
    must(front_.held.empty(), "a request outlives its session");
  }

  [[nodiscard]] const std::string& output() const { return output_; }

 private:
  boost::asio::io_context io_{1};
  MemoryFront front_;
  Server server_;
  UniqueFd client_;
  std::string output_;
};

}  // namespace

std::vector<std::vector<std::uint8_t>> seeds() {
  std::vector<std::vector<std::uint8_t>> all;
  const auto add = [&](char mode, char piece, const std::string& text) {
    std::vector<std::uint8_t> seed{static_cast<std::uint8_t>(mode),
                                   static_cast<std::uint8_t>(piece)};
    seed.insert(seed.end(), text.begin(), text.end());
    all.push_back(std::move(seed));
  };
  add(0, 0, handshake() + request_header(Type::read, 0, 4096) + request_header(Type::disc, 0, 0));
  add(0, 5, wire(3U) + option(3, "") + option(6, info_request("", {1, 2, 3})) + option(2, ""));
  add(0, 0,
      wire(3U) + option(8, "") + option(9, context_request("", {"base:", "x:"})) +
          option(10, context_request("", {"x-nbdferry:migration=id"})) + option(1, ""));
  std::string requests;
  for (const Type type :
       {Type::read, Type::trim, Type::cache, Type::write_zeroes, Type::block_status, Type::flush}) {
    requests += request_header(type, 4096, type == Type::flush ? 0 : 8192, 0, 77);
  }
  requests += request_header(Type::block_status, 100, 100'000, nbd::cmd_req_one, 78);
  for (const std::uint32_t length : {0U, 1U, 4096U, 20'000U}) {
    requests += request_header(Type::write, 512, length, 1) + std::string(length, 'w');
  }
  for (char mode = 1; mode < 8; ++mode) {
    add(mode, 0, requests + request_header(Type::disc, 0, 0));
    add(mode, 13, requests);
  }
  return all;
}

}  // namespace nbdferry::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace nbdferry::fuzz;
  using When = nbdferry::proxy::test::MemoryFront::When;
  if (size < 2 || size > 1 << 20) return 0;
  const unsigned mode = data[0];
  const std::size_t piece = data[1] == 0 ? size : data[1];
  const When when[] = {When::at_once, When::posted, When::held, When::held};
  Scene scene(when[(mode >> 1) % 4]);
  const bool negotiated = mode % 2 == 1;
  if (negotiated) scene.say(handshake());
  std::string_view input(reinterpret_cast<const char*>(data) + 2, size - 2);
  for (int pieces = 0; !input.empty(); ++pieces) {
    // The rest in one piece, after a while: a thousand tiny ones teach nothing new.
    const auto part = input.substr(0, pieces < 200 ? piece : input.size());
    scene.say(part);
    if (pieces % 4 != 3) scene.turn();
    input.remove_prefix(part.size());
  }
  scene.leave();
  // Without structured replies a stream can't be read without knowing the requests.
  if (negotiated) check_output(scene.output(), true);
  return 0;
}
