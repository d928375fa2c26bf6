// TargetModel: the remote server, its cache, and the connections to it. Hostile.
//
// Connections are lost with requests in flight; each of those the old server applies never, or at
// any time until the quarantine ends, also after a reconnect and after newer writes (a zombie).
// When no connection is left the server may restart: what was not flushed is lost, unit by unit.
//
// What it asserts of the core: the border's contract (events.hpp) and rule 4, that nothing overlaps
// in flight, widened to the block; the window; the server's limits and what it offers.
#pragma once

#include <vector>

#include "mirror/events.hpp"
#include "test/sim/coverage.hpp"
#include "test/sim/flight.hpp"
#include "test/sim/setup.hpp"

namespace nbdferry::sim {

class TargetModel {
 public:
  enum class Link { closed, opening, up, dying, down, refused, closing };

  TargetModel(const Setup& setup, Prng& prng, Cases& cases);

  [[nodiscard]] Link link() const { return link_; }
  [[nodiscard]] bool up() const { return link_ == Link::up; }
  // Something about it is to happen by itself.
  [[nodiscard]] bool link_moves() const {
    return link_ != Link::up && link_ != Link::closed && link_ != Link::refused;
  }
  [[nodiscard]] bool busy() const { return !flights_.empty(); }
  [[nodiscard]] bool reading() const;
  // Memory that writes in flight stand for, counted as the core's buffer counts it.
  [[nodiscard]] std::uint64_t buffer_in_flight() const;
  [[nodiscard]] std::uint64_t losses() const { return losses_; }
  [[nodiscard]] Time down_since() const { return down_since_; }
  [[nodiscard]] mirror::TargetWindow window() const;

  // The core's actions.
  // `another`: it is not the one that it was.
  void open(bool another);
  void close(Time now);
  void submit(mirror::DiskOp&& op);

  // What happens to it; each returns the event that the core is to get.
  [[nodiscard]] mirror::TargetUp come_up();
  [[nodiscard]] mirror::TargetRefused refuse();
  [[nodiscard]] mirror::TargetDone answer(Time now);                  // some operation in flight
  [[nodiscard]] const mirror::DiskOp& last() const { return last_; }  // what answer() ended last
  [[nodiscard]] mirror::TargetLost go_down();                         // dying, and all are answered
  [[nodiscard]] mirror::TargetClosed finish_close();  // closing, and all are answered
  // One connection is lost, or comes back.
  [[nodiscard]] bool can_lose_connection() const { return up() && living_ > 1; }
  [[nodiscard]] mirror::TargetWindow lose_connection();
  [[nodiscard]] bool can_regain_connection() const { return up() && living_ < setup_.connections; }
  [[nodiscard]] mirror::TargetWindow regain_connection();
  // The one that was lost was the last of its path, perhaps to a server of its own, which has restarted.
  [[nodiscard]] mirror::PathLost lose_path(bool may_restart);

  // Other paths, to this export or to another one.
  enum class OtherPath { same, known, another, gone, unknown };
  [[nodiscard]] mirror::PathFound find_path();
  void lose_found_path();
  [[nodiscard]] std::size_t found_paths() const { return found_.size(); }
  // The core has decided; what it is, or was.
  [[nodiscard]] OtherPath decided(PathId path);
  // It is to let go of it: it is as if it had gone.
  void leave(PathId path);
  // All of them at once: the window is zero from now on, then what is in flight is answered as
  // lost.
  [[nodiscard]] mirror::TargetWindow lose_all(Time now);
  // The client's process is killed: its connections are gone, with what is in flight. `sheltered`: what
  // is not flushed is lost with nobody who could bring it back, so that it does not restart before it is.
  // `retained`: there is something that the client's next life is to bring back if it does.
  void lose_client(Time now, bool sheltered, bool retained);
  void progress();
  void write_back();
  void corrupt();
  // Somebody else writes to it: it belongs to another host now.
  void scribble();
  // Zombies whose time has come.
  void pass_time(Time now);

  void heal();
  [[nodiscard]] bool haunted() const { return !zombies_.empty(); }

  // Silently corrupt and not written since.
  [[nodiscard]] bool corrupt(std::uint64_t unit) const { return corrupted_at_[unit] != 0; }
  // A complete verification began at `event`: what was corrupt before it counts as found.
  void verified(std::uint64_t event);
  void set_event(std::uint64_t event) { event_ = event; }
  // A state of the target begins: it is this one that is known.
  void met() {
    replaced_ = false;
    ours_.assign(image.units(), false);
  }
  [[nodiscard]] bool replaced() const { return replaced_; }
  // A zombie wrote there, and nobody has since, or not yet durably: the core cannot know of it.
  [[nodiscard]] bool haunted(std::uint64_t unit) const {
    return haunted_at_[unit] != 0 || (was_haunted_[unit] && image.dirty(unit));
  }

  DiskImage image;

 private:
  struct Zombie {
    Flight flight;
    Time at;
    std::uint64_t losses;  // how many there had been when it was sent
  };

  struct Found {
    PathId id;
    bool same;
    bool known;
  };

  [[nodiscard]] const Found* found(PathId path) const;
  void forget_paths() {
    while (!found_.empty()) lose_found_path();
  }
  void renew();
  void appear(Zombie& zombie);
  void restart();
  void check(const mirror::DiskOp& op) const;
  void written(const Flight& flight);
  void make_zombie(Flight&& flight, Time now);
  [[nodiscard]] static std::uint64_t window_cost(const mirror::DiskOp& op) {
    const bool data = op.command == Command::write || op.command == Command::read || op.as_data;
    return data ? op.range.length() : 0;
  }

  const Setup& setup_;
  Prng& prng_;
  Cases& cases_;
  Link link_ = Link::closed;
  bool healthy_ = false;
  bool sheltered_ = false;
  bool retained_ = false;
  bool replaced_ = false;  // since the state began
  bool can_checksum_ = false;
  bool used_ = false;  // opened before: it may hold another migration's data
  unsigned living_ = 0;
  std::uint64_t losses_ = 0;
  std::uint64_t event_ = 0;
  Time down_since_{0};
  std::uint64_t bytes_in_flight_ = 0;
  std::vector<Flight> flights_;
  std::vector<Found> found_;  // and not decided
  std::vector<PathId> gone_;  // before the core had decided
  std::uint64_t last_path_ = 0;
  mirror::DiskOp last_;
  std::vector<Zombie> zombies_;
  // The event in which a unit was corrupted, or written by a zombie; 0: not.
  std::vector<std::uint64_t> corrupted_at_;
  std::vector<std::uint64_t> haunted_at_;
  std::vector<bool> was_haunted_;
  std::vector<bool> ours_;  // written since the state began, or about to be
};

}  // namespace nbdferry::sim
