// Export: one served disk. Composes the core (mirror::Engine), the local disk, the target
// (transport::Target) and the ownership record, and gives sessions and operators their entrances.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mirror/engine.hpp"
#include "proxy/front.hpp"
#include "transport/tls.hpp"

namespace boost::asio {
class io_context;
}

namespace nbdferry::proxy {

struct ExportOptions {
  std::string disk;  // path of a raw file or block device
  std::string name;  // export name, "" by default
  bool read_only = false;
  bool direct = false;    // O_DIRECT
  bool incoming = false;  // take writes only from a migration until promoted
  std::optional<std::uint64_t> create_size;
  std::string state_directory;  // of what a restart goes on from; empty: the default one
};

struct MigrateRequest {
  std::vector<std::string> uris;  // paths to one export
  std::vector<std::string> vias;  // local addresses, as transport::TargetConfig's
  transport::TlsOptions tls;
  unsigned connections = 0;                            // per path; 0: chosen
  Duration answer_timeout = std::chrono::seconds(60);  // then a connection that hangs is given up
  mirror::MigrateOptions options;
};

struct PathStatus {
  std::string uri;
  std::string via;           // local address; empty: any
  std::string state;         // "connecting", "up", "down", "refused", "standby"
  unsigned connections = 0;  // living ones
  std::uint64_t sent_bytes = 0;
  std::uint64_t rtt_us = 0;  // smoothed request latency of small requests, 0 when unknown
};

struct ExportStatus {
  std::string name;
  std::string disk;
  std::string role;          // owner, incoming, retired, pivoted
  std::string peer;          // URIs of the target that owns or will own the disk, or empty
  std::string migration_id;  // or empty
  mirror::Status core;
  std::vector<PathStatus> paths;
  double guest_write_iops = 0;
  double guest_write_bytes_per_second = 0;
  double guest_read_iops = 0;
  std::uint64_t guest_delay_us = 0;  // pacing in force
  std::optional<double> eta_seconds;
  std::uint64_t bandwidth = 0;  // most bytes a second to the target; 0: what it takes
  std::string verdict;          // one line for a person
  std::uint32_t guest_connections = 0;
};

// The outcome of an operator's command: called once, at once or when the command has ended.
using CommandHandler = std::function<void(bool ok, std::string message)>;

enum class Verb : std::uint8_t {
  pause,
  resume,
  cancel,
  verify,
  acknowledge,
  prepare,
  seal,
  commit_pivot,
  commit_release,
  switch_pivot,
  switch_release,
  abort,
  promote,
  unfence,
};

class Export : public Front {
 public:
  // Throws std::runtime_error whose what() is "what failed: why".
  static std::unique_ptr<Export> open(boost::asio::io_context& io, const ExportOptions& options);

  virtual void migrate(MigrateRequest request, CommandHandler done) = 0;
  virtual void set(mirror::Set request, CommandHandler done) = 0;
  virtual void command(Verb verb, CommandHandler done) = 0;
  [[nodiscard]] virtual ExportStatus status() const = 0;

  // Graceful stop: no new sessions by now; finishes open requests, flushes the disk, closes the
  // target, then calls `done` (error text, empty when all is well).
  virtual void stop(std::function<void(std::string)> done) = 0;
};

}  // namespace nbdferry::proxy
