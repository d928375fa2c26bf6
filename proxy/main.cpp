// nbdferry: the program. Everything it can do is in the library, where tests reach it.
#include <string>
#include <variant>
#include <vector>

#include <fmt/format.h>

#include "proxy/cli.hpp"

int main(int argc, char** argv) {
  namespace proxy = nbdferry::proxy;
  const proxy::CommandLine line =
      proxy::parse_command_line(std::vector<std::string>(argv + 1, argv + argc));
  if (const auto* const serve = std::get_if<proxy::ServeCommand>(&line))
    return proxy::run_serve(*serve);
  if (const auto* const client = std::get_if<proxy::ClientCommand>(&line))
    return proxy::run_client(*client);
  const auto& done = std::get<proxy::CliExit>(line);
  fmt::print(stdout, "{}", done.out);
  fmt::print(stderr, "{}", done.err);
  return done.code;
}
