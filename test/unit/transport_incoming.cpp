// The target is a nbdferry that waits for a migration (rule 11): whose writes it takes, and whether
// the path knows that it has been accepted. Against the real program.
#include <string>

#include "transport_harness.hpp"

#include <doctest/doctest.h>

namespace nbdferry::test {

namespace {

constexpr std::uint64_t mib = 1024 * 1024;

// Migration ids are "<source>.<migration>", 32 hex digits each.
std::string id_of(char source, char migration) {
  return std::string(32, source) + "." + std::string(32, migration);
}

class Nbdferry {
 public:
  explicit Nbdferry(std::vector<std::string> options)
      : process_(command(std::move(options), dir_)) {
    REQUIRE(wait_for_socket(dir_.path("s")));
  }

  [[nodiscard]] transport::TargetConfig config(const std::string& migration_id) const {
    transport::TargetConfig config;
    config.uris = {"nbd+unix:///?socket=" + dir_.path("s")};
    config.migration_id = migration_id;
    return config;
  }
  // By both of its sockets.
  [[nodiscard]] std::string other_uri() const { return "nbd+unix:///?socket=" + dir_.path("t"); }

 private:
  static std::vector<std::string> command(std::vector<std::string> options, const TempDir& dir) {
    std::vector<std::string> all = {NBDFERRY_PROGRAM, "serve",       "--socket",  dir.path("s"),
                                    "--socket",       dir.path("t"), "--control", dir.path("c")};
    all.insert(all.end(), options.begin(), options.end());
    all.push_back(dir.file("disk", 8 * mib));
    return all;
  }
  TempDir dir_;
  Process process_;
};

bool accepted(const Driver& d) { return d.target->paths().front().nbdferry; }

IoError write_error(Driver& d) {
  auto w = make_op(Command::write, 0, 4096);
  w.payload = filled(4096, 'x');
  return d.call(w).error;
}

// Connected, and not taken for the migration.
void check_refused(Driver& other) {
  REQUIRE(other.open());
  CHECK_FALSE(accepted(other));
  CHECK(write_error(other) == IoError::not_permitted);
}

// A server that has not heard of migrations.
struct GenericServer {
  Listener listener;
  Process server{{"nbdkit", "-f", "memory", "8M"}, &listener};

  [[nodiscard]] transport::TargetConfig config(const std::string& migration_id) const {
    transport::TargetConfig out;
    out.uris = {listener.uri()};
    out.migration_id = migration_id;
    return out;
  }
};

}  // namespace

TEST_CASE("an incoming nbdferry takes writes from its migration and from nobody else") {
  Nbdferry server({"--incoming"});
  Driver ours(server.config(id_of('a', '1')));
  REQUIRE_MESSAGE(ours.open(), ours.reason);
  REQUIRE(ours.until([&] { return ours.connections() == 4; }));
  CHECK(accepted(ours));
  CHECK(write_error(ours) == IoError::none);

  SUBCASE("another source: not accepted, EPERM, and ours goes on") {
    Driver other(server.config(id_of('b', '1')));
    check_refused(other);
    CHECK(write_error(ours) == IoError::none);
    CHECK(ours.count("lost") == 0);
  }
  SUBCASE("nobody's writes: EPERM, reads are answered") {
    Driver other(server.config(""));
    check_refused(other);
    CHECK(other.call(make_op(Command::zero, 0, 4096)).error == IoError::not_permitted);
    CHECK(other.call(make_op(Command::read, 0, 4096)).error == IoError::none);
  }
  SUBCASE("no id at all, though of our source: not accepted") {
    Driver other(server.config(std::string(32, 'a')));
    check_refused(other);
  }
  SUBCASE("a new migration of the same source replaces ours and fences its connections") {
    Driver newer(server.config(id_of('a', '2')));
    REQUIRE(newer.open());
    CHECK(accepted(newer));
    CHECK(write_error(newer) == IoError::none);
    CHECK(ours.until([&] { return ours.count("lost") >= 1; }));
  }
}

TEST_CASE("a nbdferry tells checksums, XXH3 in 64 bits; another server is not asked for any") {
  SUBCASE("nbdferry") {
    Nbdferry server({"--incoming"});
    Driver d(server.config(id_of('a', '1')));
    REQUIRE_MESSAGE(d.open(), d.reason);
    CHECK(d.info.can_checksum);
    CHECK(write_error(d) == IoError::none);  // 4 KiB of x
    const auto sum_of = [&](std::uint64_t begin, std::uint64_t length) {
      const auto done = d.call(make_op(Command::checksum, begin, length));
      CHECK(done.error == IoError::none);
      CHECK(done.extents.empty());
      return done.checksum;
    };
    CHECK(sum_of(0, 4096) == 0x854c667088efe093);
    CHECK(sum_of(4096, 4096) == 0x93d76fe148c689ba);
    CHECK(sum_of(4096, mib) == sum_of(2 * mib, mib));
    CHECK(sum_of(0, mib) != sum_of(mib, mib));
    // Of more than it tells at once: nothing that could be taken for the whole.
    CHECK(d.call(make_op(Command::checksum, 0, 2 * mib)).error == IoError::not_supported);
    CHECK(d.call(make_op(Command::checksum, 7 * mib, 2 * mib)).error == IoError::invalid);
    const auto status = d.call(make_op(Command::block_status, 4096, mib));
    REQUIRE_FALSE(status.extents.empty());
    CHECK(status.extents[0].zero);  // and the other question is answered as ever
  }
  SUBCASE("nbdkit") {
    GenericServer server;
    Driver d(server.config(id_of('a', '1')));
    REQUIRE_MESSAGE(d.open(), d.reason);
    CHECK_FALSE(d.info.can_checksum);
    CHECK(d.call(make_op(Command::checksum, 0, 4096)).error == IoError::not_supported);
  }
}

TEST_CASE("another path to an incoming nbdferry proves itself, and a wrong one is left untouched") {
  Nbdferry server({"--incoming"});
  Nbdferry wrong({"--incoming"});
  auto config = server.config(id_of('a', '1'));
  SUBCASE("the same") {
    config.uris.push_back(server.other_uri());
    Driver d(config);
    REQUIRE_MESSAGE(d.open(), d.reason);
    CHECK(d.until([&] { return d.connections(0) == 4 && d.connections(1) == 4; }));
    CHECK(d.found.empty());
    CHECK(d.write_until([&] { return d.target->paths()[1].sent_bytes > 0; }));
    REQUIRE(d.until([&] { return d.unanswered() == 0; }));
    CHECK(write_error(d) == IoError::none);
    CHECK(d.count("lost") == 0);
  }
  SUBCASE("another one") {
    config.uris.push_back(wrong.other_uri());
    Driver d(config);
    REQUIRE_MESSAGE(d.open(), d.reason);
    CHECK(d.until([&] { return d.count("path refused") == 1; }));
    MESSAGE(d.reason);
    CHECK(d.reason.find("does not know this migration") != std::string::npos);
    // It is anybody's still.
    Driver other(wrong.config(id_of('b', '1')));
    REQUIRE(other.open());
    CHECK(accepted(other));
  }
}

TEST_CASE("a nbdferry that serves its own disk, and a generic server, know no migration") {
  SUBCASE("nbdferry, not incoming") {
    Nbdferry server({});
    Driver d(server.config(id_of('a', '1')));
    REQUIRE_MESSAGE(d.open(), d.reason);
    CHECK_FALSE(accepted(d));
    CHECK(write_error(d) == IoError::none);
  }
  SUBCASE("nbdkit") {
    GenericServer server;
    Driver d(server.config(id_of('a', '1')));
    REQUIRE_MESSAGE(d.open(), d.reason);
    CHECK_FALSE(accepted(d));
    CHECK(d.info.has_allocation);  // the other context is not lost with it
    CHECK(write_error(d) == IoError::none);
  }
}

}  // namespace nbdferry::test
