// nbdferry: the program. Everything it can do is in the library, where tests reach it.
#include <string>
#include <variant>
#include <vector>

#include <fmt/format.h>

#include "proxy/cli.hpp"

int main(int argc, char** argv) {
  using namespace nbdferry::proxy;
  const CommandLine line = parse_command_line(std::vector<std::string>(argv + 1, argv + argc));
  if (const auto* const serve = std::get_if<ServeCommand>(&line)) return run_serve(*serve);
  if (const auto* const client = std::get_if<ClientCommand>(&line)) return run_client(*client);
  const auto& done = std::get<CliExit>(line);
  fmt::print(stdout, "{}", done.out);
  fmt::print(stderr, "{}", done.err);
  return done.code;
}
