#include "transport/flushes.hpp"

#include <algorithm>

#include "mirror/assert.hpp"

namespace nbdferry::transport {

void Flushes::start(OpId id, const std::vector<Path*>& paths) {
  Flush& flush = flushes_[id];
  for (Path* path : paths) flush.waits.emplace_back(path, path->writes());
}

std::optional<mirror::TargetDone> Flushes::answered(Path& path, mirror::TargetDone&& done,
                                                    Clock::time_point now) {
  const auto it = flushes_.find(done.id);
  NBDFERRY_ASSERT(it != flushes_.end(), "what is answered was asked");
  auto& [waits, error, answered_at] = it->second;
  const auto of_path = std::find_if(waits.begin(), waits.end(),
                                    [&](const auto& wait) { return wait.first == &path; });
  NBDFERRY_ASSERT(of_path != waits.end(), "a path answers a flush once");
  if (done.error == IoError::none) path.flushed(of_path->second);
  if (error == IoError::none) error = done.error;
  waits.erase(of_path);
  answered_at = now;
  if (!waits.empty()) return std::nullopt;
  done.error = error;
  flushes_.erase(it);
  return std::move(done);
}

bool Flushes::excuse(const Path& path, Duration silence, Clock::time_point now) const {
  return std::any_of(flushes_.begin(), flushes_.end(), [&](const auto& entry) {
    const Flush& flush = entry.second;
    const bool waits = std::any_of(flush.waits.begin(), flush.waits.end(),
                                   [&](const auto& wait) { return wait.first == &path; });
    return waits && (!flush.answered_at || now - *flush.answered_at < silence);
  });
}

}  // namespace nbdferry::transport
