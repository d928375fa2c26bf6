// Target: the remote NBD endpoint as the core's disk. Owns the paths to it and their connections (libnbd
// handles), spreads operations over them, replaces lost ones, and speaks mirror's events.
//
// What must hold: DESIGN.md rules 4, 7 and 8 (no duplicate descriptor outlives its handle, sockets
// are closed with a reset, every operation submitted is answered exactly once).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <boost/asio/any_io_executor.hpp>

#include "mirror/events.hpp"
#include "transport/tls.hpp"

namespace nbdferry::transport {

struct TargetConfig {
  std::vector<std::string> uris;  // paths to one export
  // Local addresses to connect from: none, one for each URI, or several for the one URI.
  std::vector<std::string> vias;
  TlsOptions tls;
  bool known = false;             // all of these were proved to lead to the same export
  unsigned connections = 0;       // of each path; 0: chosen (with multi-conn 4 at first, else 1)
  std::uint64_t size_wanted = 0;  // refuse a smaller export
  std::string migration_id;       // asked for as "x-nbdferry:migration=<id>"; empty: not asked
  bool patient = false;           // the first attempt may fail, too: tried again as after a loss
  Duration connect_timeout = std::chrono::seconds(10);
  // A connection with requests in flight on which nothing moves for so long is given up. Longer than a
  // slow disk's flush, and than a server that stops for a while and goes on.
  Duration answer_timeout = std::chrono::seconds(60);
  // One path says nothing for so long, while another one answers: it is given up. Shorter than the timeouts
  // of the guests' disks, longer than a server's pause.
  Duration path_silence = std::chrono::seconds(10);
};

struct PathState {
  std::string uri;
  std::string via;  // empty: any address of ours
  // "connecting", "up", "down", "refused", "standby" (the target takes one connection at a time)
  std::string state;
  bool known = false;            // it was proved to lead to the target
  unsigned connections = 0;      // living
  std::uint64_t sent_bytes = 0;  // payload bytes of answered writes and zeroes sent as data
  std::uint64_t rtt_us = 0;      // smoothed, of requests up to 16 KiB; 0: unknown
  bool nbdferry = false;         // the migration context was accepted
};

// Receives TargetUp, TargetWindow, TargetLost, TargetRefused, TargetClosed, TargetDone, and Path…. Never
// called from inside a member function of Target: always from the executor.
using EventHandler = std::function<void(mirror::Event&&)>;

inline constexpr std::size_t paths_max = 16;

class Target {
 public:
  virtual ~Target() = default;

  // Connect: TargetUp, or TargetRefused when the first attempt fails. That tries one path after the other:
  // a nbdferry target is claimed by the first connection, and the others may lead elsewhere. After TargetUp the target
  // reconnects by itself with backoff until close(), and is refused only if it comes back smaller
  // or read-only. After TargetRefused or close() it may be opened again.
  virtual void open() = 0;

  // Valid between TargetUp and TargetLost/TargetClosed, within the window; else answered as lost.
  virtual void submit(mirror::DiskOp&& op) = 0;

  // Everything in flight is answered as lost, then TargetClosed.
  virtual void close() = 0;

  // The answers to PathFound. One that is there no more is not missed.
  virtual void use(PathId path) = 0;
  virtual void refuse(PathId path, const std::string& reason) = 0;
  virtual void leave(PathId path) = 0;

  [[nodiscard]] virtual std::vector<PathState> paths() const = 0;

  // Throws std::invalid_argument ("what: why: what to do") for URIs or addresses that won't do.
  static std::unique_ptr<Target> create(boost::asio::any_io_executor executor, TargetConfig config,
                                        EventHandler on_event);
};

}  // namespace nbdferry::transport
