// sim: drives the core through random hostile histories, each from a seed, and checks it.
//
// Histories run in worker processes, so that a failed assertion of the core ends one worker; the
// parent then replays that history with its trace. History i of a run has the seed --seed + i, so
// `--seed S --histories 1` replays one.
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>
#include <sstream>

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>

#include "mirror/assert.hpp"
#include "test/sim/driver.hpp"

namespace nbdferry::sim {
namespace {

// Of what a seed means: raised when the simulator draws differently, so that old seeds are marked.
constexpr unsigned format_version = 10;
constexpr unsigned history_seconds_max = 30;
constexpr std::uint64_t coverage_histories_min = 10'000;

struct Options {
  std::uint64_t histories = 1000;
  std::uint64_t seed = 0;
  unsigned steps = 220;
  bool trace = false;
  bool expect_caught = false;
  unsigned jobs = 2;
  std::string mutant;
  std::string regressions;
};

// One worker's state, in memory shared with the parent.
struct Worker {
  pid_t pid = 0;
  std::uint64_t seed = 0;  // of the history under way
  bool failed = false;
  char message[512] = {};
  Coverage coverage;
};

void run_history(std::uint64_t seed, const Options& options, Trace& trace, Coverage& coverage) {
  alarm(history_seconds_max);
  World world(seed, trace);
  Driver(world).run(options.steps);
  world.count_cases();
  world.cases().count_into(coverage);
  coverage.events += world.events();
  ++coverage.histories;
  alarm(0);
}

const Trace* dying_trace = nullptr;
void print_dying_trace(int) {
  if (dying_trace != nullptr) dying_trace->print_tail();
  _exit(1);
}

// In a process of its own: its end is the parent's only concern.
int replay(std::uint64_t seed, const Options& options, Trace::Level level) {
  std::fflush(stdout);
  const pid_t pid = fork();
  if (pid == 0) {
    Trace trace(level);
    Coverage coverage;
    dying_trace = &trace;
    for (const int s : {SIGABRT, SIGSEGV, SIGALRM}) std::signal(s, print_dying_trace);
    int rc = 0;
    try {
      run_history(seed, options, trace, coverage);
    } catch (const Failure& f) {
      trace.print_tail();
      std::printf("FAILED: %s\n", f.what());
      rc = 1;
    }
    std::fflush(stdout);
    _exit(rc);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

[[noreturn]] void work(Worker& self, unsigned index, const Options& options) {
  Trace trace(Trace::Level::off);
  // What the core's assertion says is printed by the replay.
  if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(2);
  for (std::uint64_t i = index; i < options.histories; i += options.jobs) {
    self.seed = options.seed + i;
    try {
      run_history(self.seed, options, trace, self.coverage);
    } catch (const Failure& f) {
      std::snprintf(self.message, sizeof(self.message), "%s", f.what());
      self.failed = true;
      _exit(1);
    }
  }
  std::exit(0);  // and not _exit: gcov's counts are written then
}

void end_others(Worker* workers, unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    if (workers[i].pid == 0) continue;
    kill(workers[i].pid, SIGKILL);
    waitpid(workers[i].pid, nullptr, 0);
    workers[i].pid = 0;
  }
}

int report_failure(const Worker& worker, const Options& options) {
  std::printf("history with seed %llu failed: %s\n", static_cast<unsigned long long>(worker.seed),
              worker.message);
  (void)replay(worker.seed, options, Trace::Level::tail);
  std::printf("replay it: --seed %llu --histories 1 --steps %u --trace\n",
              static_cast<unsigned long long>(worker.seed), options.steps);
  return 1;
}

bool report_coverage(const Coverage& c, const Options& options) {
  bool enough = true;
  std::printf("%llu histories, %llu events\n", static_cast<unsigned long long>(c.histories),
              static_cast<unsigned long long>(c.events));
  for (std::size_t i = 0; i < c.hit.size(); ++i) {
    const double percent = 100.0 * static_cast<double>(c.hit[i]) /
                           static_cast<double>(std::max<std::uint64_t>(1, c.histories));
    const bool rare = c.hit[i] * 100 <= c.histories;
    std::printf("  %-28.*s %6.2f %%%s\n", static_cast<int>(case_names[i].size()),
                case_names[i].data(), percent, rare ? "  RARE" : "");
    enough = enough && !rare;
  }
  if (enough || options.histories < coverage_histories_min) return true;
  std::printf("FAILED: a hard case happens in 1 %% of the histories or fewer\n");
  return false;
}

// Returns the worker whose history failed, or null.
const Worker* run_workers(Worker* workers, const Options& options) {
  std::fflush(stdout);
  for (unsigned i = 0; i < options.jobs; ++i) {
    const pid_t pid = fork();
    if (pid == 0) work(workers[i], i, options);
    workers[i].pid = pid;
  }
  for (unsigned running = options.jobs; running > 0; --running) {
    int status = 0;
    const pid_t pid = waitpid(-1, &status, 0);
    for (unsigned i = 0; i < options.jobs; ++i) {
      if (workers[i].pid != pid) continue;
      workers[i].pid = 0;
      if (WIFEXITED(status) && WEXITSTATUS(status) == 0) continue;
      if (!workers[i].failed) {
        const int sig = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
        std::snprintf(workers[i].message, sizeof(workers[i].message), "%s",
                      sig == SIGALRM ? "it does not end" : "the core asserts");
      }
      end_others(workers, options.jobs);
      return &workers[i];
    }
  }
  return nullptr;
}

int run(const Options& options) {
  std::printf("seed %llu\n", static_cast<unsigned long long>(options.seed));
  if (options.trace) return replay(options.seed, options, Trace::Level::live);

  const std::size_t bytes = sizeof(Worker) * options.jobs;
  void* shared = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) {
    std::perror("sim: mmap");
    return 2;
  }
  auto* workers = static_cast<Worker*>(shared);
  for (unsigned i = 0; i < options.jobs; ++i) new (&workers[i]) Worker;
  const Worker* failed = run_workers(workers, options);
  Coverage coverage;
  for (unsigned i = 0; i < options.jobs; ++i) coverage.add(workers[i].coverage);
  if (options.expect_caught) {
    if (failed == nullptr) {
      std::printf("mutant %s SURVIVED %llu histories\n", options.mutant.c_str(),
                  static_cast<unsigned long long>(coverage.histories));
      return 1;
    }
    std::printf("mutant %s caught after %llu histories (seed %llu): %s\n", options.mutant.c_str(),
                static_cast<unsigned long long>(coverage.histories + 1),
                static_cast<unsigned long long>(failed->seed), failed->message);
    return 0;
  }
  if (failed != nullptr) return report_failure(*failed, options);
  return report_coverage(coverage, options) ? 0 : 1;
}

// Lines of: format version, seed, steps, why.
int run_regressions(Options options) {
  std::ifstream file(options.regressions);
  if (!file) {
    std::fprintf(stderr, "sim: cannot open %s\n", options.regressions.c_str());
    return 2;
  }
  int rc = 0;
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream fields(line);
    unsigned version = 0;
    fields >> version >> options.seed >> options.steps;
    if (!fields) {
      std::fprintf(stderr, "sim: malformed line: %s\n", line.c_str());
      return 2;
    }
    const char* old = version == format_version ? "" : " (of an older format: another history now)";
    std::printf("seed %llu%s\n", static_cast<unsigned long long>(options.seed), old);
    rc |= replay(options.seed, options, Trace::Level::tail);
  }
  return rc;
}

int main_of(int argc, char** argv) {
  CLI::App app{"Simulator of nbdferry's core"};
  Options o;
  app.add_option("--histories", o.histories, "how many");
  const auto* seed = app.add_option("--seed", o.seed, "of the first one (default: random)");
  app.add_option("--steps,--events", o.steps, "things that happen in each, besides ticks");
  app.add_option("--jobs", o.jobs, "worker processes")->check(CLI::Range(1, 64));
  app.add_flag("--trace", o.trace, "print all of the one history with this seed");
  app.add_option("--regressions", o.regressions, "run the histories of this file");
#ifdef NBDFERRY_MUTANTS
  app.add_option("--mutant", o.mutant, "activate this breach of a rule")->required();
  app.add_flag("--expect-caught", o.expect_caught, "succeed if and only if a checker fails");
#endif
  CLI11_PARSE(app, argc, argv);
#ifdef NBDFERRY_MUTANTS
  active_mutant = o.mutant.c_str();
#endif
  if (!o.regressions.empty()) return run_regressions(o);
  if (seed->count() == 0) {
    std::random_device device;
    o.seed = (static_cast<std::uint64_t>(device()) << 20) ^ device();
  }
  return run(o);
}

}  // namespace
}  // namespace nbdferry::sim

int main(int argc, char** argv) { return nbdferry::sim::main_of(argc, argv); }
