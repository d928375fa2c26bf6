// Driver: chooses what happens next in one history, from its seed: the guest, the operator, the
// disks' answers, the faults, the time. At the end it lets everything heal and has the core finish.
#pragma once

#include <cstdint>

#include "test/sim/world.hpp"

namespace nbdferry::sim {

class Driver {
 public:
  explicit Driver(World& world) : w_(world), prng_(world.prng()) {}

  // `steps` things that happen, besides ticks; then the end.
  void run(unsigned steps);

 private:
  // --- driver.cpp
  void step();
  void guest();
  [[nodiscard]] ByteRange guest_range(bool large);
  void operate();
  void change();
  void start();
  void any_command();
  void complete_source();
  void progress_source();
  void complete_target();
  void progress_target();
  void answer_link();
  void refuse();
  void lose();
  void find_path();
  void jump();
  void stall();
  void crash();
  void grow_journal();
  void write_record();
  void meddle();

  // --- ending.cpp
  void finish();
  void finish_source();
  void level();
  void find_corruption();
  void finish_target();
  void finish_nobody();
  bool mend();
  template <typename Done>
  void settle(const char* what, Done&& done);
  bool issue_and_settle(CommandId id, const char* what);
  void clear_doubts();
  void read_everything();

  World& w_;
  Prng& prng_;
  std::uint64_t last_request_ = 0;
  std::uint64_t hot_ = 0;  // where the guest likes to write
  bool started_ = false;
  bool scribbled_ = false;
  bool finishing_ = false;
  Time source_stalled_until_{0};
  Time target_stalled_until_{0};
};

}  // namespace nbdferry::sim
