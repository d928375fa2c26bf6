// Real clients against the NBD server: libnbd, nbdinfo, nbdcopy, qemu-img, qemu-io, fio.
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <random>

#include <doctest/doctest.h>
#include <libnbd.h>

#include "test/unit/proxy_nbd_fixture.hpp"

namespace nbdferry::proxy::test {
namespace {

constexpr std::uint64_t size = 64ULL << 20;

// Random data, holes in between.
void fill(ServerThread& server) {
  server.on_loop([&] {
    std::mt19937 random(1);
    for (std::uint64_t at = 0; at < size; at += 1 << 20) {
      if (random() % 2 == 0) continue;
      std::generate_n(server.front.data.begin() + static_cast<std::ptrdiff_t>(at), 1 << 20,
                      [&] { return static_cast<std::byte>(random()); });
    }
    return 0;
  });
}

class TempFile {
 public:
  TempFile() {
    std::string pattern = "/tmp/nbdferry-test-XXXXXX";
    ::close(::mkstemp(pattern.data()));
    path = pattern;
  }
  ~TempFile() { ::unlink(path.c_str()); }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;
  std::string path;
};

bool holds(ServerThread& server, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return server.on_loop([&] {
    return bytes.size() == size && std::memcmp(bytes.data(), server.front.data.data(), size) == 0;
  });
}

void check_command(const std::string& command) {
  const CommandResult result = run_command(command);
  CAPTURE(command);
  CAPTURE(result.output);
  CHECK(result.status == 0);
}

struct CloseNbd {
  void operator()(nbd_handle* nbd) const { nbd_close(nbd); }
};

int add_extents(void* to, const char* /*context*/, std::uint64_t /*offset*/, std::uint32_t* entries,
                std::size_t count, int* /*error*/) {
  auto& all = *static_cast<std::vector<std::uint32_t>*>(to);
  all.insert(all.end(), entries, entries + count);
  return 0;
}

}  // namespace

TEST_CASE("libnbd: flags, all commands, disconnect") {
  ServerThread server(size, "disk");
  for (const bool structured : {false, true}) {
    CAPTURE(structured);
    std::unique_ptr<nbd_handle, CloseNbd> nbd(nbd_create());
    nbd_set_request_structured_replies(nbd.get(), structured);
    nbd_add_meta_context(nbd.get(), LIBNBD_CONTEXT_BASE_ALLOCATION);
    REQUIRE(nbd_connect_uri(nbd.get(), server.uri("disk").c_str()) == 0);
    CHECK(nbd_get_size(nbd.get()) == size);
    CHECK(nbd_can_flush(nbd.get()) == 1);
    CHECK(nbd_can_fua(nbd.get()) == 1);
    CHECK(nbd_can_trim(nbd.get()) == 1);
    CHECK(nbd_can_zero(nbd.get()) == 1);
    CHECK(nbd_can_fast_zero(nbd.get()) == 1);
    CHECK(nbd_can_cache(nbd.get()) == 1);
    CHECK(nbd_can_multi_conn(nbd.get()) == 1);
    CHECK(nbd_can_df(nbd.get()) == (structured ? 1 : 0));
    CHECK(nbd_is_read_only(nbd.get()) == 0);
    CHECK(nbd_get_block_size(nbd.get(), LIBNBD_SIZE_MAXIMUM) == 32 << 20);
    const std::string data(100'000, 'd');
    std::string back(data.size(), '\0');
    CHECK(nbd_pwrite(nbd.get(), data.data(), data.size(), 5000, LIBNBD_CMD_FLAG_FUA) == 0);
    CHECK(nbd_pread(nbd.get(), back.data(), back.size(), 5000, 0) == 0);
    CHECK(back == data);
    CHECK(nbd_flush(nbd.get(), 0) == 0);
    CHECK(nbd_cache(nbd.get(), 4096, 0, 0) == 0);
    CHECK(nbd_zero(nbd.get(), 4096, 8192, LIBNBD_CMD_FLAG_NO_HOLE) == 0);
    CHECK(nbd_trim(nbd.get(), size - 200'000, 200'000, 0) == 0);
    if (structured) {
      std::vector<std::uint32_t> entries;
      CHECK(nbd_block_status(nbd.get(), 1 << 20, 0, {add_extents, &entries, nullptr}, 0) == 0);
      // The data written, without the zeroes inside; pages are the extents' unit.
      CHECK(entries == std::vector<std::uint32_t>{4096, 3, 4096, 0, 4096, 3, 94208, 0,
                                                  (1 << 20) - 106'496, 3});
    }
    nbd_set_strict_mode(nbd.get(), 0);
    CHECK(nbd_pwrite(nbd.get(), data.data(), data.size(), size - 1, 0) == -1);
    CHECK(nbd_get_errno() == ENOSPC);
    CHECK(nbd_shutdown(nbd.get(), 0) == 0);
  }
  CHECK(server.eventually([&] { return server.server->sessions() == 0; }));
}

TEST_CASE("nbdinfo") {
  ServerThread server(size, "disk");
  const auto info = run_command("nbdinfo --json \"" + server.uri("disk") + "\"");
  CAPTURE(info.output);
  CHECK(info.status == 0);
  CHECK(info.output.find("\"export-size\": 67108864") != info.output.npos);
  CHECK(info.output.find("\"protocol\": \"newstyle-fixed\"") != info.output.npos);
  CHECK(info.output.find("\"description\": \"a disk in memory\"") != info.output.npos);
  CHECK(info.output.find("\"base:allocation\"") != info.output.npos);
  CHECK(run_command("nbdinfo --list \"" + server.uri() + "\"").output.find("disk") !=
        std::string::npos);
  CHECK(run_command("nbdinfo --map \"" + server.uri() + "\"").output.find("hole,zero") !=
        std::string::npos);
  CHECK(run_command("nbdinfo \"" + server.uri("other") + "\"").status != 0);
}

TEST_CASE("nbdcopy, both ways, with many connections") {
  ServerThread server(size);
  fill(server);
  TempFile file;
  const std::string nbdcopy = "nbdcopy --connections=4 --requests=32 ";
  check_command(nbdcopy + "\"" + server.uri() + "\" " + file.path);
  CHECK(holds(server, file.path));
  ServerThread target(size);
  check_command(nbdcopy + file.path + " \"" + target.uri() + "\"");
  CHECK(holds(target, file.path));
  check_command("nbdcopy \"" + target.uri() +
                "\" nbd://127.0.0.1:" + std::to_string(server.port()));
  CHECK(holds(server, file.path));
}

TEST_CASE("qemu-img convert and compare, qemu-io") {
  ServerThread server(size);
  fill(server);
  TempFile file;
  const std::string nbd = "nbd:unix:" + server.path();
  check_command("qemu-img convert -f raw -O raw " + nbd + " " + file.path);
  CHECK(holds(server, file.path));
  check_command("qemu-img compare -f raw -F raw " + nbd + " " + file.path);
  ServerThread target(size);
  check_command("qemu-img convert -n -f raw -O raw " + file.path + " nbd:unix:" + target.path());
  CHECK(holds(target, file.path));
  const auto io = run_command(
      "qemu-io -f raw -c \"write -P 7 512 100k\" -c \"read -P 7 512 100k\" -c \"write -z 4k 8k\" "
      "-c \"read -P 0 4k 8k\" -c \"discard 1M 1M\" -c \"write -f -P 9 3M 5M\" -c flush "
      "-c \"read -P 9 3M 5M\" " +
      nbd);
  CAPTURE(io.output);
  CHECK(io.status == 0);
  CHECK(io.output.find("fail") == io.output.npos);
  CHECK(io.output.find("rror") == io.output.npos);
}

TEST_CASE("fio writes and verifies") {
  ServerThread server(size);
  for (const auto when : {MemoryFront::When::at_once, MemoryFront::When::posted}) {
    server.on_loop([&] { return server.front.when = when; });
    check_command("cd /tmp && fio --name=v --ioengine=nbd --uri=\"" + server.uri() +
                  "\" --rw=randwrite --bssplit=512/20:4k/60:64k/20 --size=32M --iodepth=32 "
                  "--verify=crc32c --verify_fatal=1 --verify_state_save=0");
  }
}

}  // namespace nbdferry::proxy::test
