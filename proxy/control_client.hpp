// The control socket's client: one request after another, waited for. For the command line.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include <boost/json/fwd.hpp>

#include "proxy/export.hpp"

namespace nbdferry::proxy {

// what() is "what failed: why".
struct ControlError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class ControlClient {
 public:
  // `what` opens the messages of refusals: "migrate" gives "migrate: a migration is under way".
  ControlClient(std::string socket_path, std::string what);
  ~ControlClient();

  void set_export(std::string name) { export_name_ = std::move(name); }

  // Each throws ControlError: nobody serves the socket, no answer in time, or the server's refusal.
  // They return what the server said.
  [[nodiscard]] ExportStatus status();
  [[nodiscard]] std::string status_text();  // the JSON as the server sent it
  std::string migrate(const MigrateRequest& request);
  std::string set(const mirror::Set& request);
  std::string command(Verb verb);  // waits until the command has ended, however long

 private:
  struct Link;
  std::string exchange(const char* method, const std::string& target, std::string body,
                       std::optional<std::chrono::seconds> timeout);
  std::string post(const char* path, boost::json::object body,
                   std::optional<std::chrono::seconds> timeout);

  std::string path_;
  std::string what_;
  std::optional<std::string> export_name_;
  std::unique_ptr<Link> link_;  // kept while the server keeps it
};

}  // namespace nbdferry::proxy
