// The commands that talk to a serving process.
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <variant>

#include <sys/ioctl.h>
#include <unistd.h>

#include <fmt/format.h>

#include "proxy/cli.hpp"
#include "proxy/control_client.hpp"
#include "proxy/status_text.hpp"

namespace nbdferry::proxy {
namespace {

using mirror::Phase;
using mirror::SwitchWhen;

bool is_terminal() { return ::isatty(STDOUT_FILENO) == 1; }

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// The progress bar: redrawn in place on a terminal, a line a second elsewhere.
class ProgressBar {
 public:
  // How often to look; cheap enough for the end to be noticed at once.
  static constexpr milliseconds period{50};

  void show(const ExportStatus& status) {
    if (Clock::now() < next_) return;
    draw(status);
    next_ = Clock::now() + milliseconds(terminal_ ? 200 : 1000);
  }
  void end(const ExportStatus& status) { draw(status); }
  // The last line stays, and what follows begins a new one.
  ~ProgressBar() {
    if (drawn_) fmt::print("\n");
    std::fflush(stdout);
  }

 private:
  void draw(const ExportStatus& status) {
    if (terminal_) {
      fmt::print("\r{}\033[K", fitting_line(status));
      drawn_ = true;
    } else {
      fmt::print("{}\n", progress_line(status, 0));
    }
    std::fflush(stdout);
  }

  // A line that is wider than the terminal could not be drawn over.
  static std::string fitting_line(const ExportStatus& status) {
    constexpr unsigned bar_width = 24;
    winsize window{};
    const bool known = ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 0;
    const std::size_t columns = known ? window.ws_col : 80;
    std::string line = progress_line(status, bar_width);
    if (line.size() >= columns) line = progress_line(status, 0);
    return line.substr(0, columns - 1);
  }

  bool terminal_ = is_terminal();
  bool drawn_ = false;
  Clock::time_point next_;
};

enum class WaitResult { goes_on, done, failed };

// Where a migration stands for somebody who waits for its end.
WaitResult wait_result(const mirror::Status& status, SwitchWhen wanted) {
  switch (status.phase) {
    case Phase::idle:
    case Phase::failed:
    case Phase::cancelled:
      return WaitResult::failed;
    case Phase::switched:
      return WaitResult::done;
    case Phase::in_sync:
    case Phase::prepared:
    case Phase::sealed:
      return wanted == SwitchWhen::manual ? WaitResult::done : WaitResult::goes_on;
    default:
      return WaitResult::goes_on;
  }
}

ControlError migration_failed(const mirror::Status& status) {
  return ControlError(fmt::format(
      "migrate: {}{}{}", status.phase == Phase::failed ? "failed" : to_string(status.phase),
      status.last_error.empty() ? "" : ": ", status.last_error));
}

void wait_for_migration(ControlClient& client, SwitchWhen wanted) {
  ProgressBar bar;
  ExportStatus status = client.status();
  while (wait_result(status.core, wanted) == WaitResult::goes_on) {
    bar.show(status);
    std::this_thread::sleep_for(ProgressBar::period);
    status = client.status();
  }
  bar.end(status);
  if (wait_result(status.core, wanted) == WaitResult::failed) throw migration_failed(status.core);
}

// A target that can't be used is this command's failure, so wait until it has been reached.
void wait_for_connection(ControlClient& client) {
  for (;;) {
    const ExportStatus status = client.status();
    if (wait_result(status.core, SwitchWhen::manual) == WaitResult::failed) {
      throw migration_failed(status.core);
    }
    if (status.core.phase != Phase::connecting) return;
    std::this_thread::sleep_for(milliseconds(20));
  }
}

void run(ControlClient& client, const MigrateCommand& command) {
  client.migrate(command.request);
  if (command.wait) {
    wait_for_migration(client, command.request.options.switch_when);
  } else {
    wait_for_connection(client);
  }
}

void run(ControlClient& client, const StatusCommand& command) {
  if (command.json) {
    fmt::print("{}", client.status_text());
    return;
  }
  const bool in_place = command.watch && is_terminal();
  for (;;) {
    const std::string text = status_to_text(client.status());
    fmt::print("{}{}", in_place ? "\033[H\033[J" : "", text);
    if (!command.watch) return;
    if (!in_place) fmt::print("\n");
    std::fflush(stdout);
    std::this_thread::sleep_for(std::chrono::seconds(1));
  }
}

void run(ControlClient& client, const mirror::Set& changes) { client.set(changes); }

void run(ControlClient& client, Verb verb) {
  const std::string message = client.command(verb);
  if (!message.empty()) fmt::print("{}\n", message);
}

}  // namespace

int run_client(const ClientCommand& command) {
  try {
    ControlClient client(command.control, command.name);
    if (command.export_name) client.set_export(*command.export_name);
    std::visit([&client](const auto& action) { run(client, action); }, command.action);
  } catch (const ControlError& e) {
    fmt::print(stderr, "nbdferry: {}\n", e.what());
    return 1;
  }
  return 0;
}

}  // namespace nbdferry::proxy
