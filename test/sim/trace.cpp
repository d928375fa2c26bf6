#include "test/sim/trace.hpp"

#include <cstdio>

namespace nbdferry::sim {

namespace {

template <typename Id>
std::uint64_t number(Id id) {
  return static_cast<std::uint64_t>(id);
}

std::string_view name(mirror::SwitchKind kind) {
  return kind == mirror::SwitchKind::pivot ? "pivot" : "release";
}

struct EventText {
  using S = std::string;
  S operator()(const mirror::GuestRequest& e) const {
    return fmt::format("guest {} #{} {}{}{}{}", to_string(e.command), number(e.id),
                       describe(e.range), e.fua ? " fua" : "", e.no_hole ? " no_hole" : "",
                       e.fast_zero ? " fast" : "");
  }
  S operator()(const mirror::SourceDone& e) const {
    return fmt::format("source done {} {}{}", number(e.id), to_string(e.error),
                       e.changed ? "" : " unchanged");
  }
  S operator()(const mirror::TargetDone& e) const {
    return fmt::format("target done {} {}", number(e.id), to_string(e.error));
  }
  S operator()(const mirror::TargetUp& e) const {
    return fmt::format("target up: window {} ops {} bytes, block_min {} payload_max {}{}{}{}{}",
                       e.window_ops, e.window_bytes, e.info.block_min, e.info.payload_max,
                       e.info.can_flush ? " flush" : "", e.info.can_zero ? " zero" : "",
                       e.info.can_trim ? " trim" : "", e.info.has_allocation ? " allocation" : "") +
           (e.info.can_checksum ? " checksum" : "") + (e.info.proven ? " proven" : "");
  }
  S operator()(const mirror::TargetWindow& e) const {
    return fmt::format("target window: {} ops {} bytes", e.window_ops, e.window_bytes);
  }
  S operator()(const mirror::TargetLost&) const { return "target lost"; }
  S operator()(const mirror::TargetRefused&) const { return "target refused"; }
  S operator()(const mirror::TargetClosed&) const { return "target closed"; }
  S operator()(const mirror::PathFound& e) const {
    return fmt::format("path {} found{}", number(e.path), e.known ? ", known" : "");
  }
  S operator()(const mirror::PathLost&) const { return "path lost"; }
  S operator()(const mirror::PathRefused&) const { return "path refused"; }
  S operator()(const mirror::RecordWritten& e) const {
    return fmt::format("record written: {}", e.ok);
  }
  S operator()(const mirror::Tick&) const { return "tick"; }
  S operator()(const mirror::Start& e) const {
    return fmt::format("operator {}: start, {} buffer {} switch {}{}", number(e.command),
                       to_string(e.options.mode), e.options.buffer_bytes,
                       static_cast<int>(e.options.switch_when),
                       e.options.skip_unreadable ? " skip_unreadable" : "") +
           (e.resumed ? " resumed" : "") + (e.options.verify ? " verify" : "");
  }
  S operator()(const mirror::Pause& e) const { return command(e.command, "pause"); }
  S operator()(const mirror::Resume& e) const { return command(e.command, "resume"); }
  S operator()(const mirror::Cancel& e) const { return command(e.command, "cancel"); }
  S operator()(const mirror::Verify& e) const { return command(e.command, "verify"); }
  S operator()(const mirror::Prepare& e) const { return command(e.command, "prepare"); }
  S operator()(const mirror::Seal& e) const { return command(e.command, "seal"); }
  S operator()(const mirror::Commit& e) const {
    return fmt::format("operator {}: commit {}", number(e.command), name(e.kind));
  }
  S operator()(const mirror::Switch& e) const {
    return fmt::format("operator {}: switch {}", number(e.command), name(e.kind));
  }
  S operator()(const mirror::Abort& e) const { return command(e.command, "abort"); }
  S operator()(const mirror::KeepState&) const { return "keep state"; }
  S operator()(const mirror::KeepJournal& e) const {
    return fmt::format("keep journal: {} bytes", e.memory.size());
  }
  S operator()(const mirror::ServeTarget&) const { return "serve target"; }
  S operator()(const mirror::Suspend& e) const { return command(e.command, "suspend"); }
  S operator()(const mirror::Unfence& e) const { return command(e.command, "unfence"); }
  S operator()(const mirror::Set& e) const {
    return fmt::format("operator {}: set{}{}", number(e.command),
                       e.mode ? " mode " + std::string(to_string(*e.mode)) : "",
                       e.buffer_bytes ? fmt::format(" buffer {}", *e.buffer_bytes) : "");
  }
  static S command(CommandId id, std::string_view what) {
    return fmt::format("operator {}: {}", number(id), what);
  }
};

struct ActionText {
  using S = std::string;
  S operator()(const mirror::SubmitSource& a) const { return "  source " + describe(a.op); }
  S operator()(const mirror::SubmitTarget& a) const { return "  target " + describe(a.op); }
  S operator()(const mirror::Reply& a) const {
    return fmt::format("  reply #{} {}", number(a.id), to_string(a.error));
  }
  S operator()(const mirror::OpenTarget&) const { return "  open target"; }
  S operator()(const mirror::CloseTarget&) const { return "  close target"; }
  S operator()(const mirror::UsePath& a) const {
    return fmt::format("  use path {}", number(a.path));
  }
  S operator()(const mirror::RefusePath& a) const {
    return fmt::format("  refuse path {}: {}", number(a.path), a.reason);
  }
  S operator()(const mirror::LeavePath& a) const {
    return fmt::format("  leave path {}", number(a.path));
  }
  S operator()(const mirror::WriteRecord& a) const {
    return fmt::format("  write record: {}", name(a.kind));
  }
  S operator()(const mirror::Ended&) const { return "  ended"; }
  S operator()(const mirror::LetGo& a) const { return fmt::format("  let go, keep {}", a.keep); }
  S operator()(const mirror::CommandDone& a) const {
    return fmt::format("  command {} {}: {}", number(a.command), a.ok ? "ok" : "failed", a.message);
  }
  S operator()(const mirror::Notice& a) const { return "  notice: " + a.text; }
};

}  // namespace

void Trace::add(std::string line) {
  if (level_ == Level::live) {
    std::puts(line.c_str());
    return;
  }
  lines_.push_back(std::move(line));
  if (lines_.size() > lines_max) lines_.pop_front();
}

void Trace::print_tail() const {
  for (const auto& line : lines_) std::puts(line.c_str());
  std::fflush(stdout);
}

std::string describe(ByteRange range) { return fmt::format("[{}, {})", range.begin, range.end); }

std::string describe(const mirror::DiskOp& op) {
  return fmt::format("{} {} {}{}{}{}", to_string(op.command), number(op.id), describe(op.range),
                     op.fua ? " fua" : "", op.may_hole ? "" : " no_hole",
                     op.fast_only ? " fast" : "") +
         (op.path != PathId{} ? fmt::format(" by path {}", number(op.path)) : "");
}

std::string describe(const mirror::Event& event) { return std::visit(EventText{}, event); }
std::string describe(const mirror::Action& action) { return std::visit(ActionText{}, action); }

}  // namespace nbdferry::sim
