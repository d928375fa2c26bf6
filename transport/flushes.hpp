// Flushes on their way: each is asked on every path that is used, for each may lead to a server of its own over
// the same disk, and is good when all of them have said so.
#pragma once

#include <chrono>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "transport/path.hpp"

namespace nbdferry::transport {

class Flushes {
 public:
  using Clock = std::chrono::steady_clock;

  // Each of `paths`, at least one, will answer it.
  void start(OpId id, const std::vector<Path*>& paths);
  [[nodiscard]] bool contains(OpId id) const { return flushes_.contains(id); }
  // What a path answered. The last answer is the flush's: the first error, if there was one.
  [[nodiscard]] std::optional<mirror::TargetDone> answered(Path& path, mirror::TargetDone&& done,
                                                           Clock::time_point now);
  // A flush may take long: is this path asked one that no other path has answered for so long?
  [[nodiscard]] bool excuse(const Path& path, Duration silence, Clock::time_point now) const;

 private:
  struct Flush {
    std::vector<std::pair<Path*, std::uint64_t>> waits;  // and the writes that it covers there
    IoError error = IoError::none;
    std::optional<Clock::time_point> answered_at;  // by a path, last
  };
  std::map<OpId, Flush> flushes_;
};

}  // namespace nbdferry::transport
