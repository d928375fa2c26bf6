// CLI11's callbacks fill plain structs; unknown options and malformed values are usage errors.
#include "proxy/cli.hpp"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>
#include <sstream>
#include <utility>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "proxy/units.hpp"

namespace nbdferry::proxy {
namespace {

CLI::Option* add_size(CLI::App& app, const std::string& name, const std::string& help,
                      std::function<void(std::uint64_t)> take) {
  return app
      .add_option_function<std::string>(
          name,
          [name, take = std::move(take)](const std::string& text) {
            const auto size = parse_size(text);
            if (!size) {
              throw CLI::ValidationError(
                  name,
                  fmt::format("\"{}\" is not a size: bytes, or a number with K, M, G or T", text));
            }
            take(*size);
          },
          help)
      ->type_name("SIZE");
}

template <class Time>  // Duration, or an optional one
void add_time(CLI::App& app, const std::string& name, const std::string& help, Time& target) {
  app.add_option_function<std::string>(
         name,
         [name, &target](const std::string& text) {
           const auto time = parse_time(text);
           if (!time) {
             throw CLI::ValidationError(
                 name, fmt::format("\"{}\" is not a time: a number with ms, s or min", text));
           }
           target = *time;
         },
         help)
      ->type_name("TIME");
}

template <class Enum>
CLI::Option* add_choice(CLI::App& app, const std::string& name, const std::string& help,
                        const std::map<std::string, Enum>& choices,
                        std::function<void(Enum)> take) {
  std::string type;
  for (const auto& [text, value] : choices) type += (type.empty() ? "" : "|") + text;
  return app
      .add_option_function<std::string>(
          name,
          [name, type, choices, take = std::move(take)](const std::string& text) {
            const auto found = choices.find(text);
            if (found == choices.end()) {
              throw CLI::ValidationError(name, fmt::format("\"{}\" is not one of {}", text, type));
            }
            take(found->second);
          },
          help)
      ->type_name(type);
}

const std::map<std::string, mirror::Mode> modes{{"async", mirror::Mode::async},
                                                {"sync", mirror::Mode::sync},
                                                {"auto", mirror::Mode::automatic}};

// "HOST:PORT", or "[ADDRESS]:PORT" for IPv6.
ListenAddress parse_address(const std::string& text) {
  const auto colon = text.rfind(':');
  std::string host = text.substr(0, colon);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  const bool has_colon = host.find_first_of(":[]") != std::string::npos;
  const std::string digits = colon == std::string::npos ? "" : text.substr(colon + 1);
  const bool plain = digits.find_first_not_of("0123456789") == std::string::npos;
  const auto port = plain ? parse_size(digits) : std::nullopt;
  if (host.empty() || !port || *port > 65535 || has_colon != bracketed) {
    throw CLI::ValidationError("--listen", fmt::format("\"{}\" is not HOST:PORT", text));
  }
  return {host, static_cast<std::uint16_t>(*port)};
}

// Permissions as chmod takes them, in octal. Only who may connect (write) counts, and only a mode
// that keeps its owner out would be a mistake for sure.
unsigned parse_socket_mode(const std::string& text) {
  const bool octal =
      !text.empty() && text.size() <= 4 && text.find_first_not_of("01234567") == std::string::npos;
  const unsigned long mode = octal ? std::stoul(text, nullptr, 8) : 0;
  if (mode > 0777 || (mode & 0600) != 0600) {
    throw CLI::ValidationError("--socket-mode",
                               fmt::format("\"{}\" is not an octal mode from 0600 to 0777", text));
  }
  return static_cast<unsigned>(mode);
}

// Every way to say nothing, serve, or one of the client's commands.
struct Parsed {
  ServeCommand serve;
  ClientCommand client;
  MigrateCommand migrate;
  StatusCommand status;
  mirror::Set changes;
  Verb verb{};
  bool acknowledge = false;
};

void define_serve(CLI::App& root, ServeCommand& serve) {
  CLI::App& app = *root.add_subcommand("serve", "Serve DISK over NBD until SIGTERM or SIGINT");
  app.add_option("DISK", serve.disk.disk, "Raw disk image or block device")->required();
  // One value for each mention, so that what follows it can be DISK.
  app.add_option("--socket", serve.sockets,
                 "Unix socket to listen on; repeatable (default: DISK.sock)")
      ->type_name("PATH")
      ->allow_extra_args(false);
  app.add_option_function<std::string>(
         "--socket-mode",
         [&serve](const std::string& text) { serve.socket_mode = parse_socket_mode(text); },
         "Permissions of --socket's files, octal: who may use the disk (default: 0600, this user)")
      ->type_name("MODE");
  app.add_option_function<std::vector<std::string>>(
         "--listen",
         [&serve](const std::vector<std::string>& addresses) {
           for (const std::string& text : addresses) serve.listens.push_back(parse_address(text));
         },
         "TCP address to listen on; repeatable")
      ->type_name("HOST:PORT")
      ->allow_extra_args(false);
  app.add_option("--export", serve.disk.name, "Export name (default: the empty name)")
      ->type_name("NAME");
  app.add_flag("--read-only", serve.disk.read_only, "Refuse the guest's writes");
  app.add_flag("--direct", serve.disk.direct, "Bypass the page cache (O_DIRECT)");
  add_size(app, "--create", "Create DISK as a sparse file of this size if it does not exist",
           [&serve](std::uint64_t size) { serve.disk.create_size = size; });
  app.add_option("--control", serve.control, "Control socket (default: DISK.ctl)")
      ->type_name("PATH");
  app.add_option(
         "--state", serve.disk.state_directory,
         "Where a migration keeps what a restart goes on from: a directory in memory (default: "
         "/run/nbdferry, else $XDG_RUNTIME_DIR/nbdferry)")
      ->type_name("DIR");
  app.add_flag("--incoming", serve.disk.incoming,
               "Take writes only from a migration, until promote");
}

// A subcommand that talks to a serving process.
CLI::App& define_client(CLI::App& root, Parsed& parsed, const std::string& name,
                        const std::string& help) {
  CLI::App& app = *root.add_subcommand(name, help);
  app.add_option("--control", parsed.client.control, "Control socket of the serving process")
      ->type_name("PATH")
      ->required();
  app.add_option("--export", parsed.client.export_name,
                 "Which disk, where the process serves several")
      ->type_name("NAME");
  return app;
}

// The serving process reads the files, and perhaps after a restart.
void add_path(CLI::App& app, const std::string& name, const std::string& type,
              const std::string& help, std::string& target) {
  app.add_option_function<std::string>(
         name,
         [name, &target](const std::string& text) {
           if (text.empty()) throw CLI::ValidationError(name, "is empty");
           target = std::filesystem::absolute(text).lexically_normal().string();
         },
         help)
      ->type_name(type);
}

void define_tls(CLI::App& app, transport::TlsOptions& tls) {
  using transport::TlsUse;
  add_choice<TlsUse>(
      app, "--tls",
      "on: as the URIs say, nbds being TLS or nothing (the default); require: refuse the others; "
      "off: refuse nbds",
      {{"off", TlsUse::off}, {"on", TlsUse::on}, {"require", TlsUse::require}},
      [&tls](TlsUse use) { tls.use = use; });
  add_path(app, "--tls-certificates", "DIR",
           "Folder with ca-cert.pem, whose owner signed the target's certificate, and, if the "
           "target asks for ours, client-cert.pem and client-key.pem",
           tls.certificates);
  add_path(app, "--tls-psk", "FILE",
           "Keys shared with the target instead, lines of USER:HEX; nbds://USER@HOST says which, "
           "where there are several",
           tls.psk_file);
  add_choice<bool>(app, "--tls-verify-peer",
                   "off: take any certificate: no eavesdropper, but anybody could be the target "
                   "(default: on)",
                   {{"on", true}, {"off", false}}, [&tls](bool on) { tls.verify_peer = on; });
}

void define_timeouts(CLI::App& app, MigrateRequest& request) {
  add_time(app, "--sync-timeout", "A sync write waits this long for the target (default: 1s)",
           request.options.sync_timeout);
  add_time(app, "--prepare-timeout", "Prepared lasts this long without a seal (default: 60s)",
           request.options.prepare_timeout);
  add_time(app, "--quarantine",
           "A lost connection's unanswered writes may still be applied for "
           "this long (default: 60s)",
           request.options.quarantine);
  add_time(app, "--answer-timeout",
           "A connection on which the target answers nothing for this long is given up and made "
           "anew (default: 60s)",
           request.answer_timeout);
  add_time(app, "--reconnect-delay",
           "After a pivot: how long I/O waits for a lost target "
           "(default: 30s)",
           request.options.reconnect_delay);
}

void define_migrate(CLI::App& root, Parsed& parsed) {
  MigrateCommand& migrate = parsed.migrate;
  mirror::MigrateOptions& options = migrate.request.options;
  CLI::App& app = define_client(root, parsed, "migrate",
                                "Start to copy the disk to another NBD server, under load");
  app.add_option(
         "URI", migrate.request.uris,
         "The target: nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH; nbds://… and "
         "nbds+unix://… with TLS. Several are paths to one export, and share the work")
      ->required();
  app.add_option("--connections", migrate.request.connections,
                 "Connections by each path (default: chosen)")
      ->type_name("N");
  app.add_option(
         "--via", migrate.request.vias,
         "This host's address to connect from: one for each URI, in their order, or several "
         "for the one URI, which make as many paths")
      ->type_name("ADDRESS")
      ->allow_extra_args(false);
  define_tls(app, migrate.request.tls);
  add_choice<mirror::Mode>(app, "--mode",
                           "When guest writes are answered: after the source (async), after both "
                           "sides (sync), or as the target keeps up (auto, the default)",
                           modes, [&options](mirror::Mode mode) { options.mode = mode; });
  add_size(app, "--buffer", "Memory for mirrored writes on their way (default: 64M)",
           [&options](std::uint64_t size) { options.buffer_bytes = size; });
  add_size(app, "--bandwidth", "Most bytes a second to the target (default: what it takes)",
           [&options](std::uint64_t rate) { options.bandwidth = rate; });
  add_time(app, "--max-delay",
           "Most that a guest's write is delayed so that the target keeps up; on entering sync, "
           "most that it waits for older ones (default: 50ms; 0ms: never)",
           options.max_delay);
  add_time(app, "--downtime-limit",
           "Longest hold of guest writes at the switchover (default: 300ms). It also says when "
           "the disk is in sync: when what is left to send takes no longer than this at the "
           "present rate. With 20s that can be much, and the switchover sends it first",
           options.downtime_limit);
  add_time(app, "--deadline",
           "Be in sync after this time, and use no more bandwidth than that needs (default: as "
           "soon as can be); the status says early if it cannot be done",
           options.deadline);
  add_choice<mirror::Consistency>(
      app, "--consistency",
      "crash: once the copy is through, the target holds at every moment what this disk could "
      "hold after a power cut: the guest's flushes are barriers (default: none)",
      {{"none", mirror::Consistency::none}, {"crash", mirror::Consistency::crash}},
      [&options](mirror::Consistency c) { options.consistency = c; });
  add_choice<mirror::SwitchWhen>(
      app, "--switch", "What to do once in sync (default: manual)",
      {{"manual", mirror::SwitchWhen::manual},
       {"pivot", mirror::SwitchWhen::pivot},
       {"release", mirror::SwitchWhen::release}},
      [&options](mirror::SwitchWhen when) { options.switch_when = when; });
  app.add_flag("--wait", migrate.wait,
               "Show progress until in sync, or switched where --switch asks for it. "
               "Interrupting the wait does not stop the migration");
  define_timeouts(app, migrate.request);
  app.add_flag("--verify", options.verify,
               "Compare both sides once in sync; no switchover before they are found alike");
  app.add_flag("--trust-target", options.trust_target,
               "After a restart, believe that the target still is what it was, though it cannot "
               "prove it: no verification before the switchover");
  app.add_flag("--skip-unreadable", options.skip_unreadable,
               "Allow the switchover although sectors of the source cannot be read");
}

void define_switch(CLI::App& root, Parsed& parsed) {
  CLI::App& app = define_client(root, parsed, "switch",
                                "Hand the disk over to the target, at once or step by step");
  CLI::Option_group& step = *app.add_option_group("step", "Exactly one of");
  const auto add = [&](const char* name, const char* help, Verb verb) {
    step.add_flag_callback(
        name, [&parsed, verb] { parsed.verb = verb; }, help);
  };
  add("--pivot", "All three steps; go on serving the guest, from the target", Verb::switch_pivot);
  add("--release", "All three steps; stop serving: the target's host does", Verb::switch_release);
  add("--prepare", "Step 1: bring both sides into lock-step", Verb::prepare);
  add("--seal", "Step 2: hold guest writes, flush the target", Verb::seal);
  add_choice<Verb>(step, "--commit", "Step 3: write the ownership record and switch",
                   {{"pivot", Verb::commit_pivot}, {"release", Verb::commit_release}},
                   [&parsed](Verb verb) { parsed.verb = verb; });
  add("--abort", "Undo prepare and seal", Verb::abort);
  step.require_option(1);
}

void define_others(CLI::App& root, Parsed& parsed) {
  CLI::App& status = define_client(root, parsed, "status", "Show what the serving process does");
  CLI::Option* const json = status.add_flag("--json", parsed.status.json, "One JSON object");
  status.add_flag("--watch", parsed.status.watch, "Again every second, until interrupted")
      ->excludes(json);
  const auto add = [&](const char* name, const char* help, Verb verb) {
    define_client(root, parsed, name, help).callback([&parsed, verb] { parsed.verb = verb; });
  };
  add("promote", "At the destination, after the source's commit: this side owns the disk",
      Verb::promote);
  add("pause", "Stop copying; guest writes become debt", Verb::pause);
  add("resume", "Copy again", Verb::resume);
  add("cancel", "Give the migration up; the guest stays on the source", Verb::cancel);
  CLI::App& verify = define_client(
      root, parsed, "verify", "Compare source and target block by block, heal differences, report");
  verify.add_flag(
      "--acknowledge", parsed.acknowledge,
      "Compare nothing: the differences found so far, which are healed, no longer stand "
      "in a switchover's way");
  verify.callback(
      [&parsed] { parsed.verb = parsed.acknowledge ? Verb::acknowledge : Verb::verify; });
  add("unfence", "Serve a retired disk again: only if the target does not own it", Verb::unfence);
  CLI::App& set = define_client(root, parsed, "set", "Change a running migration");
  mirror::Set& changes = parsed.changes;
  add_choice<mirror::Mode>(set, "--mode", "When guest writes are answered", modes,
                           [&changes](mirror::Mode mode) { changes.mode = mode; });
  add_size(set, "--bandwidth", "Most bytes a second to the target; 0: what it takes",
           [&changes](std::uint64_t rate) { changes.bandwidth = rate; });
  add_size(set, "--buffer", "Memory for mirrored writes on their way",
           [&changes](std::uint64_t size) { changes.buffer_bytes = size; });
  add_time(set, "--max-delay", "Most that a guest's write is delayed", changes.max_delay);
  add_time(set, "--downtime-limit", "Longest hold of guest writes at the switchover",
           changes.downtime_limit);
  add_time(set, "--deadline", "Be in sync after this time from now on; 0s: as soon as can be",
           changes.deadline);
  set.callback([&set] {
    if (set.count_all() < 3) throw CLI::ValidationError("set", "nothing to change: name an option");
  });
}

CommandLine usage_error(const std::string& text) {
  return CliExit{2, "", fmt::format("nbdferry: {} (see nbdferry --help)\n", text)};
}

CommandLine result(const CLI::App& root, Parsed& parsed) {
  const std::string name = root.get_subcommands().front()->get_name();
  if (name == "serve") {
    ServeCommand& serve = parsed.serve;
    if (serve.sockets.empty() && serve.listens.empty()) {
      serve.sockets.push_back(serve.disk.disk + ".sock");
    }
    if (serve.control.empty()) serve.control = serve.disk.disk + ".ctl";
    return serve;
  }
  parsed.client.name = name;
  if (name == "migrate") {
    const MigrateRequest& request = parsed.migrate.request;
    const std::size_t uris = request.uris.size();
    const std::size_t vias = request.vias.size();
    if (vias != 0 && uris != 1 && uris != vias) {
      return usage_error(fmt::format(
          "migrate: {} --via for {} URIs: give one for each URI, or one URI", vias, uris));
    }
    parsed.client.action = parsed.migrate;
  } else if (name == "status") {
    parsed.client.action = parsed.status;
  } else if (name == "set") {
    parsed.client.action = parsed.changes;
  } else {
    parsed.client.action = parsed.verb;
  }
  return parsed.client;
}

}  // namespace

CommandLine parse_command_line(std::vector<std::string> args) {
  CLI::App root(
      "nbdferry moves the disk of a running machine to another host, while the machine "
      "keeps writing to it.\nIt is an NBD server in front of a raw disk.");
  root.name("nbdferry");
  root.set_version_flag("--version", "nbdferry " NBDFERRY_VERSION);
  root.require_subcommand(1);
  root.get_formatter()->column_width(34);
  Parsed parsed;
  define_serve(root, parsed.serve);
  define_migrate(root, parsed);
  define_switch(root, parsed);
  define_others(root, parsed);
  // CLI11 would only say that a subcommand is required.
  const auto commands = root.get_subcommands([](const CLI::App*) { return true; });
  if (!args.empty() && !args.front().starts_with('-') &&
      std::none_of(commands.begin(), commands.end(),
                   [&](const CLI::App* app) { return app->get_name() == args.front(); })) {
    return usage_error(fmt::format("unknown command \"{}\"", args.front()));
  }
  try {
    // CLI11 takes them from the end.
    std::reverse(args.begin(), args.end());
    root.parse(std::move(args));
  } catch (const CLI::Success& wanted) {
    std::ostringstream out;
    std::ostringstream err;
    root.exit(wanted, out, err);
    return CliExit{0, out.str(), err.str()};
  } catch (const CLI::ParseError& e) {
    return usage_error(e.what());
  }
  return result(root, parsed);
}

}  // namespace nbdferry::proxy
