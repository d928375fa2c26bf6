// Runs a fuzz target without libFuzzer: mutations of its seeds, deterministic from a number, until
// the time is up. A failure is repeated, with all log lines, by --seed N --only.
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include <fcntl.h>
#include <unistd.h>

#include "test/fuzz/fuzz.hpp"

namespace {

using Input = std::vector<std::uint8_t>;

// Interesting lengths and offsets, at any byte.
constexpr std::uint8_t edges[] = {0x00, 0x01, 0x02, 0x03, 0x04, 0x07, 0x08, 0x10,
                                  0x1f, 0x20, 0x40, 0x7f, 0x80, 0x81, 0xfe, 0xff};

void mutate(Input& input, const std::vector<Input>& corpus, std::mt19937_64& random) {
  const auto at = [&](std::size_t size) { return size == 0 ? 0 : random() % size; };
  switch (random() % 7) {
    case 0:
      if (!input.empty()) input[at(input.size())] = static_cast<std::uint8_t>(random());
      break;
    case 1:
      if (!input.empty()) input[at(input.size())] = edges[random() % std::size(edges)];
      break;
    case 2:
      input.resize(at(input.size() + 1));
      break;
    case 3: {
      const auto from = input.begin() + static_cast<std::ptrdiff_t>(at(input.size() + 1));
      input.insert(from, random() % 64, static_cast<std::uint8_t>(random()));
      break;
    }
    case 4: {  // something of another input, anywhere
      const Input& other = corpus[random() % corpus.size()];
      const auto begin = at(other.size());
      const auto size = at(other.size() - begin + 1);
      input.insert(input.begin() + static_cast<std::ptrdiff_t>(at(input.size() + 1)),
                   other.begin() + static_cast<std::ptrdiff_t>(begin),
                   other.begin() + static_cast<std::ptrdiff_t>(begin + size));
      break;
    }
    case 5: {
      const Input& other = corpus[random() % corpus.size()];
      input.insert(input.end(), other.begin(), other.end());
      break;
    }
    default: {
      const auto begin = at(input.size() + 1);
      const auto end = begin + at(input.size() - begin + 1);
      input.erase(input.begin() + static_cast<std::ptrdiff_t>(begin),
                  input.begin() + static_cast<std::ptrdiff_t>(end));
    }
  }
}

volatile std::uint64_t current_seed = 0;

// Whatever ends the process in the middle of an input.
void name_seed(int signal) {
  std::printf("fuzz: failed with --seed %llu --only\n",
              static_cast<unsigned long long>(current_seed));
  std::fflush(stdout);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void run(std::uint64_t seed, const std::vector<Input>& corpus) {
  current_seed = seed;
  std::mt19937_64 random(seed);
  Input input = corpus[random() % corpus.size()];
  for (auto times = random() % 6; times > 0; --times) mutate(input, corpus, random);
  LLVMFuzzerTestOneInput(input.data(), input.size());
}

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t seed = 1;
  double seconds = 5;
  bool only = false;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--only") == 0) only = true;
    if (i + 1 == argc) break;
    if (std::strcmp(argv[i], "--seed") == 0) seed = std::strtoull(argv[i + 1], nullptr, 10);
    if (std::strcmp(argv[i], "--seconds") == 0) seconds = std::strtod(argv[i + 1], nullptr);
  }
  if (!only) {
    // Tens of thousands of log lines about garbage, and sanitizers' reports: --only has them.
    const int null = ::open("/dev/null", O_WRONLY);
    ::dup2(null, STDERR_FILENO);
    ::close(null);
  }
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE}) std::signal(signal, name_seed);
  const auto corpus = nbdferry::fuzz::seeds();
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  const auto first = seed;
  do {
    run(seed++, corpus);
  } while (!only && std::chrono::steady_clock::now() < end);
  std::printf("%llu inputs from seed %llu: nothing found\n",
              static_cast<unsigned long long>(seed - first),
              static_cast<unsigned long long>(first));
}
