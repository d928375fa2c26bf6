#include "test/sim/target_model.hpp"

#include "test/sim/trace.hpp"

namespace nbdferry::sim {

TargetModel::TargetModel(const Setup& setup, Prng& prng, Cases& cases)
    : image(setup.target.size), setup_(setup), prng_(prng), cases_(cases) {
  renew();
}

// Another server's disk: empty, or full of something else.
void TargetModel::renew() {
  image = DiskImage(setup_.target.size);
  corrupted_at_.assign(image.units(), 0);
  haunted_at_.assign(image.units(), 0);
  was_haunted_.assign(image.units(), false);
  ours_.assign(image.units(), false);
  zombies_.clear();
  if (prng_.chance(1, 2)) return;
  for (std::uint64_t at = 0; at < image.size(); at += block_size_min) {
    if (prng_.chance(3, 4)) {
      image.preset(ByteRange{at, std::min(at + block_size_min, image.size())}, 2);
    }
  }
  if (prng_.chance(1, 2)) return;
  // Somebody zeroed some of it and did not flush: it reads as zeroes for as long as it runs.
  constexpr std::uint64_t units = chunk_size / unit_size;
  bool zero = false;
  for (std::uint64_t u = 0; u < image.units(); ++u) {
    if (u % units == 0) zero = prng_.chance(2, 3);
    if (zero) image.write(image.unit_range(u), nullptr);
  }
}

void TargetModel::restart() {
  if (sheltered_) return;
  cases_.saw(Case::server_restart);
  cases_.saw_if(retained_, Case::died_with_target);
  cases_.saw_if(image.crash(prng_), Case::zeroes_undone);
}

// --- the core's actions
// ---------------------------------------------------------------------------

void TargetModel::open(bool another) {
  require(link_ == Link::closed || link_ == Link::refused, "target: opened while it is open");
  link_ = Link::opening;
  if (another && used_) {
    renew();
    replaced_ = true;
  } else if (used_ && setup_.restarts && prng_.chance(1, 2)) {
    restart();
  }
  used_ = true;
  image.forgive();
}

void TargetModel::close(Time now) {
  require(link_ != Link::closed && link_ != Link::closing, "target: closed while it is closed");
  if (link_ == Link::up) down_since_ = now;
  link_ = Link::closing;
  forget_paths();
  living_ = 0;
  for (auto& f : flights_) f.doomed = true;
}

void TargetModel::check(const mirror::DiskOp& op) const {
  const auto& info = setup_.target;
  require(link_ == Link::up, "target: {} while it is not up", op);
  require(flights_.size() < living_ * setup_.window_ops,
          "target: {} beyond the window's {} operations", op, living_ * setup_.window_ops);
  if (op.fua) require(info.can_fua, "target: {} asks for FUA, which is not offered", op);
  require(!op.fast_only, "target: {} is fast only", op);
  if (op.command == Command::flush) {
    require(info.can_flush, "target: flush is not offered");
    return;
  }
  require(!op.range.empty() && op.range.end <= image.size(), "target: {} is not within the disk",
          op);
  require(op.range == op.range.widened(info.block_min), "target: {} is not in blocks of {}", op,
          info.block_min);
  const std::uint64_t cost = window_cost(op);
  require(cost <= info.payload_max, "target: {} is longer than {}", op, info.payload_max);
  require(cost == 0 || bytes_in_flight_ == 0 ||
              bytes_in_flight_ + cost <= living_ * setup_.window_bytes,
          "target: {} beyond the window's {} bytes ({} in flight)", op,
          living_ * setup_.window_bytes, bytes_in_flight_);
  require(op.path == PathId{} || op.command == Command::read,
          "target: {} by a path that is not used", op);
  if (op.command == Command::write) {
    require(op.payload.size() == op.range.length(), "target: {} carries {} bytes", op,
            op.payload.size());
  }
  if (op.command == Command::trim) {
    fail("target: {}: a trim may leave anything behind (rule 9)", op);
  }
  if (op.command == Command::zero) {
    require(info.can_zero || op.as_data, "target: {} is not offered", op);
    const std::uint64_t limit =
        op.as_data ? std::uint64_t{info.payload_max} : setup_.engine.limits.zero_piece_bytes;
    require(op.range.length() <= limit, "target: {} is longer than {}", op, limit);
  }
  if (op.command == Command::checksum) {
    require(can_checksum_, "target: {} is not offered", op);
    require(op.range.length() <= setup_.engine.limits.checksum_bytes, "target: {} is too long", op);
  }
  const std::uint64_t align = std::max<std::uint64_t>(info.block_min, block_size_min);
  for (const auto& f : flights_) {
    require(!f.op().range.widened(align).overlaps(op.range.widened(align)),
            "target: {} while {} is in flight", op, f.op());
  }
}

void TargetModel::submit(mirror::DiskOp&& op) {
  check(op);
  IoError error = IoError::none;
  bool inert = false;
  if (!healthy_ && setup_.target_errors && prng_.chance(1, 25)) {
    error = prng_.pick({IoError::io, IoError::no_space, IoError::invalid, IoError::shutdown});
    inert = prng_.chance(1, 3);
  }
  if (!healthy_ && setup_.flush_errors && op.command == Command::flush && prng_.chance(1, 3)) {
    error = IoError::io;
  }
  if (sheltered_ && op.command == Command::flush) error = IoError::none;
  if (setup_.zeroes_fail != IoError::none && op.command == Command::zero && !op.as_data) {
    error = setup_.zeroes_fail;
    cases_.saw(Case::zeroes_failed);
  }
  if (op.command == Command::checksum && prng_.chance(1, 8)) error = IoError::not_supported;
  bytes_in_flight_ += window_cost(op);
  if (is_write(op.command)) {
    for (std::uint64_t u = op.range.begin / unit_size; u * unit_size < op.range.end; ++u)
      ours_[u] = true;
  }
  Flight& f = flights_.emplace_back(std::move(op), error, inert, image);
  f.connection = static_cast<unsigned>(prng_.below(living_));
  if (const PathId path = f.op().path; path != PathId{}) {
    f.connection = UINT_MAX;
    f.doomed = found(path) == nullptr;
  }
  f.event = event_;
}

// --- what happens to it
// ---------------------------------------------------------------------------

mirror::TargetWindow TargetModel::window() const {
  return {living_ * setup_.window_ops, living_ * setup_.window_bytes};
}

mirror::TargetUp TargetModel::come_up() {
  if (link_ == Link::down && setup_.restarts && prng_.chance(1, 2)) restart();
  link_ = Link::up;
  living_ =
      healthy_ ? setup_.connections : static_cast<unsigned>(prng_.between(1, setup_.connections));
  const auto w = window();
  mirror::TargetInfo info = setup_.target;
  // It may come back as another version.
  info.can_checksum = can_checksum_ = info.can_checksum && !prng_.chance(1, 8);
  if (setup_.fences) {
    // What older connections hold is written before anything newer, or never.
    for (auto& z : zombies_) {
      if (prng_.chance(1, 2)) appear(z);
    }
    zombies_.clear();
    info.fenced = true;
    info.proven = !replaced_;
  }
  return {info, w.window_ops, w.window_bytes};
}

mirror::TargetRefused TargetModel::refuse() {
  link_ = Link::refused;
  living_ = 0;
  return {"the simulator says no"};
}

void TargetModel::written(const Flight& flight) {
  const ByteRange range = flight.op().range;
  for (std::uint64_t u = range.begin / unit_size; u * unit_size < range.end; ++u) {
    if (!range.contains(image.unit_range(u))) continue;
    // What came while it was in flight may have come after it.
    if (corrupted_at_[u] < flight.event) corrupted_at_[u] = 0;
    if (haunted_at_[u] == 0 || haunted_at_[u] >= flight.event) continue;
    haunted_at_[u] = 0;
    was_haunted_[u] = true;
  }
}

std::uint64_t TargetModel::buffer_in_flight() const {
  constexpr std::uint64_t overhead = 256;
  std::uint64_t sum = 0;
  for (const auto& f : flights_) {
    const bool data = f.op().command == Command::write;
    if (f.writes()) sum += std::max(overhead, data ? f.op().payload.storage_bytes() : 0);
  }
  return sum;
}

void TargetModel::make_zombie(Flight&& flight, Time now) {
  if (!flight.writes() || prng_.chance(1, 4)) return;
  // Before the quarantine ends: anywhere, at once, or at the last moment.
  const auto span = static_cast<std::uint64_t>(setup_.quarantine.count());
  const std::uint64_t after = prng_.chance(1, 4)   ? span - 1
                              : prng_.chance(1, 2) ? prng_.below(span)
                                                   : prng_.below(span / 8);
  zombies_.push_back(
      {std::move(flight), now + Duration(static_cast<std::int64_t>(after)), losses_});
}

mirror::TargetDone TargetModel::answer(Time now) {
  const std::size_t i = prng_.below(flights_.size());
  Flight f = std::move(flights_[i]);
  flights_[i] = std::move(flights_.back());
  flights_.pop_back();
  bytes_in_flight_ -= window_cost(f.op());
  last_ = f.op();
  if (f.doomed) {
    const OpId id = f.op().id;
    make_zombie(std::move(f), now);
    return {id, IoError::lost, {}, {}};
  }
  f.finish(image, true, prng_);
  mirror::TargetDone done{f.op().id, f.error(), {}, {}};
  if (f.error() != IoError::none) return done;
  if (f.writes()) written(f);
  if (f.op().command == Command::flush) sheltered_ = retained_ = false;
  if (f.op().command == Command::read) done.data = f.take_data();
  if (f.op().command == Command::checksum) done.checksum = f.checksum();
  if (const Found* path = found(f.op().path); path != nullptr && !path->same) {
    Buffer other(f.op().range.length());
    if (prng_.chance(1, 2)) {
      fill_pattern(other.data(), f.op().range, 4);
    } else {
      std::fill(other.bytes().begin(), other.bytes().end(), std::byte{0});
    }
    done.data = std::move(other).freeze();
  }
  if (f.op().command == Command::block_status) {
    if (setup_.target.has_allocation) {
      f.make_extents(image, setup_.target.block_min, true, setup_.status_lags ? &ours_ : nullptr,
                     prng_);
      done.extents = std::move(f.extents());
    } else {
      done.extents = {Extent{f.op().range.length(), false, false}};  // transport/ says so itself
    }
  }
  return done;
}

bool TargetModel::reading() const {
  return std::any_of(flights_.begin(), flights_.end(),
                     [](const Flight& f) { return f.op().command == Command::read; });
}

mirror::TargetWindow TargetModel::lose_all(Time now) {
  link_ = Link::dying;
  living_ = 0;
  down_since_ = now;
  forget_paths();
  for (auto& f : flights_) f.doomed = true;
  return window();
}

mirror::TargetLost TargetModel::go_down() {
  link_ = Link::down;
  ++losses_;
  if (setup_.restarts && prng_.chance(1, 4)) restart();
  return {"the simulator pulled the plug"};
}

mirror::TargetClosed TargetModel::finish_close() {
  link_ = Link::closed;
  ++losses_;
  return {};
}

mirror::TargetWindow TargetModel::lose_connection() {
  --living_;
  ++losses_;
  const unsigned lost = static_cast<unsigned>(prng_.below(living_ + 1));
  for (auto& f : flights_) {
    if (f.connection == lost) f.doomed = true;
    if (f.connection == living_) f.connection = lost;  // the last one takes the free number
  }
  return window();
}

mirror::TargetWindow TargetModel::regain_connection() {
  ++living_;
  return window();
}

mirror::PathLost TargetModel::lose_path(bool may_restart) {
  // A flush is good when it is on every path.
  for (auto& f : flights_) f.doomed = f.doomed || f.op().command == Command::flush;
  const bool unflushed = prng_.chance(3, 4);
  if (unflushed && may_restart && setup_.restarts && prng_.chance(1, 2)) restart();
  return {"the simulator cut it", unflushed};
}

// --- other paths

mirror::PathFound TargetModel::find_path() {
  const bool same = prng_.chance(2, 3);
  found_.push_back({PathId{++last_path_}, same, same && prng_.chance(1, 2)});
  mirror::PathFound event;
  event.path = found_.back().id;
  event.known = found_.back().known;
  for (auto& b : event.nonce) b = static_cast<std::byte>(prng_.below(256));
  return event;
}

void TargetModel::lose_found_path() {
  gone_.push_back(found_[prng_.below(found_.size())].id);
  leave(gone_.back());
}

void TargetModel::leave(PathId path) {
  for (auto& f : flights_) f.doomed = f.doomed || f.op().path == path;
  std::erase_if(found_, [&](const Found& f) { return f.id == path; });
}

const TargetModel::Found* TargetModel::found(PathId path) const {
  for (const auto& f : found_) {
    if (f.id == path) return &f;
  }
  return nullptr;
}

TargetModel::OtherPath TargetModel::decided(PathId path) {
  if (const Found* f = found(path)) {
    const OtherPath what = f->known  ? OtherPath::known
                           : f->same ? OtherPath::same
                                     : OtherPath::another;
    std::erase_if(found_, [&](const Found& o) { return o.id == path; });
    return what;
  }
  return std::erase(gone_, path) != 0 ? OtherPath::gone : OtherPath::unknown;
}

void TargetModel::lose_client(Time now, bool sheltered, bool retained) {
  sheltered_ = sheltered_ || sheltered;
  retained_ = retained;
  for (auto& f : flights_) make_zombie(std::move(f), now);
  flights_.clear();
  forget_paths();
  bytes_in_flight_ = 0;
  living_ = 0;
  if (link_ == Link::up) down_since_ = now;
  link_ = Link::closed;
  ++losses_;
}

void TargetModel::progress() {
  if (!flights_.empty()) flights_[prng_.below(flights_.size())].progress(image, prng_);
}

void TargetModel::write_back() {
  const std::uint64_t at = prng_.below(image.units()) * unit_size;
  image.write_back(ByteRange{at, std::min(at + chunk_size / 4, image.size())});
}

void TargetModel::corrupt() {
  const std::uint64_t unit = prng_.below((setup_.engine.size + unit_size - 1) / unit_size);
  image.corrupt(unit);
  corrupted_at_[unit] = event_;
}

void TargetModel::verified(std::uint64_t event) {
  for (auto& at : corrupted_at_) {
    if (at < event) at = 0;
  }
}

void TargetModel::heal() {
  healthy_ = true;
  for (auto& f : flights_) f.heal();
}

void TargetModel::scribble() {
  for (int i = 0; i < 4; ++i) {
    const ByteRange r = image.unit_range(prng_.below(image.units()));
    std::vector<std::byte> bytes(r.length());
    fill_pattern(bytes.data(), r, 3);
    image.write(r, bytes.data());
  }
}

void TargetModel::pass_time(Time now) {
  for (std::size_t i = 0; i < zombies_.size();) {
    if (zombies_[i].at > now) {
      ++i;
      continue;
    }
    Zombie z = std::move(zombies_[i]);
    zombies_[i] = std::move(zombies_.back());
    zombies_.pop_back();
    appear(z);
  }
}

void TargetModel::appear(Zombie& z) {
  const ByteRange r = z.flight.op().range;
  if (!z.flight.haunt(image, prng_)) return;
  if (link_ == Link::up) cases_.saw(Case::zombie_after_reconnect);
  for (std::uint64_t u = r.begin / unit_size; u * unit_size < r.end; ++u) haunted_at_[u] = event_;
}

}  // namespace nbdferry::sim
