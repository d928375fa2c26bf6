// The target against real servers: every command, each server's peculiarities, loss and return.
#include <cstring>
#include <fstream>
#include <string>

#include "transport_harness.hpp"

#include <doctest/doctest.h>

namespace nbdferry::test {

namespace {

constexpr std::uint64_t mib = 1024 * 1024;

bool all_bytes(const Payload& p, char value) {
  for (const auto b : p.bytes()) {
    if (b != static_cast<std::byte>(value)) return false;
  }
  return !p.empty();
}

// Every command once, on a disk of at least 4 MiB of zeroes.
void exercise(Driver& d) {
  auto w = make_op(Command::write, mib, 65536);
  w.payload = filled(65536, 'x');
  CHECK(d.call(w).error == IoError::none);
  w = make_op(Command::write, mib + 65536, 4096);
  w.payload = filled(4096, 'y');
  w.fua = true;
  CHECK(d.call(w).error == IoError::none);
  CHECK(d.call(make_op(Command::flush)).error == IoError::none);

  auto r = d.call(make_op(Command::read, mib, 65536));
  CHECK(r.error == IoError::none);
  CHECK(r.data.size() == 65536);
  CHECK(all_bytes(r.data, 'x'));
  CHECK(all_bytes(d.call(make_op(Command::read, mib + 65536, 4096)).data, 'y'));

  auto z = make_op(Command::zero, mib, 32768);
  z.as_data = !d.info.can_zero;
  CHECK(d.call(z).error == IoError::none);
  z = make_op(Command::zero, mib + 32768, 4096);
  z.may_hole = false;
  z.as_data = !d.info.can_zero;
  CHECK(d.call(z).error == IoError::none);
  CHECK(all_bytes(d.call(make_op(Command::read, mib, 36864)).data, 0));
  CHECK(all_bytes(d.call(make_op(Command::read, mib + 36864, 4096)).data, 'x'));

  CHECK(d.call(make_op(Command::cache, 0, 4096)).error == IoError::none);
  const auto trimmed = d.call(make_op(Command::trim, mib, 4096)).error;
  CHECK(trimmed == (d.info.can_trim ? IoError::none : IoError::not_supported));

  const auto status = d.call(make_op(Command::block_status, mib, 2 * mib));
  CHECK(status.error == IoError::none);
  std::uint64_t covered = 0;
  for (const auto& e : status.extents) covered += e.length;
  CHECK(covered > 0);
  CHECK(covered <= 2 * mib);
}

void close(Driver& d) {
  d.target->close();
  CHECK(d.until([&] { return d.count("closed") == 1; }));
}

std::vector<std::string> nbdkit(const std::vector<std::string>& args) {
  std::vector<std::string> command = {"nbdkit", "-f"};
  command.insert(command.end(), args.begin(), args.end());
  return command;
}

}  // namespace

TEST_CASE("nbdkit memory over TCP: all commands, four connections") {
  Listener listener;
  const auto uri = listener.uri();
  Process server(nbdkit({"memory", "8M"}), &listener);
  Driver d(uri, 8 * mib);
  REQUIRE(d.open());
  CHECK(d.info.size == 8 * mib);
  CHECK(d.info.can_flush);
  CHECK(d.info.can_fua);
  CHECK(d.info.can_zero);
  CHECK(d.info.can_trim);
  CHECK(d.info.has_allocation);
  CHECK_FALSE(d.info.read_only);
  CHECK(d.until([&] { return d.connections() == 4; }));
  CHECK(d.window_ops > 4);
  // A fresh memory disk says that all of it is a hole that reads as zeroes: one extent.
  const auto status = d.call(make_op(Command::block_status, 0, 8 * mib));
  REQUIRE(status.extents.size() == 1);
  CHECK(status.extents[0] == Extent{8 * mib, true, true});
  exercise(d);
  const auto path = d.target->paths().front();
  CHECK(path.state == "up");
  CHECK(path.sent_bytes == 65536 + 4096);
  CHECK(path.rtt_us > 0);
  CHECK_FALSE(path.nbdferry);
  close(d);
}

TEST_CASE("nbdkit file over a unix socket") {
  TempDir dir;
  const auto socket = dir.path("s");
  Process server(nbdkit({"-U", socket, "file", dir.file("disk", 8 * mib)}));
  REQUIRE(wait_for_socket(socket));
  Driver d("nbd+unix:///?socket=" + socket, 8 * mib);
  REQUIRE(d.open());
  exercise(d);
  const auto status = d.call(make_op(Command::block_status, 0, 8 * mib));
  REQUIRE(status.extents.size() >= 3);  // hole, data, hole: how large is the file system's affair
  CHECK(status.extents[0].zero);
  CHECK(status.extents[0].length >= mib);
  CHECK_FALSE(status.extents[1].zero);
  close(d);
  std::ifstream file(dir.path("disk"));
  file.seekg(mib + 65536);
  CHECK(file.get() == 'y');
}

TEST_CASE("qemu-nbd: all commands") {
  TempDir dir;
  const auto socket = dir.path("s");
  Process server({"qemu-nbd", "-t", "-f", "raw", "-e", "8", "-x", "vm disk", "-k", socket,
                  "--discard=unmap", dir.file("disk", 8 * mib)});
  REQUIRE(wait_for_socket(socket));
  Driver d("nbd+unix:///vm%20disk?socket=" + socket, 8 * mib);
  REQUIRE(d.open());
  CHECK(d.until([&] { return d.connections() == 4; }));
  exercise(d);
  close(d);
}

TEST_CASE("nbd-server: all commands, extents unknown") {
  TempDir dir;
  const auto socket = dir.path("s");
  std::ofstream(dir.path("conf")) << "[generic]\nunixsock = " << socket
                                  << "\nallowlist = true\n[disk]\nexportname = "
                                  << dir.file("disk", 8 * mib) << "\nflush = true\n";
  // In the foreground it serves a single client and nothing else: hence as a daemon.
  // It listens before it writes its pid. A connection to try that would do harm: when the child for that
  // ends just as the next one comes, nbd-server 3.24 does not notice that for a while.
  Daemon server({"nbd-server", "-C", dir.path("conf"), "-p", dir.path("pid")}, dir.path("pid"));
  Driver d("nbd+unix:///disk?socket=" + socket, 8 * mib);
  REQUIRE_MESSAGE(d.open(), d.reason);
  CHECK(d.info.can_flush);
  CHECK_FALSE(d.info.can_fua);
  CHECK_FALSE(d.info.has_allocation);
  exercise(d);
  const auto status = d.call(make_op(Command::block_status, 0, 8 * mib));
  REQUIRE(status.extents.size() == 1);
  CHECK(status.extents[0] == Extent{8 * mib, false, false});
  close(d);
}

TEST_CASE("a server without multi-conn gets one connection, whatever was asked for") {
  Listener listener;
  transport::TargetConfig config;
  config.uris = {listener.uri()};
  config.connections = 8;
  Process server(nbdkit({"--filter=multi-conn", "memory", "8M", "multi-conn-mode=disable"}),
                 &listener);
  Driver d(config);
  REQUIRE(d.open());
  exercise(d);
  d.run_for(200ms);
  CHECK(d.connections() == 1);
}

TEST_CASE("block-size limits are learnt") {
  Listener listener;
  const auto uri = listener.uri();
  Process server(
      nbdkit({"--filter=blocksize-policy", "memory", "8M", "blocksize-minimum=4096",
              "blocksize-preferred=65536", "blocksize-maximum=1M", "blocksize-error-policy=error"}),
      &listener);
  Driver d(uri);
  REQUIRE(d.open());
  CHECK(d.info.block_min == 4096);
  CHECK(d.info.payload_max == mib);
  // What doesn't fit is sent all the same: the server's answer, not libnbd's, counts.
  CHECK(d.call(make_op(Command::read, 512, 512)).error == IoError::invalid);
  CHECK(d.call(make_op(Command::read, 4096, 4096)).error == IoError::none);
}

TEST_CASE("a server without WRITE_ZEROES") {
  Listener listener;
  const auto uri = listener.uri();
  Process server(nbdkit({"--filter=nozero", "--filter=noextents", "memory", "8M"}), &listener);
  Driver d(uri);
  REQUIRE(d.open());
  CHECK_FALSE(d.info.can_zero);
  exercise(d);
  // Zeroes travelled as data, and are counted so.
  CHECK(d.target->paths().front().sent_bytes == 65536 + 4096 + 32768 + 4096);
}

TEST_CASE("an error that the server answered is that error, and the connection lives on") {
  TempDir dir;
  Listener listener;
  const auto uri = listener.uri();
  Process server(nbdkit({"--filter=error", "memory", "8M", "error-pwrite=ENOSPC",
                         "error-pwrite-rate=100%", "error-pwrite-file=" + dir.path("on")}),
                 &listener);
  Driver d(uri);
  REQUIRE(d.open());
  dir.file("on", 0);
  auto w = make_op(Command::write, 0, 4096);
  w.payload = filled(4096, 'x');
  CHECK(d.call(w).error == IoError::no_space);
  CHECK(d.call(make_op(Command::read, 0, 4096)).error == IoError::none);
  CHECK(d.count("lost") == 0);
}

TEST_CASE("kill -9 with requests in flight: all lost, TargetLost, and back when it returns") {
  Listener listener;
  const auto port = listener.port();
  const auto uri = listener.uri();
  const auto command = nbdkit({"--filter=delay", "memory", "8M", "wdelay=5"});
  Process server(command, &listener);
  Driver d(uri, 8 * mib);
  REQUIRE(d.open());
  REQUIRE(d.until([&] { return d.connections() == 4; }));
  std::vector<OpId> ids;
  for (std::uint64_t i = 0; i < 32; ++i) ids.push_back(d.write(i * 65536, 65536, 'x'));
  d.run_for(100ms);
  server.kill();
  CHECK(d.until([&] { return d.count("lost") == 1; }));
  for (const auto id : ids) {
    REQUIRE(d.done(id) != nullptr);
    CHECK(d.done(id)->error == IoError::lost);
  }
  CHECK(d.connections() == 0);
  CHECK(d.target->paths().front().state == "down");
  // Meanwhile everything is lost at once.
  CHECK(d.call(make_op(Command::read, 0, 4096)).error == IoError::lost);

  Listener again(port);
  Process restarted(nbdkit({"memory", "16M"}), &again);
  CHECK(d.until([&] { return d.count("up") == 2; }));
  CHECK(d.info.size == 16 * mib);
  CHECK(d.until([&] { return d.connections() == 4; }));
  CHECK(d.call(make_op(Command::read, 0, 4096)).error == IoError::none);
  CHECK(d.count("lost") == 1);
}

TEST_CASE("a target that comes back smaller is refused, and may be opened again") {
  Listener listener;
  const auto port = listener.port();
  const auto uri = listener.uri();
  Process server(nbdkit({"memory", "8M"}), &listener);
  Driver d(uri, 8 * mib);
  REQUIRE(d.open());
  server.kill();
  REQUIRE(d.until([&] { return d.count("lost") == 1; }));
  Listener again(port);
  Process smaller(nbdkit({"memory", "4M"}), &again);
  CHECK(d.until([&] { return d.count("refused") == 1; }));
  CHECK(d.reason.find("4194304 bytes, 8388608 needed") != std::string::npos);
  smaller.kill();
  Listener third(port);
  Process right(nbdkit({"memory", "8M"}), &third);
  CHECK(d.open());
}

TEST_CASE("refused at the first attempt, with the reason") {
  const auto refusal = [](const std::string& uri, std::uint64_t size = 0) {
    Driver d(uri, size);
    CHECK_FALSE(d.open());
    MESSAGE(d.reason);
    CHECK(d.reason.starts_with(uri + ": "));
    CHECK(d.reason.find('\n') == std::string::npos);
    CHECK(d.log == std::vector<std::string>{"refused"});
    close(d);
    return d.reason;
  };
  Listener listener;
  auto uri = listener.uri();
  SUBCASE("unreachable") {
    listener.close();
    CHECK(refusal(uri).find("Connection refused") != std::string::npos);
    CHECK(refusal("nbd+unix:///?socket=/nonexistent/s").find("No such file") != std::string::npos);
  }
  SUBCASE("unknown host") {
    CHECK(refusal("nbd://host.invalid/").find("cannot find host 'host.invalid'") !=
          std::string::npos);
  }
  SUBCASE("read-only") {
    Process server(nbdkit({"-r", "memory", "8M"}), &listener);
    CHECK(refusal(uri).find("read-only") != std::string::npos);
  }
  SUBCASE("smaller") {
    Process server(nbdkit({"memory", "8M"}), &listener);
    CHECK(refusal(uri, 9 * mib).find("8388608 bytes, 9437184 needed") != std::string::npos);
  }
  SUBCASE("export unknown") {
    TempDir dir;
    Process server({"qemu-nbd", "-t", "-f", "raw", "-x", "a", dir.file("disk", mib)}, &listener);
    CHECK(refusal(uri + "b").find("'b'") != std::string::npos);
  }
}

}  // namespace nbdferry::test
