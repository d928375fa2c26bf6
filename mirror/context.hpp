// What every part of the core shares while an event is applied: the time, the actions so far, and
// the source of operation ids. Internal to mirror/.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "mirror/engine.hpp"

namespace nbdferry::mirror {

// Which part of the core an operation belongs to; travels in the low bits of its id.
enum class OpKind : std::uint8_t {
  guest,     // a guest's own operation, on the source or (pivoted) on the target
  readback,  // source read of whole target blocks after a guest write that covers part of them
  copy,      // the copier's, on either side
  hint,      // where are the holes ahead? (never relied upon)
  mirrored,  // a guest write on its way to the target
  verify,    // the verifier's reads, on either side
  flush,     // of the target
  replay,    // pivoted: retained writes again
  proof,     // of a path: a nonce is written, and read through it
};

struct Context {
  EngineConfig config;
  Counters counters;
  Time now{0};
  Actions* out = nullptr;
  std::vector<OpId> settle;  // guest requests that may have ended: the engine looks after the event

  [[nodiscard]] OpId new_op(OpKind kind) {
    return OpId{(++last_op_ << 4) | static_cast<std::uint64_t>(kind)};
  }
  [[nodiscard]] static OpKind kind_of(OpId id) {
    return static_cast<OpKind>(static_cast<std::uint64_t>(id) & 15);
  }

  void submit_source(DiskOp op) { out->emplace_back(SubmitSource{std::move(op)}); }
  void submit_target(DiskOp op) { out->emplace_back(SubmitTarget{std::move(op)}); }
  void notice(std::string text) { out->emplace_back(Notice{std::move(text)}); }
  void done(CommandId command, bool ok, std::string message = {}) {
    out->emplace_back(CommandDone{command, ok, std::move(message)});
  }

 private:
  std::uint64_t last_op_ = 0;
};

}  // namespace nbdferry::mirror
