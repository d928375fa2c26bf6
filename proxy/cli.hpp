// The command line: what was asked for, checked as far as it can be without asking anybody.
// Carried out in cli_serve.cpp (serve) and cli_client.cpp (all else, through the control socket).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "proxy/export.hpp"

namespace nbdferry::proxy {

struct ListenAddress {
  std::string host;
  std::uint16_t port = 0;  // 0: any free one
  friend bool operator==(const ListenAddress&, const ListenAddress&) = default;
};

struct ServeCommand {
  ExportOptions disk;
  std::vector<std::string> sockets;  // unix socket paths
  unsigned socket_mode = 0600;       // of these; the control socket is always 0600
  std::vector<ListenAddress> listens;
  std::string control;  // path of the control socket
};

struct MigrateCommand {
  MigrateRequest request;
  bool wait = false;
};

struct StatusCommand {
  bool json = false;
  bool watch = false;
};

struct ClientCommand {
  std::string name;  // "migrate", for messages
  std::string control;
  std::optional<std::string> export_name;
  std::variant<MigrateCommand, StatusCommand, mirror::Set, Verb> action;
};

// Nothing to carry out: help, version, or wrong usage (exit code 2).
struct CliExit {
  int code = 0;
  std::string out;
  std::string err;
};

using CommandLine = std::variant<CliExit, ServeCommand, ClientCommand>;

// `args` without the program's name.
[[nodiscard]] CommandLine parse_command_line(std::vector<std::string> args);

// Both return the process's exit code; errors have been printed.
int run_serve(const ServeCommand& command);
int run_client(const ClientCommand& command);

}  // namespace nbdferry::proxy
