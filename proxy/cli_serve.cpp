// `serve`: one disk, its sockets, and the end of it all on SIGTERM or SIGINT.
//
// The order of the end: no new connections and commands; sessions finish what they took; the export
// flushes and lets go of the target; exit 0. A second signal ends it at once.
#include <csignal>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include <malloc.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <fmt/format.h>

#include "proxy/cli.hpp"
#include "proxy/control_server.hpp"
#include "proxy/listener.hpp"
#include "proxy/log.hpp"
#include "proxy/scheduling.hpp"
#include "proxy/units.hpp"

namespace nbdferry::proxy {
namespace {

constexpr int own_mapping_bytes = 36 * 1024;  // the payloads' spans are larger (mirror/payload.cpp)

class Serving {
 public:
  explicit Serving(const ServeCommand& command)
      : disk_(Export::open(io_, command.disk)),
        server_(io_, {disk_.get()}),
        control_(io_, command.control, {disk_.get()}),
        signals_(io_, SIGTERM, SIGINT) {
    std::string places;
    const auto add_place = [&places](const std::string& place) {
      places += (places.empty() ? "" : ", ") + place;
    };
    for (const std::string& path : command.sockets) {
      server_.listen_unix(path, command.socket_mode);
      add_place(path);
    }
    for (const ListenAddress& address : command.listens) {
      server_.listen_tcp(address.host, address.port);
      // Port 0: whoever asked for any port wants to know which one it is.
      add_place(fmt::format("{}:{}", address.host,
                            address.port == 0 ? server_.bound_port() : address.port));
    }
    log("serving {} ({}) on {}; control socket {}", command.disk.disk,
        format_size(static_cast<double>(disk_->info().size)), places, command.control);
  }

  // Until a signal; returns the exit code.
  int run() {
    wait_for_signal();
    io_.run();
    return exit_code_;
  }

 private:
  void wait_for_signal() {
    signals_.async_wait([this](const boost::system::error_code& error, int signal) {
      if (!error) stop(signal);
    });
  }

  void stop(int signal) {
    if (stopping_) {
      log("stopped at once by a second signal: requests may be unfinished, the disk unflushed");
      exit_code_ = 1;
      io_.stop();
      return;
    }
    stopping_ = true;
    log("stopping ({})", signal == SIGTERM ? "SIGTERM" : "SIGINT");
    wait_for_signal();
    server_.stop();
    control_.stop();
    server_.close_sessions(
        [this] { disk_->stop([this](const std::string& error) { stopped(error); }); });
  }

  void stopped(const std::string& error) {
    if (!error.empty()) {
      log("cannot stop cleanly: {}", error);
      exit_code_ = 1;
    }
    io_.stop();
  }

  boost::asio::io_context io_{1};
  std::unique_ptr<Export> disk_;
  Server server_;
  ControlServer control_;
  boost::asio::signal_set signals_;
  bool stopping_ = false;
  int exit_code_ = 0;
};

}  // namespace

int run_serve(const ServeCommand& command) {
  // Large buffers get mappings of their own and go back to the kernel when they are freed. Left to
  // itself the heap raises this at the first such free, and keeps what lies between two live ones.
  mallopt(M_MMAP_THRESHOLD, own_mapping_bytes);
  ask_for_short_turns();
  // A client that is gone is an error of its write, not the end of the process.
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // a write beyond a file size limit is an error of that write
  try {
    return Serving(command).run();
  } catch (const std::exception& e) {
    log_line(e.what());
    return 1;
  }
}

}  // namespace nbdferry::proxy
