// The target as one disk: spreads operations over paths and their connections, has what replaces a lost one
// judged, and decides when the server may have restarted.
//
//   idle -> seeking -> up -> seeking -> up …        lost: up -> seeking
//              |                                    any -> closed by close(); open() starts again
//              v
//           refused     (the first attempt failed, or what came back can't be this target)
//
// While seeking one connection of each known path is tried; before any is known, one path after the other,
// for the first connection claims a nbdferry target, and nothing of what a wrong path leads to may change.
// The first one that is ready brings TargetUp. The other paths, each time that they come, have to prove that
// they lead to the same export before they are used: a nbdferry target knows our session, which is random;
// for another one the core finds out (PathFound).
//
// What must hold:
//  - Events leave in the order in which they arose, from the executor, never from inside a member
//    function of Target.
//  - TargetLost is said when no path is left with a connection of which it is certain that it belongs to
//    the server instance that answered so far (rule 7; path.hpp).
//  - A flush is answered well when it was on every path that is used (flushes.hpp). PathLost says whether one
//    wrote since the last good one.
#include "transport/target.hpp"

#include <algorithm>
#include <deque>
#include <optional>
#include <random>
#include <stdexcept>
#include <tuple>

#include <boost/asio/post.hpp>
#include <fmt/format.h>

#include "mirror/assert.hpp"
#include "transport/flushes.hpp"
#include "transport/path.hpp"
#include "transport/uri.hpp"

namespace nbdferry::transport {

namespace {

// With multi-conn, when the operator names no number: at first, and at most.
constexpr unsigned connections_first = 4;
constexpr unsigned connections_grown = 16;
constexpr unsigned connections_max = 64;
// What one connection may have in flight. Large enough to keep a fast server busy, small enough
// that a mirrored write does not wait long behind bulk data.
constexpr std::uint32_t connection_ops_max = 64;
constexpr std::uint64_t connection_bytes_max = 8ULL * 1024 * 1024;
// Connections of all paths together, unless the operator names a number: servers have limits, too.
constexpr unsigned connections_sum = 32;
// Attempts in a row, with growing pauses between them, then a path that was never proved is refused. One that
// was may be denied by a server that restarted, while older connections have not noticed.
constexpr unsigned denials_max = 4;
constexpr int checks_per_silence = 10;
// What is sent in a turn of the loop.
constexpr std::size_t send_ops_max = 64;
constexpr std::uint64_t send_bytes_max = 512ULL * 1024;

// A nbdferry target lets go of the connections of older sessions when it sees a new one.
std::string new_session() {
  std::random_device random;
  return fmt::format("{:08x}{:08x}", random(), random());
}

// What no replacement may change, because the core has been told otherwise.
bool same(const mirror::TargetInfo& a, const mirror::TargetInfo& b) {
  const auto key = [](const mirror::TargetInfo& i) {
    return std::tuple(i.size, i.block_min, i.payload_max, i.read_only, i.can_flush, i.can_fua,
                      i.can_trim, i.can_zero, i.has_allocation, i.can_checksum);
  };
  return key(a) == key(b);
}

class State final : public PathOwner, public std::enable_shared_from_this<State> {
 public:
  State(boost::asio::any_io_executor executor, TargetConfig config, std::vector<Endpoint> endpoints,
        EventHandler on_event);

  void open();
  void submit(mirror::DiskOp&& op);
  void close();
  void abandon();
  void use(PathId id);
  void refuse_path(PathId id, const std::string& reason);
  void leave_path(PathId id);
  [[nodiscard]] std::vector<PathState> paths() const;

  void on_reached(Path& path) override;
  void on_unreached(Path& path, const std::string& reason) override;
  void on_window() override;
  void on_answer(Path& path, mirror::TargetDone&& done) override;
  void on_lost(Path& path, const std::string& reason) override;
  void on_settled() override { emit(); }
  [[nodiscard]] bool may_join(const Offer& offer) const override {
    return same(offer.info, offer_.info) && offer.multi_conn == offer_.multi_conn;
  }
  [[nodiscard]] std::uint64_t submissions() const override { return submissions_; }

 private:
  using Clock = std::chrono::steady_clock;
  enum class Phase : std::uint8_t { idle, seeking, up, refused, closed };

  void send_soon();
  void send_some();
  void send_all();
  void send_first(Clock::time_point now);
  void seek(bool later);
  void came_up(Path& path);
  void judge(Path& path);
  void watch();
  void end_stalled();
  [[nodiscard]] bool is_stalled(const Path& path) const;
  void deny(Path& path, const std::string& why);
  void take_in(Path& path);
  void refuse_path(Path& path, const std::string& why);
  void refuse(const std::string& why);
  void rest_all();
  [[nodiscard]] std::string misfit(const mirror::TargetInfo& info) const;
  [[nodiscard]] ConnectionGrowth connections_wanted() const;
  [[nodiscard]] Path* asked_for(PathId id) const;
  [[nodiscard]] Path* choose(const mirror::DiskOp& op, Clock::time_point now) const;
  [[nodiscard]] bool flush(const mirror::DiskOp& op, Clock::time_point now);
  bool answer_here(const mirror::DiskOp& op);
  [[nodiscard]] const char* state_of(const Path& path) const;
  [[nodiscard]] unsigned living() const;
  [[nodiscard]] mirror::TargetWindow window() const {
    return {living() * connection_ops_max, living() * connection_bytes_max};
  }
  void emit_soon();
  void emit();

  boost::asio::any_io_executor executor_;
  const TargetConfig config_;
  EventHandler on_event_;
  Phase phase_ = Phase::idle;
  std::string session_;  // as long as some connection lives that is older than a loss
  bool was_up_ = false;
  bool silent_ = false;  // the Target is gone
  Offer offer_;          // of the first connection since TargetUp
  std::vector<std::shared_ptr<Path>> paths_;
  Path* main_ = nullptr;  // the one that was there first, for messages
  std::uint64_t submissions_ = 0;
  std::uint64_t last_id_ = 0;  // of a path that was found
  Flushes flushes_;
  boost::asio::steady_timer silence_timer_;

  std::deque<mirror::DiskOp> inbox_;  // submitted, and on no path yet
  bool send_posted_ = false;
  std::vector<mirror::Event> outbox_;
  std::optional<mirror::Event> last_word_;  // TargetLost or TargetClosed: once all is answered
  bool emit_posted_ = false;
  bool emitting_ = false;
};

State::State(boost::asio::any_io_executor executor, TargetConfig config,
             std::vector<Endpoint> endpoints, EventHandler on_event)
    : executor_(std::move(executor)),
      config_(std::move(config)),
      on_event_(std::move(on_event)),
      silence_timer_(executor_) {
  for (auto& endpoint : endpoints) {
    paths_.push_back(std::make_shared<Path>(executor_, std::move(endpoint), config_, *this));
    paths_.back()->known = config_.known;
  }
}

// --- events
// ---------------------------------------------------------------------------------------

void State::emit_soon() {
  if (emit_posted_ || (outbox_.empty() && !last_word_)) return;
  emit_posted_ = true;
  boost::asio::post(executor_, [self = shared_from_this()] {
    self->emit_posted_ = false;
    self->emit();
  });
}

// From the executor only. The handler may call us, and may destroy the Target.
void State::emit() {
  if (emitting_) return;
  const auto self = shared_from_this();
  emitting_ = true;
  std::vector<mirror::Event> batch;
  while (!silent_ && (!outbox_.empty() || last_word_)) {
    if (outbox_.empty()) {
      send_all();
      if (!outbox_.empty()) continue;
      outbox_.push_back(std::move(*last_word_));
      last_word_.reset();
    }
    batch.swap(outbox_);
    for (auto& event : batch) {
      if (silent_) break;
      on_event_(std::move(event));
    }
    batch.clear();
  }
  emitting_ = false;
}

// --- life
// -----------------------------------------------------------------------------------------

void State::open() {
  NBDFERRY_ASSERT(phase_ != Phase::seeking && phase_ != Phase::up, "a target is opened once");
  phase_ = Phase::seeking;
  was_up_ = false;
  session_ = new_session();
  seek(false);
}

void State::seek(bool later) {
  bool any = false;
  for (const auto& path : paths_) {
    if (!was_up_) path->forget_failure();  // all get their turn
    if (!path->known || path->stage() == Path::Stage::refused) continue;
    path->seek(session_, later);
    any = true;
  }
  if (!any) paths_.front()->seek(session_, later);  // the others follow if it can't be reached
}

void State::on_reached(Path& path) {
  if (phase_ == Phase::seeking) {
    came_up(path);
  } else {
    judge(path);
  }
}

void State::on_unreached(Path& path, const std::string& reason) {
  if (phase_ == Phase::up) {
    path.probe(session_, true);
    return;
  }
  if (was_up_) {
    path.seek(session_, true);
    return;
  }
  const auto next = std::find_if(paths_.begin(), paths_.end(), [](const auto& p) {
    return p->stage() != Path::Stage::refused && p->failure().empty();
  });
  const bool others = std::any_of(paths_.begin(), paths_.end(),
                                  [](const auto& p) { return p->stage() == Path::Stage::seeking; });
  if (others) return;
  if (next != paths_.end()) {
    (*next)->seek(session_, false);
  } else if (config_.patient) {
    seek(true);
  } else {
    std::string why = reason;
    for (const auto& p : paths_) {
      if (p.get() != &path) why += fmt::format("; {}: {}", p->endpoint().name(), p->failure());
    }
    main_ = &path;
    refuse(why);
  }
}

// Why this export can't be the target; empty when it can.
std::string State::misfit(const mirror::TargetInfo& info) const {
  if (info.read_only) return "the export is read-only: serve it writable";
  if (info.size < config_.size_wanted) {
    return fmt::format("the export is smaller than the disk ({} bytes, {} needed): enlarge it",
                       info.size, config_.size_wanted);
  }
  return {};
}

ConnectionGrowth State::connections_wanted() const {
  if (!offer_.multi_conn) return {1, 1};
  if (config_.connections == 0) {
    const auto share = std::max(1U, connections_sum / static_cast<unsigned>(paths_.size()));
    return {std::min(connections_first, share), std::min(connections_grown, share)};
  }
  const unsigned named = std::min(config_.connections, connections_max);
  return {named, named};
}

void State::came_up(Path& path) {
  const auto why = misfit(path.offer().info);
  if (!why.empty()) {
    const bool others = std::any_of(paths_.begin(), paths_.end(), [&](const auto& p) {
      return p.get() != &path && p->known && p->stage() != Path::Stage::refused;
    });
    if (was_up_ && others) {
      refuse_path(path, why);
    } else {
      main_ = &path;
      refuse(why);
    }
    return;
  }
  main_ = &path;
  phase_ = Phase::up;
  was_up_ = true;
  offer_ = path.offer();
  path.use(connections_wanted(), true);
  const auto w = window();
  outbox_.emplace_back(mirror::TargetUp{offer_.info, w.window_ops, w.window_bytes});
  for (const auto& other : paths_) {
    if (other.get() == &path || other->stage() == Path::Stage::refused) continue;
    other->rest();
    other->denials = 0;
    // One connection at a time: what was proved waits until it is needed.
    if (offer_.multi_conn || !other->known) other->probe(session_, false);
  }
  if (paths_.size() > 1) watch();
}

// Another path has a connection, which has claimed nothing.
void State::judge(Path& path) {
  const Offer& offer = path.offer();
  if (!may_join(offer)) {
    deny(path, "the export there has another size, or offers something else");
  } else if (!offer_.info.incoming) {
    if (!path.known && ++path.denials > denials_max) {
      refuse_path(path, "it is reached, and never answers");
      return;
    }
    path.id = PathId{++last_id_};
    mirror::PathFound found{path.id, {}, path.known};
    std::random_device random;
    for (auto& byte : found.nonce) byte = static_cast<std::byte>(random());
    outbox_.emplace_back(found);
  } else if (offer.knows_session) {
    take_in(path);
  } else {
    deny(path, "the server there does not know this migration");
  }
}

void State::deny(Path& path, const std::string& why) {
  if (!path.known && ++path.denials >= denials_max) {
    refuse_path(path, why);
    return;
  }
  path.rest();
  path.probe(session_, true);
}

void State::take_in(Path& path) {
  if (!offer_.multi_conn) {
    path.known = true;
    path.rest();
    return;
  }
  // An incoming target takes writes only from connections that have claimed it.
  path.use(connections_wanted(), !offer_.info.incoming);
  on_window();
}

void State::refuse_path(Path& path, const std::string& why) {
  path.refuse();
  const auto& first = main_->endpoint();
  const auto like = main_ == &path ? std::string{}
                                   : fmt::format(" (it should be the export of {})", first.name());
  outbox_.emplace_back(mirror::PathRefused{
      fmt::format("the path {} is not used: {}{}: check the servers, and start again",
                  path.endpoint().name(), why, like)});
}

Path* State::asked_for(PathId id) const {
  const auto it = std::find_if(paths_.begin(), paths_.end(), [&](const auto& path) {
    return path->id == id && path->stage() == Path::Stage::reached;
  });
  return id == PathId{} || it == paths_.end() ? nullptr : it->get();
}

void State::use(PathId id) {
  if (Path* path = asked_for(id)) take_in(*path);
  emit_soon();
}

void State::refuse_path(PathId id, const std::string& reason) {
  if (Path* path = asked_for(id)) refuse_path(*path, reason);
  emit_soon();
}

void State::leave_path(PathId id) {
  if (Path* path = asked_for(id)) {
    if (!path->known) --path->denials;  // it was not asked to the end
    path->rest();
    path->probe(session_, true);
  }
  emit_soon();
}

// --- a path that says nothing

void State::watch() {
  silence_timer_.expires_after(config_.path_silence / checks_per_silence);
  silence_timer_.async_wait([weak = weak_from_this()](const boost::system::error_code& error) {
    const auto self = weak.lock();
    if (!self || error || self->phase_ != Phase::up) return;
    self->end_stalled();
    self->emit();
    if (self->phase_ == Phase::up) self->watch();
  });
}

void State::end_stalled() {
  for (const auto& path : paths_) {
    if (is_stalled(*path)) path->give_up("no answer, while other paths answer");
  }
}

// Each answers the others' questions, too: what is slow is slow by all of them. A flush may take long, until
// another path has had its answer.
bool State::is_stalled(const Path& path) const {
  const auto now = Clock::now();
  if (path.stage() != Path::Stage::used || path.ops() == 0) return false;
  if (now - path.answered_at() < config_.path_silence) return false;
  if (flushes_.excuse(path, config_.path_silence, now)) return false;
  return std::any_of(paths_.begin(), paths_.end(), [&](const auto& other) {
    return other.get() != &path && other->certain() &&
           now - other->heard_at() < config_.path_silence / 2;
  });
}

void State::on_window() {
  if (phase_ == Phase::up) outbox_.emplace_back(window());
}

// The core decides anew once the target is up, or goes on by the others.
void State::on_lost(Path& path, const std::string& reason) {
  const std::string what = fmt::format("{}: {}", path.endpoint().name(), reason);
  const bool left =
      std::any_of(paths_.begin(), paths_.end(), [](const auto& p) { return p->certain(); });
  if (left) {
    outbox_.emplace_back(mirror::PathLost{what, path.unflushed()});
    path.probe(session_, true);
    return;
  }
  rest_all();
  phase_ = Phase::seeking;
  session_ = new_session();
  last_word_ = mirror::TargetLost{what};
  seek(true);
}

void State::refuse(const std::string& why) {
  rest_all();
  phase_ = Phase::refused;
  outbox_.emplace_back(mirror::TargetRefused{fmt::format("{}: {}", main_->endpoint().name(), why)});
}

void State::rest_all() {
  for (const auto& path : paths_) path->rest();
}

void State::close() {
  // First: what is answered lost here is not to be sent again.
  outbox_.emplace_back(mirror::TargetWindow{0, 0});
  rest_all();
  phase_ = Phase::closed;
  last_word_ = mirror::TargetClosed{};
  emit_soon();
}

void State::abandon() {
  silent_ = true;
  inbox_.clear();
  rest_all();
}

// --- operations
// -----------------------------------------------------------------------------------

// Later, from a turn of its own: sending takes time, and what the core has just told the guest goes first.
void State::submit(mirror::DiskOp&& op) {
  inbox_.push_back(std::move(op));
  send_soon();
}

void State::send_soon() {
  if (std::exchange(send_posted_, true)) return;
  boost::asio::post(executor_, [self = shared_from_this()] {
    self->send_posted_ = false;
    self->send_some();
    self->emit();
  });
}

// Not all at once: the guest's requests get in between.
void State::send_some() {
  if (inbox_.size() > 1) {
    for (const auto& path : paths_) path->begin_batch();
  }
  const auto now = Clock::now();
  std::uint64_t bytes = 0;
  for (std::size_t ops = 0; ops < send_ops_max && bytes < send_bytes_max && !inbox_.empty();
       ++ops) {
    bytes += inbox_.front().payload.size();
    send_first(now);
  }
  for (const auto& path : paths_) path->end_batch();
  if (!inbox_.empty()) send_soon();
}

void State::send_all() {
  const auto now = Clock::now();
  while (!inbox_.empty()) send_first(now);
}

void State::send_first(Clock::time_point now) {
  mirror::DiskOp op = std::move(inbox_.front());
  inbox_.pop_front();
  if (answer_here(op)) return;
  if (op.command == Command::flush) {
    if (flush(op, now)) return;
  } else if (Path* path = choose(op, now); path != nullptr) {
    path->post(std::move(op), ++submissions_, now);
    return;
  }
  outbox_.emplace_back(mirror::TargetDone{op.id, IoError::lost, {}, {}});
}

// What needs no server, or can't be asked of this one.
bool State::answer_here(const mirror::DiskOp& op) {
  if (phase_ != Phase::up) return false;
  mirror::TargetDone done{op.id, IoError::none, {}, {}};
  switch (op.command) {
    case Command::cache:
      break;
    case Command::flush:
      if (offer_.info.can_flush) return false;
      break;
    case Command::block_status:
      if (offer_.info.has_allocation) return false;
      done.extents.push_back({op.range.length(), false, false});
      break;
    case Command::checksum:
      if (offer_.info.can_checksum) return false;
      done.error = IoError::not_supported;
      break;
    case Command::trim:
      if (offer_.info.can_trim) return false;
      done.error = IoError::not_supported;
      break;
    case Command::zero:
      if (!op.fast_only || offer_.can_fast_zero) return false;
      done.error = IoError::not_supported;
      break;
    default:
      return false;
  }
  outbox_.emplace_back(std::move(done));
  return true;
}

// The path by which it is through first: so unequal ones each carry what they can, and what is small does
// not wait behind bulk on a slow one.
Path* State::choose(const mirror::DiskOp& op, Clock::time_point now) const {
  if (op.path != PathId{}) return asked_for(op.path);
  if (paths_.size() == 1) {
    return paths_.front()->can_take(op.command) ? paths_.front().get() : nullptr;
  }
  double fastest = 0;
  for (const auto& path : paths_) fastest = std::max(fastest, path->rate(now));
  if (fastest == 0) fastest = 1e9;
  Path* best = nullptr;
  std::pair<bool, double> best_rank;
  for (const auto& path : paths_) {
    if (!path->can_take(op.command)) continue;
    const auto rank = path->rank(op.range.length(), fastest, now);
    if (best != nullptr && rank >= best_rank) continue;
    best = path.get();
    best_rank = rank;
  }
  return best;
}

bool State::flush(const mirror::DiskOp& op, Clock::time_point now) {
  std::vector<Path*> paths;
  for (const auto& path : paths_) {
    if (path->can_take(Command::flush)) paths.push_back(path.get());
  }
  if (paths.empty()) return false;
  flushes_.start(op.id, paths);
  for (Path* path : paths) path->post(mirror::DiskOp(op), ++submissions_, now);
  return true;
}

void State::on_answer(Path& path, mirror::TargetDone&& done) {
  if (!flushes_.contains(done.id)) {
    outbox_.emplace_back(std::move(done));
  } else if (auto whole = flushes_.answered(path, std::move(done), Clock::now())) {
    outbox_.emplace_back(std::move(*whole));
  }
}

// --- state
// -----------------------------------------------------------------------------------------

unsigned State::living() const {
  unsigned sum = 0;
  for (const auto& path : paths_) sum += path->living();
  return sum;
}

const char* State::state_of(const Path& path) const {
  if (path.stage() == Path::Stage::refused) return "refused";
  if (path.living() != 0) return "up";
  if (phase_ == Phase::seeking && !was_up_) return "connecting";
  if (phase_ != Phase::up) return "down";
  if (!offer_.multi_conn && path.known) return "standby";
  return path.failure().empty() ? "connecting" : "down";
}

std::vector<PathState> State::paths() const {
  std::vector<PathState> out;
  for (const auto& path : paths_) {
    PathState& state = out.emplace_back();
    state.uri = path->endpoint().uri;
    state.via = path->endpoint().via;
    state.state = state_of(*path);
    state.known = path->known && path->stage() != Path::Stage::refused;
    state.connections = path->living();
    state.sent_bytes = path->sent_bytes();
    state.rtt_us = static_cast<std::uint64_t>(path->latency().count() / 1000);
    state.nbdferry = offer_.info.incoming;
  }
  return out;
}

// The handle that the core's edge holds.
class TargetOverLibnbd final : public Target {
 public:
  explicit TargetOverLibnbd(std::shared_ptr<State> state) : state_(std::move(state)) {}
  ~TargetOverLibnbd() override { state_->abandon(); }
  void open() override { state_->open(); }
  void submit(mirror::DiskOp&& op) override { state_->submit(std::move(op)); }
  void close() override { state_->close(); }
  void use(PathId path) override { state_->use(path); }
  void refuse(PathId path, const std::string& reason) override {
    state_->refuse_path(path, reason);
  }
  void leave(PathId path) override { state_->leave_path(path); }
  [[nodiscard]] std::vector<PathState> paths() const override { return state_->paths(); }

 private:
  std::shared_ptr<State> state_;
};

}  // namespace

std::unique_ptr<Target> Target::create(boost::asio::any_io_executor executor, TargetConfig config,
                                       EventHandler on_event) {
  auto endpoints = parse_paths(config.uris, config.vias, config.tls);
  return std::make_unique<TargetOverLibnbd>(std::make_shared<State>(
      std::move(executor), std::move(config), std::move(endpoints), std::move(on_event)));
}

}  // namespace nbdferry::transport
