// ResumeMap: what a restart of the process may still believe of the target (DESIGN.md, "Restart and
// resume"). Two bits for each chunk, in memory of the edge's that outlives the process; the chunks
// that were flushed last, for a sample; and what verifications have found.
//
//   clean  the target holds it, on its medium. Off, so that a fresh page means "copy it", before the
//          first operation on the chunk, local or on the target; on only when nothing of it is stale,
//          armed, queued, in flight or unflushed.
//   sent   a write of it may be unanswered, and land later (rule 8).
//
// Every store is one word, and takes effect in program order: whoever is killed leaves a state that was
// true. Without memory nothing is kept, and nothing is ever clean.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "mirror/ranges.hpp"
#include "mirror/types.hpp"

namespace nbdferry::mirror {

class ResumeMap {
 public:
  // What it needs for a disk of `size` bytes; all zero at first.
  [[nodiscard]] static std::uint64_t bytes_for(std::uint64_t size);

  ResumeMap() = default;
  // `memory`: bytes_for(size) bytes, aligned to 8, living until this is replaced.
  ResumeMap(std::span<std::byte> memory, std::uint64_t size);

  [[nodiscard]] bool kept() const { return !words_.empty(); }
  [[nodiscard]] bool is_in(std::span<const std::byte> memory) const {
    return kept() && std::as_bytes(words_).data() == memory.data();
  }

  // Chunks are those that `range` touches, or, of trust() and settle(), consists of.
  void touch(ByteRange range);    // something is about to happen to it
  void send(ByteRange range);     // a write of it is about to be sent to the target
  void settle(ByteRange chunks);  // no write of these is unanswered
  void trust(ByteRange chunks);   // the target holds these
  // Settles the chunks that `range` touches and for which `unsettled` does not hold.
  template <typename Unsettled>
  void settle_but(ByteRange range, Unsettled&& unsettled) {
    if (!kept()) return;
    range = range.widened(chunk_size).intersect({0, size_});
    for (std::uint64_t at = range.begin; at < range.end; at += chunk_size) {
      const ByteRange chunk{at, std::min(at + chunk_size, range.end)};
      if (!unsettled(chunk)) settle(chunk);
    }
  }

  [[nodiscard]] bool is_clean(ByteRange range) const;
  // f(run of chunks), in order; the last ends with the disk.
  template <typename F>
  void for_each_clean(F&& f) const {
    for_each_run(clean_at(), f);
  }
  [[nodiscard]] Ranges sent() const {
    Ranges out;
    for_each_run(sent_at(), [&](ByteRange run) { out.push_back(run); });
    return out;
  }
  // Chunks that became clean lately, and are.
  [[nodiscard]] Ranges recent() const;

  // Bytes that a verification found to differ, and nobody has acknowledged.
  [[nodiscard]] std::uint64_t differing() const { return kept() ? words_[differing_at] : 0; }
  void set_differing(std::uint64_t bytes) { set_word(differing_at, bytes); }
  // How far the verification of the whole disk has come, all alike; the disk's size when it has ended.
  [[nodiscard]] std::uint64_t verified() const {
    return kept() ? std::min(words_[verified_at], size_) : 0;
  }
  void set_verified(std::uint64_t mark) { set_word(verified_at, mark); }

 private:
  static constexpr std::size_t recent_max = 63;
  static constexpr std::size_t differing_at = recent_max + 1;
  static constexpr std::size_t verified_at = differing_at + 1;
  static constexpr std::size_t words_before_bits = verified_at + 1;
  [[nodiscard]] static std::uint64_t words_for(std::uint64_t size);
  [[nodiscard]] std::size_t clean_at() const { return words_before_bits; }
  [[nodiscard]] std::size_t sent_at() const { return clean_at() + words_for(size_); }
  void set(std::size_t at, ByteRange range, bool on);
  void set_word(std::size_t at, std::uint64_t value);
  template <typename F>
  void for_each_run(std::size_t at, F&& f) const;
  // The first chunk from `chunk` on whose bit is `on`, or the end of the disk's.
  [[nodiscard]] std::uint64_t next(std::size_t at, std::uint64_t chunk, bool on) const;

  // How many were recent; those; differing; verified; clean; sent.
  std::span<std::uint64_t> words_;
  std::uint64_t size_ = 0;
};

template <typename F>
void ResumeMap::for_each_run(std::size_t at, F&& f) const {
  if (!kept()) return;
  for (std::uint64_t begin = next(at, 0, true); begin * chunk_size < size_;) {
    const std::uint64_t end = next(at, begin, false);
    f(ByteRange{begin * chunk_size, std::min(end * chunk_size, size_)});
    begin = next(at, end, true);
  }
}

}  // namespace nbdferry::mirror
