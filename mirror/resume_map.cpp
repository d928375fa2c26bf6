#include "mirror/resume_map.hpp"

#include <algorithm>
#include <bit>

#include "mirror/assert.hpp"

namespace nbdferry::mirror {

namespace {

constexpr std::uint64_t word_bits = 64;

// One store, where the program says it.
void store(std::uint64_t& word, std::uint64_t value) {
  *static_cast<volatile std::uint64_t*>(&word) = value;
}

std::uint64_t chunks_in(std::uint64_t size) { return (size + chunk_size - 1) / chunk_size; }

}  // namespace

std::uint64_t ResumeMap::words_for(std::uint64_t size) {
  return (chunks_in(size) + word_bits - 1) / word_bits;
}

std::uint64_t ResumeMap::bytes_for(std::uint64_t size) {
  return (words_before_bits + 2 * words_for(size)) * sizeof(std::uint64_t);
}

ResumeMap::ResumeMap(std::span<std::byte> memory, std::uint64_t size) : size_(size) {
  NBDFERRY_ASSERT(memory.size() >= bytes_for(size), "the memory for the resume map is too small");
  words_ = {reinterpret_cast<std::uint64_t*>(memory.data()),
            bytes_for(size) / sizeof(std::uint64_t)};
}

void ResumeMap::set(std::size_t at, ByteRange range, bool on) {
  if (!kept() || range.empty()) return;
  const std::uint64_t first = range.begin / chunk_size;
  const std::uint64_t end = chunks_in(range.end);
  for (std::uint64_t chunk = first; chunk < end;) {
    const std::uint64_t stop = std::min(end, (chunk / word_bits + 1) * word_bits);
    const std::uint64_t bits = stop - chunk;
    const std::uint64_t ones =
        bits == word_bits ? ~std::uint64_t{0} : (std::uint64_t{1} << bits) - 1;
    const std::uint64_t mask = ones << (chunk % word_bits);
    std::uint64_t& word = words_[at + chunk / word_bits];
    const std::uint64_t value = on ? word | mask : word & ~mask;
    if (value != word) store(word, value);
    chunk = stop;
  }
}

void ResumeMap::set_word(std::size_t at, std::uint64_t value) {
  if (kept() && words_[at] != value) store(words_[at], value);
}

void ResumeMap::touch(ByteRange range) {
  if (!NBDFERRY_MUTANT(resume_keeps_clean)) set(clean_at(), range, false);
}

void ResumeMap::send(ByteRange range) {
  touch(range);
  if (!NBDFERRY_MUTANT(resume_forgets_sent)) set(sent_at(), range, true);
}

void ResumeMap::settle(ByteRange chunks) { set(sent_at(), chunks, false); }

void ResumeMap::trust(ByteRange chunks) {
  if (!kept() || chunks.empty()) return;
  set(clean_at(), chunks, true);
  store(words_[1 + words_[0] % recent_max], (chunks.end - 1) / chunk_size);
  store(words_[0], words_[0] + 1);
}

bool ResumeMap::is_clean(ByteRange range) const {
  return kept() && next(clean_at(), range.begin / chunk_size, false) >= chunks_in(range.end);
}

std::uint64_t ResumeMap::next(std::size_t at, std::uint64_t chunk, bool on) const {
  const std::uint64_t chunks = chunks_in(size_);
  while (chunk < chunks) {
    const std::uint64_t word = words_[at + chunk / word_bits];
    const std::uint64_t found = (on ? word : ~word) >> (chunk % word_bits);
    if (found != 0) {
      return std::min(chunks, chunk + static_cast<std::uint64_t>(std::countr_zero(found)));
    }
    chunk = (chunk / word_bits + 1) * word_bits;
  }
  return chunks;
}

Ranges ResumeMap::recent() const {
  Ranges out;
  if (!kept()) return out;
  for (std::size_t i = 0; i < std::min<std::uint64_t>(recent_max, words_[0]); ++i) {
    const std::uint64_t begin = words_[1 + i] * chunk_size;
    const ByteRange r{begin, std::min(begin + chunk_size, size_)};
    if (begin < size_ && is_clean(r)) out.push_back(r);
  }
  return out;
}

}  // namespace nbdferry::mirror
