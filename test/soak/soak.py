#!/usr/bin/env python3
"""The soak: a disk moves back and forth between two hosts, all of it real processes, while a guest
writes to it and anything may be killed, frozen or cut off at any moment. Whatever was acknowledged
is found at the end. usage: soak.py [--minutes N | --cycles N] [--seed N]

A cycle: the other host serves its copy as a target, a migration goes there with random options and
faults, then the switchover, killed at random moments and repeated until one side owns the disk, and
the guest goes on there. The seed decides what is done, not how long it takes.
"""
import argparse
import collections
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
import traceback

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "interop"))
import ferry
from ferry import MIB, check
from guest import Guest
from host import Host

SIZE = 32 * MIB
SWITCH_SECONDS = 150


class KeptScratch(ferry.Scratch):
    """Stays where it is after a failure."""

    def __init__(self):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="nbdferry-soak-"))
        self.processes, self.daemons = [], []

    def __exit__(self, kind, *more):
        if kind is None:
            return super().__exit__(kind, *more)
        for process in reversed(self.processes):
            if process.poll() is None:
                process.kill()
            process.wait()
        return None


class Soak:
    def __init__(self, scratch, state, options):
        self.scratch, self.state, self.options = scratch, state, options
        self.dice = random.Random(options.seed)
        self.begin = time.monotonic()
        self.steps = open(scratch.file("steps.log"), "w", buffering=1)
        self.faults, self.switchovers = collections.Counter(), collections.Counter()
        self.cycles = 0
        self.hosts = []
        self.hosts = [Host(self, "a"), Host(self, "b")]
        self.guest = Guest(SIZE, options.seed, options.rate)

    def note(self, text):
        self.steps.write(f"{time.monotonic() - self.begin:8.3f} {text}\n")

    def over(self):
        if self.options.cycles:
            return self.cycles >= self.options.cycles
        return time.monotonic() - self.begin >= self.options.minutes * 60

    def tend(self):
        """What must hold at any time; called from within every wait. Never true."""
        self.guest.check()
        for host in self.hosts:
            host.check()
        return False

    def sleep(self, seconds):
        end = time.monotonic() + seconds
        while True:
            self.tend()
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 0.05))

    def wait(self, condition, what, seconds=60):
        ferry.wait_until(lambda: self.tend() or condition(), what, seconds)

    # --- a cycle ---

    def run(self):
        here, there = self.hosts
        self.guest.create(here.disk)
        shutil.copyfile(here.disk, there.disk)
        with open(there.disk, "r+b") as f:  # nothing of it may survive
            f.write(b"\xa5" * SIZE)
        here.serve()
        self.guest.go_to(here.socket)
        self.guest.thread.start()
        while not self.over():
            self.note(f"cycle {self.cycles + 1}: {here.name} to {there.name}")
            there.way("mend")
            if self.cycle(here, there):
                here, there = there, here
            self.note(f"the guest's longest answer so far took {self.guest.longest:.2f} s")
            self.compare_quiet(here)
            for host in self.hosts:
                # Nobody but nbdferry writes to a target here: a resume that is wrong about what it
                # holds would be healed by a full copy, and not be noticed.
                check("does not hold what it held" not in self.scratch.log(host.name),
                      f"{host.name} believed after a restart what the target does not hold")
            self.cycles += 1
        self.guest.drain(self.tend)
        self.guest.end()
        for host in self.hosts:
            if host.meant_to_run:
                host.stop()
        self.guest.compare(here.disk, f"at the end, {here.name}")

    def cycle(self, here, there):
        """True: the disk is there now."""
        dice = self.dice
        kind = dice.choices(["nbdferry", "qemu-nbd", "nbdkit"], [70, 20, 10])[0]
        there.serve(kind, incoming=kind == "nbdferry")
        self.note(f"{there.name} is {kind}")
        self.migrate(here, there)
        for _ in range(dice.randrange(5)):
            # Now and then long enough for a flush of the target: a restart can believe it then.
            self.sleep(dice.uniform(5, 7) if dice.randrange(8) == 0 else dice.uniform(0.05, 1.2))
            self.fault(here, there)
        pivot = dice.randrange(10) < 3
        self.switch(here, there, pivot)
        if pivot:
            return self.pivoted(here, there)
        return self.released(here, there)

    def compare_quiet(self, host):
        """All blocks of the owner's disk, while the guest pauses."""
        self.guest.drain(self.tend)
        self.guest.compare(host.disk, f"{host.name} after a switchover")
        self.guest.go_on()

    def migrate_options(self):
        dice = self.dice
        some = lambda *more: list(more) if dice.randrange(2) else []  # noqa: E731
        return [
            "--mode", dice.choice(["auto", "async", "sync"]),
            "--quarantine", dice.choice(["2500ms", "3s", "4s"]),
            "--sync-timeout", dice.choice(["20ms", "200ms", "1s"]),
            "--downtime-limit", dice.choice(["1s", "3s", "5s"]),
            *some("--bandwidth", dice.choice(["8M", "16M", "48M"])),
            *some("--consistency", "crash"),
            *some("--connections", str(dice.randrange(1, 5))),
            *some("--buffer", dice.choice(["256K", "2M", "16M"])),
            *some("--answer-timeout", dice.choice(["400ms", "2s"])),
            *(["--verify"] if dice.randrange(4) == 0 else []),
        ]

    def migrate(self, here, there):
        here.ask("migrate", *self.migrate_options(), there.uri)

    # --- faults before the switchover ---

    def fault(self, here, there):
        kinds = [self.kill_source, self.kill_target, self.kill_both, self.restart_source,
                 self.restart_target, self.freeze_source, self.freeze_target, self.cut, self.stall,
                 self.kill_behind, self.mode, self.pause, self.cancel, self.prepare,
                 self.drop_guest]
        kind = self.dice.choice(kinds)
        self.counted(kind, here, there)

    def counted(self, kind, here, there):
        self.note(f"fault: {kind.__name__}")
        self.faults[kind.__name__] += 1
        kind(here, there)
        self.tend()

    def away(self):
        self.sleep(self.dice.choice([0, 0, self.dice.uniform(0, 1)]))

    def kill_source(self, here, _there):
        self.guest.gives_up = self.dice.randrange(2) == 0
        here.kill()
        self.away()
        here.start()

    def kill_target(self, _here, there):
        there.kill()
        self.away()
        there.start()

    def kill_both(self, here, there):
        both = self.dice.sample([here, there], 2)
        for host in both:
            host.kill()
        for host in self.dice.sample(both, 2):
            self.away()
            host.start()

    def restart_source(self, here, _there):
        here.stop()
        self.away()
        here.start()

    def restart_target(self, _here, there):
        there.stop()
        self.away()
        there.start()

    def freeze_source(self, here, _there):
        here.freeze(self.dice.uniform(0.1, 1))

    def freeze_target(self, _here, there):
        there.freeze(self.dice.uniform(0.1, 1))

    def cut(self, _here, there):
        there.way("cut")
        self.sleep(self.dice.uniform(0, 2))
        there.way("mend")

    def stall(self, _here, there):
        # Well within the shortest quarantine: what was on its way arrives then.
        there.way("stall")
        self.sleep(self.dice.uniform(0.1, 1))
        there.way("mend")

    def kill_behind(self, here, there):
        """The source dies while the target lacks what the guest had acknowledged."""
        if self.dice.randrange(2):
            self.sleep(6)  # the target has been flushed: what is flushed and written since counts
        there.way(self.dice.choice(["stall", "cut"]))
        self.sleep(self.dice.uniform(0.1, 0.8))
        self.guest.gives_up = self.dice.randrange(2) == 0
        here.kill()
        there.way("mend")
        here.start()

    def mode(self, here, _there):
        here.ask("set", "--mode", self.dice.choice(["auto", "async", "sync"]),
                 "--bandwidth", self.dice.choice(["0", "8M", "32M"]))

    def pause(self, here, _there):
        here.ask("pause")
        self.sleep(self.dice.uniform(0, 1))
        here.ask("resume")

    def cancel(self, here, there):
        here.ask("cancel")
        self.sleep(self.dice.choice([0, 0.3]))
        self.migrate(here, there)

    def prepare(self, here, _there):
        if here.ask("switch", "--prepare")[0] and self.dice.randrange(2):
            here.ask("switch", "--seal")
        self.sleep(self.dice.uniform(0, 0.5))
        here.ask("switch", "--abort")

    def drop_guest(self, _here, _there):
        self.guest.drop = True

    # --- the switchover ---

    def switch(self, here, there, pivot):
        """Until the record is written; with faults of its own."""
        disturbances = self.dice.choice([0, 1, 1, 2])
        end = time.monotonic() + SWITCH_SECONDS
        while True:
            self.tend()
            status = here.status()
            check(time.monotonic() < end, f"no switchover within {SWITCH_SECONDS} s: {status}")
            check(status["mismatched_bytes"] == 0, f"verify has found differences: {status}")
            role, phase = status["role"], status["phase"]
            if role != "owner":
                check(role == ("pivoted" if pivot else "retired"), f"{here.name} is {role}")
                return
            if phase in ("idle", "failed", "cancelled"):
                self.faults["migrations started again"] += 1
                self.migrate(here, there)
            elif phase == "paused":
                here.ask("resume")
            elif status["in_sync"] and disturbances > 0:
                disturbances -= 1
                self.disturb(here, there, pivot)
                continue
            elif status["in_sync"]:
                done, text = here.ask("switch", "--pivot" if pivot else "--release")
                if not done and "verif" in text:
                    here.ask("verify")
            elif status["stale_bytes"] and self.dice.randrange(20) == 0:
                here.ask("set", "--bandwidth", "0")
            self.sleep(0.2)

    def disturb(self, here, there, pivot):
        kind = self.dice.choice([self.kill_source, self.kill_target, self.kill_both, self.cut,
                                 self.stall, self.freeze_source, self.freeze_target,
                                 self.restart_source, self.drop_guest])
        if self.dice.randrange(2) and here.ask("switch", "--prepare")[0]:
            here.ask("switch", "--seal")  # the commit alone is over in milliseconds
            last, slowest = ("--commit", "pivot" if pivot else "release"), 0.03
        else:
            last, slowest = ("--pivot" if pivot else "--release",), 0.3
        operator = here.ask_in_background("switch", *last)
        self.sleep(self.dice.choice([0, slowest / 10, slowest / 3, slowest]) * self.dice.random())
        self.counted(kind, here, there)
        self.faults["in a switchover"] += 1
        operator.wait(timeout=60)
        self.note(f"the switch ended with {operator.returncode}")
        if here.status()["role"] == "pivoted":
            self.settle(here)

    def released(self, here, there):
        """Nobody serves now: both sides are alike. Then the target's host, or the source again."""
        self.wait(lambda: self.guest.place is None and self.guest.socket is None,
                  "the guest to learn of the release")
        ferry.same(here.disk, there.disk, "both sides after the release")
        self.guest.compare(there.disk, f"{there.name} after the release")
        if self.dice.randrange(8) == 0:
            self.switchovers["back before promote"] += 1
            ok, text = here.ask("unfence")
            check(ok, f"unfence: {text}")
            there.stop()
            self.guest.go_to(here.socket)
            return False
        if self.dice.randrange(4) == 0:
            self.counted(self.kill_source, here, there)
        self.own(there)
        check(here.status()["role"] == "retired", "the source is retired")
        here.kill() if self.dice.randrange(3) == 0 else here.stop()
        self.switchovers["release"] += 1
        self.guest.go_to(there.socket)
        return True

    def own(self, host):
        """The disk counts here from now on."""
        if host.kind != "nbdferry":
            host.stop()
            host.serve(incoming=True)  # whatever its record says from earlier times
        if self.dice.randrange(3) == 0:
            operator = host.ask_in_background("promote")
            self.sleep(self.dice.choice([0, 0.01, 0.03]))
            self.counted(self.dice.choice([self.kill_target, self.restart_target]), None, host)
            operator.wait(timeout=60)
        ok, text = host.ask("promote")
        check(ok, f"promote: {text}")
        check(host.status()["role"] == "owner", "promoted")
        host.incoming = False  # else a restart would make a disk that was released since incoming

    # --- after a pivot ---

    def pivoted(self, here, there):
        """Faults at any moment, within the quarantine after the last one, too."""
        self.switchovers["pivot"] += 1
        self.guest.may_be_released = False
        self.settle(here)
        for _ in range(self.dice.randrange(4)):
            self.sleep(self.dice.uniform(0.05, 1))
            kinds = [self.kill_source, self.kill_target, self.kill_both, self.kill_behind, self.cut,
                     self.stall, self.freeze_source, self.freeze_target, self.restart_source,
                     self.restart_target, self.drop_guest]
            self.counted(self.dice.choice(kinds), here, there)
            self.faults["after a pivot"] += 1
            if self.dice.randrange(2):
                self.settle(here)
        self.settle(here)
        self.guest.drain(self.tend)
        self.guest.flush(self.tend)  # nbdkit has on its disk what was flushed
        self.guest.compare(there.disk, f"{there.name} after a pivot")
        self.guest.go_to(None)
        self.wait(lambda: self.guest.socket is None, "the guest to let go")
        self.guest.go_on()
        here.kill() if self.dice.randrange(2) else here.stop()
        self.own(there)
        os.unlink(here.disk + ".owner")  # by hand, since the copy here does not count any more
        self.guest.compare(there.disk, f"{there.name}, which was pivoted to")
        self.guest.may_be_released = True
        self.guest.go_to(there.socket)
        return True

    def settle(self, here):
        """Nothing is left of the last fault."""
        def quiet():
            status = here.status()
            return status["suspects"] == 0 and any(p["connections"] for p in status["paths"])
        self.wait(quiet, "the end of the suspicion", 60)
        self.guest.flush(self.tend)

    def summary(self):
        def listed(counter):
            return ", ".join(f"{n} {what}" for what, n in sorted(counter.items())) or "none"
        counts = self.guest.counts
        print(f"seed {self.options.seed}: {self.cycles} cycles in "
              f"{time.monotonic() - self.begin:.0f} s\n"
              f"switchovers: {listed(self.switchovers)}\nfaults: {listed(self.faults)}\n"
              f"guest: {counts['bytes'] / MIB:.0f} MiB written, "
              f"{counts['write'] + counts['zero'] + counts['trim']} writes, "
              f"{counts['read']} reads, "
              f"{counts['flush']} flushes, {counts['connections']} connections, "
              f"longest answer {self.guest.longest:.1f} s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--cycles", type=int, default=0, help="instead of minutes")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--rate", type=int, default=300, help="the guest's requests a second")
    options = parser.parse_args()
    print(f"soak: seed {options.seed}", flush=True)
    scratch, soak = KeptScratch(), None
    state = tempfile.mkdtemp(prefix="nbdferry-soak-", dir="/dev/shm")
    try:
        with scratch:
            soak = Soak(scratch, state, options)
            soak.run()
            soak.summary()
    except BaseException:  # a signal, too: what is kept is said
        traceback.print_exc()
        if soak is not None:
            soak.note(traceback.format_exc())
            soak.steps.flush()
            soak.summary()
            print("--- the last steps\n" + "".join(
                pathlib.Path(scratch.file("steps.log")).read_text().splitlines(True)[-40:]))
        print(f"soak: FAILED with --seed {options.seed}; kept: {scratch.path} {state}")
        sys.exit(1)
    shutil.rmtree(state)


if __name__ == "__main__":
    main()
