// The command line as a contract: what is understood, the defaults, what is refused.
#include <chrono>
#include <filesystem>
#include <string>
#include <variant>
#include <vector>

#include <doctest/doctest.h>

#include "proxy/cli.hpp"

namespace nbdferry::proxy {
namespace {

using namespace std::chrono_literals;
using Args = std::vector<std::string>;

ServeCommand serve(Args args) {
  args.insert(args.begin(), "serve");
  const CommandLine line = parse_command_line(args);
  REQUIRE(std::holds_alternative<ServeCommand>(line));
  return std::get<ServeCommand>(line);
}

ClientCommand client(const Args& args) {
  const CommandLine line = parse_command_line(args);
  REQUIRE(std::holds_alternative<ClientCommand>(line));
  return std::get<ClientCommand>(line);
}

Verb verb(Args args) {
  args.insert(args.end(), {"--control", "c"});
  return std::get<Verb>(client(args).action);
}

CliExit ends(const Args& args) {
  const CommandLine line = parse_command_line(args);
  REQUIRE(std::holds_alternative<CliExit>(line));
  return std::get<CliExit>(line);
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("cli: serve has its defaults beside the disk") {
  const ServeCommand plain = serve({"/d/vm.img"});
  CHECK(plain.disk.disk == "/d/vm.img");
  CHECK(plain.sockets == Args{"/d/vm.img.sock"});
  CHECK(plain.socket_mode == 0600);
  CHECK(plain.listens.empty());
  CHECK(plain.control == "/d/vm.img.ctl");
  CHECK(plain.disk.name.empty());
  CHECK_FALSE(plain.disk.read_only);
  CHECK_FALSE(plain.disk.direct);
  CHECK_FALSE(plain.disk.incoming);
  CHECK_FALSE(plain.disk.create_size);
}

TEST_CASE("cli: a socket's mode is octal, and keeps nobody out who must get in") {
  CHECK(serve({"--socket-mode", "0660", "disk"}).socket_mode == 0660);
  CHECK(serve({"--socket-mode=666", "disk"}).socket_mode == 0666);
  for (const char* bad : {"", "8", "0860", "rw", "0x1b6", "00660", "1660", "0060", "0400", "-1"}) {
    CAPTURE(bad);
    const CliExit end = ends({"serve", std::string("--socket-mode=") + bad, "disk"});
    CHECK(end.code == 2);
    CHECK(has(end.err, "--socket-mode"));
  }
  CHECK(has(ends({"serve", "--help"}).out, "--socket-mode MODE"));
}

TEST_CASE("cli: serve's options") {
  const ServeCommand full =
      serve({"--socket", "a", "--socket", "b", "--listen", "0.0.0.0:1", "--export", "vm",
             "--read-only", "--direct", "--create", "3G", "--control", "c", "--incoming", "disk"});
  CHECK(full.disk.disk == "disk");
  CHECK(full.sockets == Args{"a", "b"});
  CHECK(full.listens == std::vector<ListenAddress>{{"0.0.0.0", 1}});
  CHECK(full.control == "c");
  CHECK(full.disk.name == "vm");
  CHECK(full.disk.read_only);
  CHECK(full.disk.direct);
  CHECK(full.disk.incoming);
  CHECK(full.disk.create_size == 3ULL << 30);
  CHECK(serve({"--listen", "[::1]:0", "--listen", "localhost:65535", "disk"}).listens ==
        std::vector<ListenAddress>{{"::1", 0}, {"localhost", 65535}});
  // An address alone: no socket beside the disk.
  CHECK(serve({"--listen", "h:1", "disk"}).sockets.empty());
}

TEST_CASE("cli: migrate's options") {
  const ClientCommand full = client({"migrate",
                                     "--control",
                                     "c",
                                     "--export",
                                     "vm",
                                     "--connections",
                                     "8",
                                     "--mode",
                                     "sync",
                                     "--buffer",
                                     "32M",
                                     "--max-delay",
                                     "10ms",
                                     "--bandwidth",
                                     "100M",
                                     "--downtime-limit",
                                     "200ms",
                                     "--switch",
                                     "pivot",
                                     "--wait",
                                     "--sync-timeout",
                                     "2s",
                                     "--prepare-timeout",
                                     "2min",
                                     "--quarantine",
                                     "0",
                                     "--reconnect-delay",
                                     "5s",
                                     "--answer-timeout",
                                     "3s",
                                     "--skip-unreadable",
                                     "--via",
                                     "10.0.0.1",
                                     "--via",
                                     "::1",
                                     "--tls",
                                     "require",
                                     "--tls-certificates",
                                     "pki/../certs",
                                     "--tls-psk",
                                     "/etc/keys.psk",
                                     "--tls-verify-peer",
                                     "off",
                                     "nbd://h/x"});
  CHECK(full.name == "migrate");
  CHECK(full.control == "c");
  CHECK(full.export_name == "vm");
  const auto& migrate = std::get<MigrateCommand>(full.action);
  CHECK(migrate.wait);
  CHECK(migrate.request.uris == Args{"nbd://h/x"});
  CHECK(migrate.request.vias == Args{"10.0.0.1", "::1"});
  CHECK(migrate.request.tls.use == transport::TlsUse::require);
  // The serving process may be elsewhere.
  CHECK(migrate.request.tls.certificates == std::filesystem::current_path() / "certs");
  CHECK(migrate.request.tls.psk_file == "/etc/keys.psk");
  CHECK_FALSE(migrate.request.tls.verify_peer);
  CHECK(migrate.request.connections == 8);
  CHECK(migrate.request.answer_timeout == Duration{3s});
  const mirror::MigrateOptions& options = migrate.request.options;
  CHECK(options.mode == mirror::Mode::sync);
  CHECK(options.switch_when == mirror::SwitchWhen::pivot);
  CHECK(options.buffer_bytes == 32ULL << 20);
  CHECK(options.max_delay == Duration{10ms});
  CHECK(options.bandwidth == 100ULL << 20);
  CHECK(options.downtime_limit == Duration{200ms});
  CHECK(options.sync_timeout == Duration{2s});
  CHECK(options.prepare_timeout == Duration{2min});
  CHECK(options.quarantine == Duration{0});
  CHECK(options.reconnect_delay == Duration{5s});
  CHECK(options.skip_unreadable);

  const ClientCommand plain = client({"migrate", "--control", "c", "nbd://h"});
  CHECK_FALSE(plain.export_name);
  const auto& defaults = std::get<MigrateCommand>(plain.action);
  CHECK_FALSE(defaults.wait);
  CHECK(defaults.request.tls == transport::TlsOptions{});
  CHECK(defaults.request.connections == 0);
  CHECK(defaults.request.answer_timeout == Duration{60s});
  CHECK(defaults.request.options.mode == mirror::Mode::automatic);
  CHECK(defaults.request.options.switch_when == mirror::SwitchWhen::manual);
}

TEST_CASE("cli: every other command") {
  CHECK(verb({"switch", "--pivot"}) == Verb::switch_pivot);
  CHECK(verb({"switch", "--release"}) == Verb::switch_release);
  CHECK(verb({"switch", "--prepare"}) == Verb::prepare);
  CHECK(verb({"switch", "--seal"}) == Verb::seal);
  CHECK(verb({"switch", "--commit", "pivot"}) == Verb::commit_pivot);
  CHECK(verb({"switch", "--commit", "release"}) == Verb::commit_release);
  CHECK(verb({"switch", "--abort"}) == Verb::abort);
  CHECK(verb({"promote"}) == Verb::promote);
  CHECK(verb({"pause"}) == Verb::pause);
  CHECK(verb({"resume"}) == Verb::resume);
  CHECK(verb({"cancel"}) == Verb::cancel);
  CHECK(verb({"verify"}) == Verb::verify);
  CHECK(verb({"unfence"}) == Verb::unfence);
  CHECK(std::get<StatusCommand>(client({"status", "--control", "c", "--json"}).action).json);
  CHECK(std::get<StatusCommand>(client({"status", "--control", "c", "--watch"}).action).watch);
}

TEST_CASE("cli: set names what is to change, and nothing else") {
  const auto set = [](Args args) {
    args.insert(args.begin(), {"set", "--control", "c"});
    return std::get<mirror::Set>(client(args).action);
  };
  const mirror::Set mode = set({"--mode", "auto"});
  CHECK(mode.mode == mirror::Mode::automatic);
  CHECK_FALSE(mode.bandwidth);
  CHECK_FALSE(mode.buffer_bytes);
  CHECK_FALSE(mode.max_delay);
  CHECK_FALSE(mode.downtime_limit);
  const mirror::Set others =
      set({"--bandwidth", "50M", "--buffer", "1M", "--max-delay", "0ms", "--downtime-limit", "1s"});
  CHECK_FALSE(others.mode);
  CHECK(others.bandwidth == 50ULL << 20);
  CHECK(others.buffer_bytes == 1ULL << 20);
  CHECK(others.max_delay == Duration{0});
  CHECK(others.downtime_limit == Duration{1s});
  CHECK(set({"--deadline", "90min"}).deadline == Duration{90min});
}

TEST_CASE("cli: wrong usage is exit code 2 and one line that names what is wrong") {
  const auto wrong = [](const Args& args, const char* part) {
    const CliExit e = ends(args);
    CAPTURE(e.err);
    CHECK(e.code == 2);
    CHECK(e.out.empty());
    CHECK(has(e.err, "nbdferry: "));
    CHECK(has(e.err, part));
    CHECK(e.err.find('\n') == e.err.size() - 1);
  };
  wrong({}, "subcommand");
  wrong({"fly"}, "fly");
  wrong({"serve"}, "DISK");
  wrong({"serve", "a", "b"}, "b");
  wrong({"serve", "--fast", "disk"}, "--fast");
  wrong({"serve", "--create", "1X", "disk"}, "1X");
  wrong({"serve", "--tls", "on", "disk"}, "--tls");
  for (const char* address :
       {"h", ":1", "h:", "h:65536", "h:x", "::1:5", "[]:1", "[h]:1", "h:1K"}) {
    wrong({"serve", "--listen", address, "disk"}, "not HOST:PORT");
  }
  wrong({"migrate", "nbd://h"}, "--control");
  wrong({"migrate", "--control", "c"}, "URI");
  wrong({"migrate", "--control", "c", "nbd://a", "nbd://b", "--via", "10.0.0.1"}, "2 URIs");
  wrong({"migrate", "--control", "c", "--mode", "fast", "nbd://h"}, "fast");
  wrong({"migrate", "--control", "c", "--tls", "maybe", "nbd://h"}, "maybe");
  wrong({"migrate", "--control", "c", "--tls-verify-peer", "0", "nbd://h"}, "not one of off|on");
  wrong({"migrate", "--control", "c", "--tls-psk", "", "nbd://h"}, "--tls-psk");
  wrong({"migrate", "--control", "c", "--max-delay", "5", "nbd://h"}, "not a time");
  wrong({"migrate", "--control", "c", "--connections", "many", "nbd://h"}, "many");
  wrong({"migrate", "--control", "c", "--bandwidth", "fast", "nbd://h"}, "--bandwidth");
  wrong({"status", "--control", "c", "--json", "--watch"}, "--json");
  wrong({"switch", "--control", "c"}, "--pivot");
  wrong({"switch", "--control", "c", "--pivot", "--release"}, "--pivot");
  wrong({"switch", "--control", "c", "--commit", "later"}, "later");
  wrong({"set", "--control", "c"}, "nothing to change");
  wrong({"set", "--control", "c", "--quarantine", "1s"}, "--quarantine");
}

TEST_CASE("cli: help and version are no errors") {
  const CliExit version = ends({"--version"});
  CHECK(version.code == 0);
  CHECK(has(version.out, "nbdferry 0."));
  const CliExit help = ends({"--help"});
  CHECK(help.code == 0);
  for (const char* name : {"serve", "migrate", "status", "switch", "promote", "pause", "resume",
                           "cancel", "verify", "unfence", "set"}) {
    CHECK(has(help.out, name));
  }
  CHECK(has(ends({"migrate", "--help"}).out, "--downtime-limit"));
}

}  // namespace nbdferry::proxy
