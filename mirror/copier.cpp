#include "mirror/copier.hpp"

#include <algorithm>
#include <cstring>

#include "mirror/migration.hpp"

namespace nbdferry::mirror {

namespace {

constexpr std::size_t copies_max = 128;
constexpr int starts_max = 2;
constexpr Duration unreadable_retry = std::chrono::seconds(2);
constexpr std::uint64_t hole_growth = 4;
// The hint looks this many probes ahead, so that a sparse disk does not wait for one at each probe.
constexpr std::uint64_t hint_probes = 64;

bool is_zero(std::span<const std::byte> bytes) {
  const auto* p = bytes.data();
  const std::size_t n = bytes.size();
  constexpr std::size_t head = 16;
  for (std::size_t i = 0; i < std::min(n, head); ++i) {
    if (p[i] != std::byte{0}) return false;
  }
  return n <= head || std::memcmp(p, p + head, n - head) == 0;
}

}  // namespace

// --- choosing ---

void Copier::start_copies() {
  const std::uint64_t ahead = m_.read_ahead();
  // A few at a time: the others begin when these have been answered.
  for (int i = 0;
       i < starts_max && !idle_ && m_.map().stale_bytes() != 0 && copies_.size() < copies_max &&
       cost_ < ahead && (reading_bytes_ == 0 || reading_bytes_ < m_.read_share());
       ++i) {
    if (!start_one()) return;
  }
}

std::optional<ByteRange> Copier::readable_part(ByteRange run) {
  // A path is being proved there.
  const ByteRange reserved = m_.proof().reserved();
  if (reserved.overlaps(run) && !NBDFERRY_MUTANT(nonce_block_is_armed)) {
    if (reserved.begin <= run.begin) return std::nullopt;
    run.end = reserved.begin;
  }
  // Leave out what could not be read, until it is time to try again.
  const bool skip =
      m_.options().skip_unreadable && m_.switchover().state() != Switchover::State::none;
  for (auto it = unreadable_from(run.begin); it != unreadable_.end() && it->first < run.end; ++it) {
    const auto& [begin, u] = *it;
    if (u.retry_at <= m_.context().now && !skip) continue;
    if (begin <= run.begin) return std::nullopt;
    run.end = begin;
    break;
  }
  const std::uint64_t chunk = run.begin / chunk_size;
  if (bisected_.contains(chunk))
    run.end = std::min(run.end, m_.blocks_of({run.begin, run.begin + 1}).end);
  return run;
}

// Hot places last: what the guest writes there before costs the target nothing.
std::optional<ByteRange> Copier::next_run() {
  if (const auto run = scan()) return run;
  if (!passed_hot_) {
    hot_too_ = false;
    return std::nullopt;
  }
  ++m_.context().counters.hot_left_for_last;
  hot_too_ = true;
  return scan();
}

std::optional<ByteRange> Copier::scan() {
  passed_hot_ = false;
  const auto& limits = m_.context().config.limits;
  const std::uint64_t limit = after_data_ ? limits.copy_bytes : limits.probe_bytes;
  const std::uint64_t start = cursor_;
  for (bool wrapped = false;;) {
    const auto run = m_.map().next_stale(cursor_, limit);
    if (!run || (wrapped && run->begin >= start)) {
      cursor_ = 0;
      if (wrapped || start == 0) return std::nullopt;
      wrapped = true;
      continue;
    }
    if (!hot_too_ && m_.heat().hot(run->begin)) {
      passed_hot_ = true;
      cursor_ = m_.heat().alike(*run).end;
      continue;
    }
    if (const auto part = readable_part(hot_too_ ? *run : m_.heat().alike(*run))) return part;
    cursor_ = m_.blocks_of({run->begin, run->begin + 1}).end;
  }
}

std::optional<std::pair<ByteRange, bool>> Copier::hinted(ByteRange run) {
  if (run.begin < hint_begin_ || run.begin >= hint_end_) {
    if (hint_op_) return std::nullopt;
    DiskOp op;
    op.id = m_.context().new_op(OpKind::hint);
    op.command = Command::block_status;
    op.range = {run.begin,
                std::min(m_.map().size(),
                         run.begin + hint_probes * m_.context().config.limits.probe_bytes)};
    hint_op_ = op.id;
    hint_from_ = run.begin;
    m_.context().submit_source(std::move(op));
    return std::nullopt;
  }
  std::uint64_t at = hint_begin_;
  for (const auto& e : hint_) {
    const ByteRange extent{at, at + e.length};
    at += e.length;
    if (run.begin >= extent.end) continue;
    // Whole blocks: one that is a hole in part only is data.
    if (!e.zero)
      return std::pair{ByteRange{run.begin, std::min(run.end, m_.blocks_of(extent).end)}, false};
    const std::uint64_t end =
        extent.end == m_.map().size() ? extent.end : extent.end / m_.block_size() * m_.block_size();
    if (end > run.begin) return std::pair{ByteRange{run.begin, std::min(run.end, end)}, true};
    return std::pair{m_.blocks_of({run.begin, run.begin + 1}).intersect(run), false};
  }
  return std::nullopt;
}

void Copier::hint_done(SourceDone&& event) {
  if (event.id != hint_op_) return;
  hint_op_.reset();
  hint_ = std::move(event.extents);
  hint_begin_ = hint_from_;
  std::uint64_t length = 0;
  for (const auto& e : hint_) length += e.length;
  if (event.error != IoError::none || length == 0) {
    // No idea: everything is data.
    hint_ = {Extent{m_.map().size() - hint_begin_, false, false}};
    length = hint_[0].length;
  }
  hint_end_ = hint_begin_ + length;
  poke();
}

// The hint was wrong in `range`, or is old: there it becomes what the probe has answered.
void Copier::correct_hint(ByteRange range, const std::vector<Extent>& extents) {
  const ByteRange known{hint_begin_, hint_end_};
  if (!known.contains(range)) {
    hint_begin_ = hint_end_ = 0;  // ask again
    return;
  }
  std::vector<Extent> corrected;
  const auto add = [&](const std::vector<Extent>& list, std::uint64_t at, ByteRange part) {
    for (const auto& e : list) {
      const ByteRange cut = part.intersect({at, at + e.length});
      at += e.length;
      if (!cut.empty()) corrected.push_back({cut.length(), e.hole, e.zero});
    }
    return std::min(at, part.end);
  };
  add(hint_, hint_begin_, {hint_begin_, range.begin});
  const std::uint64_t answered = add(extents, range.begin, range);
  if (answered == range.end) {
    add(hint_, hint_begin_, {range.end, hint_end_});
  } else {
    hint_end_ = answered;
  }
  hint_ = std::move(corrected);
}

bool Copier::start_one() {
  const auto run = next_run();
  if (!run) {
    idle_ = true;
    return false;
  }
  const auto part = hinted(*run);
  if (!part) return false;
  const auto& limits = m_.context().config.limits;
  auto [range, hole] = *part;
  after_data_ = !hole;
  if (hole_bytes_ == 0) hole_bytes_ = limits.zero_piece_bytes;
  const std::uint64_t length_max =
      hole ? std::min(hole_bytes_, limits.probe_bytes) : m_.copy_bytes();
  if (range.length() > length_max) {
    const std::uint64_t border = (range.begin + length_max) / chunk_size * chunk_size;
    range.end = border > range.begin ? border : range.begin + length_max;
  }
  arm(range, hole);
  return true;
}

// --- arm, wait, read ---

void Copier::arm(ByteRange range, bool expect_hole) {
  Copy copy;
  copy.id = m_.context().new_op(OpKind::copy);
  copy.range = range;
  copy.live = {range};
  copy.expect_hole = expect_hole;
  copy.cost = expect_hole ? m_.context().config.limits.copy_bytes : range.length();
  copy.barrier = m_.guests().last_admission();
  cost_ += copy.cost;
  cursor_ = range.end;
  NBDFERRY_ASSERT(m_.map().all(range, BlockState::stale), "arming what is not stale");
  m_.map().set(range, BlockState::armed);
  copies_.push_back(std::move(copy));
  Copy& c = copies_.back();
  if (m_.guests().source_busy(range, c.barrier)) {
    ++m_.context().counters.armed_with_writes_in_flight;
    if (!NBDFERRY_MUTANT(read_before_writes_end)) {
      ++waiting_;
      return;
    }
  }
  proceed(c);
}

void Copier::source_progress() {
  if (waiting_ == 0) return;
  for (auto& c : copies_) {
    if (c.state != State::waiting || m_.guests().source_busy(c.range, c.barrier)) continue;
    --waiting_;
    proceed(c);
  }
}

void Copier::proceed(Copy& c) {
  c.state = c.expect_hole ? State::probing : State::reading;
  DiskOp op;
  op.id = m_.context().new_op(OpKind::copy);
  op.command = c.expect_hole ? Command::block_status : Command::read;
  op.range = c.range;
  c.source_op = op.id;
  if (c.state == State::reading) reading_bytes_ += c.range.length();
  m_.context().submit_source(std::move(op));
}

void Copier::source_done(SourceDone&& event) {
  const auto it = std::find_if(copies_.begin(), copies_.end(),
                               [&](const Copy& c) { return c.source_op == event.id; });
  if (it == copies_.end()) return;  // of a migration that has ended
  Copy& c = *it;
  if (c.state == State::reading) reading_bytes_ -= c.range.length();
  // Until its pieces are made it counts as reading, so that nothing ends it early.
  if (c.state == State::probing) {
    if (event.error != IoError::none) event.extents = {Extent{c.range.length(), false, false}};
    probe_answered(c, event.extents);
  } else if (event.error != IoError::none) {
    read_failed(c, event.error);
  } else {
    make_data_pieces(c, event.data);
  }
  c.state = State::sending;
  finish_if_done(it);
}

void Copier::read_failed(Copy& c, IoError error) {
  const Ranges live = c.live;
  const bool single = c.range.length() <= m_.block_size();
  if (single && !live.empty()) {
    if (!unreadable_.contains(c.range.begin)) {
      m_.context().notice("the source can't be read at byte " + std::to_string(c.range.begin) +
                          ": " + std::string(to_string(error)));
    }
    (void)forget_unreadable(c.range);
    unreadable_[c.range.begin] = {c.range.end, m_.context().now + unreadable_retry};
    unreadable_bytes_ += c.range.length();
  } else {
    for (std::uint64_t at = c.range.begin; at < c.range.end; at += chunk_size)
      bisected_.insert(at / chunk_size);
    bisected_.insert((c.range.end - 1) / chunk_size);
    cursor_ = c.range.begin;
  }
  for (const auto& r : live) m_.mark_stale(r, "the source could not be read");
}

// --- pieces ---

void Copier::make_data_pieces(Copy& c, const Payload& data) {
  // Zeroes that are stored as data travel as zeroes, by the chunk.
  const bool detect = m_.can_zero();
  for (const auto& r : c.live) {
    ByteRange run{r.begin, r.begin};
    bool run_zero = false;
    for (std::uint64_t at = r.begin; at < r.end;) {
      const std::uint64_t end = std::min(r.end, (at / chunk_size + 1) * chunk_size);
      const bool zero = detect && is_zero(data.bytes().subspan(at - c.range.begin, end - at));
      if (zero != run_zero && !run.empty()) {
        add_pieces(c, run, run_zero ? Command::zero : Command::write, data);
        run.begin = at;
      }
      run_zero = zero;
      run.end = end;
      at = end;
    }
    add_pieces(c, run, run_zero ? Command::zero : Command::write, data);
  }
}

void Copier::add_pieces(Copy& c, ByteRange range, Command command, const Payload& data) {
  const std::uint64_t piece_max = m_.piece_bytes(command);
  for (std::uint64_t at = range.begin; at < range.end; at += piece_max) {
    CopyPiece p{c.id, {at, std::min(at + piece_max, range.end)}, command, {}};
    if (command == Command::write) p.payload = data.slice(at - c.range.begin, p.range.length());
    add_piece(c, std::move(p));
  }
}

void Copier::add_piece(Copy& c, CopyPiece&& piece) {
  c.pieces.push_back(std::move(piece));
  ++unsent_;
}

void Copier::probe_answered(Copy& c, const std::vector<Extent>& extents) {
  // What turned out to be data, or was not answered, goes back: it will be read.
  Ranges holes;
  std::uint64_t at = c.range.begin;
  for (const auto& e : extents) {
    const ByteRange extent{at, std::min(at + e.length, c.range.end)};
    at = extent.end;
    if (!e.zero || extent.empty()) continue;
    ByteRange whole = extent.narrowed(m_.block_size());
    if (extent.end == m_.map().size()) whole.end = extent.end;
    if (!whole.empty()) holes.push_back(whole);
  }
  Ranges data{c.range};
  for (const auto& h : holes) subtract(data, h);
  if (!data.empty()) {
    correct_hint(c.range, extents);
    cursor_ = std::min(cursor_, data[0].begin);
  }
  for (const auto& d : data) {
    for (const auto& r : intersection(c.live, d)) m_.mark_stale(r, "a hole turned out to be data");
  }
  for (const auto& h : holes) {
    for (const auto& r : intersection(c.live, h)) zero_range(c, r);
  }
}

// Rule 9: not at all where the target is known to be zero.
void Copier::zero_range(Copy& c, ByteRange range) {
  m_.map().for_each_flag_run(range, ChunkFlag::written, [&](ByteRange run, bool written) {
    if (m_.knows_zeroes() && (!written || NBDFERRY_MUTANT(status_after_write))) {
      add_piece(c, {c.id, run, Command::block_status, {}});
    } else {
      add_pieces(c, run, Command::zero, {});
    }
  });
}

void Copier::target_status(Copy& c, ByteRange range, const std::vector<Extent>& extents) {
  std::uint64_t at = range.begin;
  std::uint64_t skipped = 0;
  Ranges to_zero;  // whole blocks
  const auto add = [&](ByteRange blocks) {
    if (!to_zero.empty()) blocks.begin = std::max(blocks.begin, to_zero.back().end);
    if (!blocks.empty()) to_zero.push_back(blocks);
  };
  for (const auto& e : extents) {
    const ByteRange extent{at, std::min(at + e.length, range.end)};
    if (extent.empty()) break;
    at = extent.end;
    const bool zero = e.zero || (NBDFERRY_MUTANT(hole_is_zero) && e.hole);
    if (zero) {
      skipped += extent.length();
      m_.trust_zeroes(extent);
    } else {
      add(m_.blocks_of(extent));
    }
  }
  const bool all_zero = to_zero.empty();
  // A short answer: ask for the rest. A block that it cuts is sent.
  if (at < range.end) add(m_.blocks_of({at, at + 1}));
  const ByteRange rest{
      std::max(m_.blocks_of({range.begin, at}).end, to_zero.empty() ? 0 : to_zero.back().end),
      range.end};
  for (const auto& z : to_zero) {
    for (const auto& r : intersection(c.live, z)) add_pieces(c, r, Command::zero, {});
  }
  if (!rest.empty()) {
    for (const auto& r : intersection(c.live, rest)) zero_range(c, r);
  }
  m_.count_copied(0, skipped);
  const auto& limits = m_.context().config.limits;
  hole_bytes_ =
      all_zero ? std::min(hole_bytes_ * hole_growth, limits.probe_bytes) : limits.zero_piece_bytes;
}

void Copier::hurry(OpId copy) {
  Copy& c = *find(copy);
  if (!c.hurried) ++hurried_;
  c.hurried = true;
}

const CopyPiece* Copier::next_piece(bool waited_for) {
  if (unsent_ == 0 || (waited_for && hurried_ == 0)) return nullptr;
  for (auto it = copies_.begin(); it != copies_.end(); ++it) {
    if (waited_for && !it->hurried) continue;
    for (std::size_t i = 0; i < it->pieces.size(); ++i) {
      if (m_.in_flight().conflict(it->pieces[i].range)) continue;
      next_from_ = it;
      next_index_ = i;
      return &it->pieces[i];
    }
  }
  return nullptr;
}

CopyPiece Copier::take_piece() {
  Copy& c = *next_from_;
  const auto at = c.pieces.begin() + static_cast<std::ptrdiff_t>(next_index_);
  CopyPiece piece = std::move(*at);
  c.pieces.erase(at);
  --unsent_;
  ++c.in_flight;
  return piece;
}

void Copier::target_done(const TargetOp& op, const TargetDone& event) {
  const auto it = find(op.parent);
  if (it == copies_.end()) return;
  Copy& c = *it;
  --c.in_flight;
  if (op.command == Command::block_status) {
    const bool known = event.error == IoError::none && !event.extents.empty() && m_.knows_zeroes();
    const Ranges live = intersection(c.live, op.range);
    if (known) {
      target_status(c, op.range, event.extents);
    } else if (event.error == IoError::lost) {
      for (const auto& r : live) m_.mark_stale(r, "the target was lost");
    } else {
      for (const auto& r : live) add_pieces(c, r, Command::zero, {});
    }
  } else if (event.error == IoError::none) {
    const bool data = op.command == Command::write;
    m_.count_copied(data ? op.range.length() : 0, data ? 0 : op.range.length());
  }
  // A failed write has been made stale by now: it is not live any more.
  if (const auto again = find(op.parent); again != copies_.end()) finish_if_done(again);
}

// --- the end of a copy ---

void Copier::discard(ByteRange blocks) {
  for (auto it = copies_.begin(); it != copies_.end();) {
    const auto next = std::next(it);
    if (it->range.overlaps(blocks) && subtract(it->live, blocks)) {
      ++m_.context().counters.copies_discarded;
      std::deque<CopyPiece> kept;
      for (auto& p : it->pieces) {
        Ranges rest{p.range};
        subtract(rest, blocks);
        for (const auto& r : rest) {
          Payload data = p.command == Command::write
                             ? p.payload.slice(r.begin - p.range.begin, r.length())
                             : Payload{};
          kept.push_back({p.copy, r, p.command, std::move(data)});
        }
      }
      unsent_ += kept.size();
      unsent_ -= it->pieces.size();
      it->pieces = std::move(kept);
      finish_if_done(it);
    }
    it = next;
  }
}

void Copier::finish_if_done(Copies::iterator it) {
  Copy& c = *it;
  const bool reading = c.state == State::reading || c.state == State::probing;
  if (reading || c.in_flight != 0 || !c.pieces.empty()) return;
  if (c.state == State::waiting && !c.live.empty()) return;
  for (const auto& r : c.live) {
    m_.map().set(r, BlockState::synced);
    (void)forget_unreadable(r);
  }
  cost_ -= c.cost;
  if (c.hurried) --hurried_;
  if (c.state == State::waiting) --waiting_;
  const OpId id = c.id;
  copies_.erase(it);
  m_.queue().unpark(id);
}

Copier::Copies::iterator Copier::find(OpId id) {
  return std::find_if(copies_.begin(), copies_.end(), [&](const Copy& c) { return c.id == id; });
}

std::optional<OpId> Copier::holder(ByteRange range) const {
  for (const auto& c : copies_) {
    for (const auto& r : c.live) {
      if (r.overlaps(range)) return c.id;
    }
  }
  return std::nullopt;
}

Ranges Copier::live() const {
  Ranges out;
  for (const auto& c : copies_) out.insert(out.end(), c.live.begin(), c.live.end());
  return out;
}

std::map<std::uint64_t, Copier::Unreadable>::const_iterator Copier::unreadable_from(
    std::uint64_t at) const {
  const auto it = unreadable_.upper_bound(at);
  if (it != unreadable_.begin() && std::prev(it)->second.end > at) return std::prev(it);
  return it;
}

bool Copier::forget_unreadable(ByteRange blocks) {
  bool any = false;
  for (auto it = unreadable_from(blocks.begin);
       it != unreadable_.end() && it->first < blocks.end;) {
    unreadable_bytes_ -= it->second.end - it->first;
    it = unreadable_.erase(it);
    any = true;
  }
  return any;
}

std::uint64_t Copier::unreadable_stale_bytes() const {
  if (unreadable_.empty()) return 0;
  std::uint64_t sum = unreadable_bytes_;
  for (const auto& c : copies_) {
    for (const auto& live : c.live) {
      for (auto it = unreadable_from(live.begin); it != unreadable_.end() && it->first < live.end;
           ++it) {
        sum -= live.intersect({it->first, it->second.end}).length();
      }
    }
  }
  return sum;
}

void Copier::check_invariants() const {
  std::uint64_t armed = 0;
  std::size_t unsent = 0;
  std::size_t waiting = 0;
  for (const auto& c : copies_) {
    unsent += c.pieces.size();
    waiting += c.state == State::waiting ? 1 : 0;
    for (const auto& r : c.live) {
      NBDFERRY_ASSERT(m_.map().all(r, BlockState::armed), "a live block of a copy is not armed");
    }
    armed += total(c.live);
  }
  NBDFERRY_ASSERT(armed == m_.map().armed_bytes(), "armed blocks without a copy");
  NBDFERRY_ASSERT(unsent == unsent_ && waiting == waiting_, "copies are miscounted");
  std::uint64_t unreadable = 0;
  std::uint64_t stale = 0;
  for (const auto& [begin, u] : unreadable_) {
    unreadable += u.end - begin;
    m_.map().for_each_run({begin, u.end}, [&](ByteRange r, BlockState s) {
      if (s == BlockState::stale) stale += r.length();
    });
  }
  NBDFERRY_ASSERT(unreadable == unreadable_bytes_ && stale == unreadable_stale_bytes(),
                  "unreadable blocks are miscounted");
}

}  // namespace nbdferry::mirror
