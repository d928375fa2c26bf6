"""A VM moves: disks to in sync, then memory, then all of it at once, at one place at any time.

The order, and why nothing is lost whenever this ends (DESIGN.md, rule 10):
  1. every disk is mirrored and in sync
  2. memory goes until little is left; QEMU stops the VM ("pre-switchover")
  3. prepare: every disk in lock-step with its target, which has flushed. Holds nothing: QEMU's format
     drivers still write when they are told to let go; so it takes none of the guest's time, beside
  4. the rest of the memory; the destination has loaded it, and is not running
  5. seal every disk; commit every disk: from the first commit's record on, the VM belongs there.
     Before: abort, and the VM goes on here. After: only forward
  6. promote each disk there, after its own commit; cont there; quit here
Nothing is remembered between two runs: what there is to do is seen from both sides' states.
"""
import concurrent.futures
import contextlib
import json
import subprocess
import time

from checks import machines, obstacles
from common import Problem
from ferry import Ferry, FerryError, FerryRefused
from hosts import Local, read_vm
from qmp import Qmp, QmpError
from report import MIB, bytes_text, milliseconds, table

# The destination is given up if nothing moves for so long; none of these is part of a good move.
LOAD_SECONDS = 60
STATE_SECONDS = 20
COMMIT_TRIES = 5
DEBT_AT_STOP = 256 * 1024
LEVEL_GRACE_SECONDS = 5
UNLIMITED = 1 << 40
MIGRATING = ("setup", "wait-unplug", "active", "postcopy-active", "pre-switchover", "device",
             "cancelling")
MIRRORING = ("queued", "connecting", "copying", "in_sync", "interrupted", "paused", "prepared",
             "sealed", "switching")
DISK_STEPS = ("prepare", "seal", "commit", "promote")
ENDED = ("failed", "cancelled", "idle")


class DiskMove:
    """One disk: its server here, its server there."""

    def __init__(self, here, there, other):
        self.name = here["name"]
        self.uri = there.get("uri")
        self.source = Ferry(here["control"], f"{self.name} here")
        self.target = Ferry(other.socket(there["control"]), f"{self.name} {other.label}")

    def handed_over(self):
        return self.source.status()["role"] == "retired"

    def step(self, action):
        self.source.command("switch", action=action)

    def promote(self):
        self.target.command("promote")


class Move:
    def __init__(self, options, other, progress):
        self.options, self.other, self.progress = options, other, progress
        self.here = read_vm(Local(), options.dir)
        self.there = read_vm(other, options.to_dir)
        self.disks = []
        if not options.memory_only:
            self.disks = [DiskMove(a, b, other)
                          for a, b in zip(self.here["disks"], self.there["disks"])
                          if "control" in a and "control" in b and a["name"] not in options.scratch]
        self.began = time.monotonic()
        self.took = {}  # seconds, by name of the step
        self.iops = []
        self.last = []  # the disks' states before the commit
        self.preparing = []  # futures
        self.memory_bytes = None
        self.threads = concurrent.futures.ThreadPoolExecutor(max(1, len(self.disks)))

    def __enter__(self):
        self.source = Qmp(self.here["qmp"], "QEMU here")
        self.target = None
        if self.there["qmp"]:
            self.reach_target()
        return self

    def __exit__(self, *_):
        self.threads.shutdown()
        for disk in self.disks:
            disk.source.close()
            disk.target.close()
        self.source.close()
        if self.target:
            self.target.close()

    def reach_target(self):
        self.target = Qmp(self.other.socket(self.there["qmp"]), f"QEMU {self.other.label}")

    # --- the commands ---

    def run(self):
        if not self.handed_over():
            found = obstacles(self)
            if found:
                raise Problem("\n".join(found))
            if self.options.dry_run:
                self.progress.say(f"nothing is in the way of moving {self.here['name']}: "
                                  f"{len(self.disks)} disks, and the memory")
                return 0
            try:
                self.until_sealed()
            except BaseException as e:
                self.progress.say(f"going back, the VM stays here: {e or type(e).__name__}")
                self.abort()
                raise
        elif self.options.dry_run:
            self.progress.say("the VM belongs there already: running this again finishes the move")
            return 0
        self.finish()
        print(json.dumps(self.figures()) if self.options.json else table(self.summary()))
        return 0

    def abort_earlier(self):
        if self.handed_over():
            raise Problem("too late: the disks have been handed over, the VM belongs there; run this "
                          "again without --abort to finish the move")
        self.abort()
        for disk in self.disks:
            if disk.source.status()["phase"] in MIRRORING:
                disk.source.command("cancel")
        self.progress.say("the VM runs here, and nothing of it moves")
        return 0

    def handed_over(self):
        return any(disk.handed_over() for disk in self.disks)

    # --- before the commit ---

    def until_sealed(self):
        self.bring_disks_in_sync()
        if not self.target:
            self.start_target()
        if self.source.status() != "postmigrate":
            self.send_memory()
            # Beside the rest of the VM's state; both have to be through before a disk is sealed.
            self.preparing = [self.threads.submit(disk.step, "prepare") for disk in self.disks]
            self.timed("state", self.hand_over_state)
            self.timed("prepare", lambda: [done.result() for done in self.preparing])
        else:  # an earlier run has come this far
            self.each("prepare")
        self.timed("seal", lambda: self.each("seal"))
        self.last = [disk.source.status() for disk in self.disks]

    def each(self, action):
        """The step for every disk, side by side."""
        self.all(lambda disk: disk.step(action))

    def all(self, do):
        if len(self.disks) == 1:
            do(self.disks[0])
            return
        for done in [self.threads.submit(do, disk) for disk in self.disks]:
            done.result()

    def timed(self, name, do):
        begin = time.monotonic()
        do()
        self.took[name] = self.took.get(name, 0.0) + time.monotonic() - begin

    def bring_disks_in_sync(self):
        begin = time.monotonic()
        for disk in self.disks:
            if disk.source.status()["phase"] not in MIRRORING:
                disk.source.command("migrate", uris=[disk.uri])
        level_since = None
        while self.disks:
            states = [disk.source.status() for disk in self.disks]
            for disk, state in zip(self.disks, states):
                if state["phase"] in ENDED:
                    raise Problem(f"{disk.name}: its copy has ended: {state['phase']}: "
                                  f"{state['last_error'] or 'no reason given'}")
            self.show_disks(states)
            if all(s["phase"] in ("in_sync", "prepared", "sealed") for s in states):
                # "In sync" may still mean a downtime limit's worth of debt, which the guest would
                # wait out, stopped: what a busy guest leaves within the grace is enough.
                level_since = level_since or time.monotonic()
                if all(s["debt_bytes"] <= DEBT_AT_STOP for s in states) or \
                        time.monotonic() - level_since > LEVEL_GRACE_SECONDS:
                    break
            else:
                level_since = None
            time.sleep(0.1)
        self.took["disks"] = time.monotonic() - begin

    def show_disks(self, states):
        size = sum(s["size_bytes"] for s in states)
        debt = sum(s["debt_bytes"] for s in states)
        rate = sum(s["bytes_per_second"] for s in states)
        self.iops.append(sum(s["guest"]["write_iops"] for s in states))
        trouble = next((f"; {s['phase']}: {s['last_error']}" for s in states
                        if s["phase"] == "interrupted"), "")
        trouble = trouble or next((f"; {s['verdict']}" for s in states if s["suspects"]), "")
        self.progress.line(f"disks: {100 * (size - debt) / size:5.1f}% of {bytes_text(size)}, "
                           f"{bytes_text(rate)}/s{trouble}")

    def start_target(self):
        """QEMU there has waited for its disks' content: the images are not raw."""
        self.other.touch(self.there["go"])
        end = time.monotonic() + STATE_SECONDS
        while not self.there["qmp"]:
            if time.monotonic() > end:
                raise Problem(f"QEMU does not start {self.other.label}: see attach-vm.sh there")
            time.sleep(0.1)
            self.there = read_vm(self.other, self.options.to_dir)
        self.reach_target()
        found = list(machines(self))
        if found:
            raise Problem("\n".join(found))

    def send_memory(self):
        """Until QEMU has stopped the VM, with the last of the memory still to go."""
        begin = time.monotonic()
        if self.source.migration()["status"] not in MIGRATING:
            self.start_memory()
        while True:
            state = self.source.migration()
            if state["status"] in ("pre-switchover", "device", "completed"):
                break
            if state["status"] not in MIGRATING:
                raise Problem(f"the memory does not get there: {state['status']}: "
                              f"{state.get('error-desc', 'QEMU gives no reason')}")
            ram = state.get("ram")
            if ram:
                self.progress.line(
                    f"memory: {bytes_text(ram['transferred'])} sent, "
                    f"{bytes_text(ram['remaining'])} left, {ram.get('mbps', 0) / 8:.0f} MB/s, "
                    f"round {ram.get('dirty-sync-count', 0)}")
            for disk in self.disks:
                state = disk.source.status()
                if state["phase"] in ENDED:
                    raise Problem(f"{disk.name} is not mirrored any more: {state['phase']}: "
                                  f"{state['last_error'] or 'no reason given'}")
            if self.target.status() not in ("inmigrate", "paused"):
                raise Problem(f"QEMU {self.other.label} does not wait for the VM any more")
            self.source.pump(0.05)
        self.took["memory"] = time.monotonic() - begin

    def start_memory(self):
        supported = [{c["capability"] for c in qemu.call("query-migrate-capabilities")}
                     for qemu in (self.source, self.target)]
        wanted = {"events", "pause-before-switchover", "late-block-activate", "return-path",
                  "auto-converge", "multifd"} & supported[0] & supported[1]
        if "pause-before-switchover" not in wanted and self.disks:
            raise Problem("QEMU is too old: it has no pause-before-switchover on both sides")
        capabilities = [{"capability": name, "state": True} for name in sorted(wanted)]
        speed = self.options.memory_bandwidth * MIB or UNLIMITED
        for qemu in (self.source, self.target):
            qemu.call("migrate-set-capabilities", capabilities=capabilities)
            qemu.call("migrate-set-parameters", max_bandwidth=speed,
                      downtime_limit=self.options.downtime_limit)
        if self.target.migration()["status"] == "none":
            self.target.call("migrate-incoming", uri=self.there["memory"])
        self.source.call("migrate", uri=self.there["memory"])

    def hand_over_state(self):
        """The VM is stopped: what is left of it goes, and is loaded there."""
        if self.source.migration()["status"] == "pre-switchover":
            self.source.call("migrate-continue", state="pre-switchover")

        def sent():
            state = self.source.migration()
            if state["status"] not in (*MIGRATING, "completed"):
                raise Problem(f"the VM did not load {self.other.label}: {state['status']}: "
                              f"{state.get('error-desc', 'QEMU gives no reason')}")
            self.memory_bytes = state.get("ram", {}).get("transferred")
            return state["status"] == "completed"

        if not self.source.wait(sent, LOAD_SECONDS):
            raise Problem(f"the VM's state is not through after {LOAD_SECONDS} s")
        if not self.target.wait(self.loaded, LOAD_SECONDS, step=0.001):
            raise Problem(f"the VM is not loaded {self.other.label} after {LOAD_SECONDS} s")

    def loaded(self):
        return self.target.status() == "paused"

    # --- back ---

    def abort(self):
        """The VM goes on here. Raises if it may belong there: then nothing is touched."""
        concurrent.futures.wait(self.preparing)  # a prepare gives up by itself, soon
        for disk in self.disks:
            self.undo_switch(disk)
        if self.source.migration()["status"] in MIGRATING:
            self.source.call("migrate_cancel")
            self.source.wait(lambda: self.source.migration()["status"] not in MIGRATING,
                             STATE_SECONDS)
        self.end_target()
        if self.source.status() != "running":
            self.source.call("cont")
        if not self.source.wait(lambda: self.source.status() == "running", STATE_SECONDS):
            raise Problem(f"the VM does not go on here: it is {self.source.status()}")
        if self.disks:
            self.progress.say("the VM runs here; its disks are still mirrored, for the next try "
                              "(--abort ends that)")

    def undo_switch(self, disk):
        try:
            if disk.handed_over():
                raise Problem(f"{disk.name} has been handed over: the VM belongs there; run this "
                              "again to finish the move")
            if disk.source.status()["phase"] in ("prepared", "sealed", "switching"):
                disk.step("abort")
        except FerryRefused:
            if disk.source.status()["phase"] in ("sealed", "switching", "switched"):
                raise
        except FerryError as e:
            raise Problem(f"{e}\nwhether {disk.name} has been handed over is not known, so the VM "
                          "is left as it is: start its server again, then run this again") from e

    def end_target(self):
        """What has begun to load there is of no use any more."""
        if not self.target:
            return
        try:
            if self.target.migration()["status"] != "none" or self.target.status() == "paused":
                self.target.call("quit")
        except QmpError:
            pass  # gone already

    # --- after the first commit ---

    def finish(self):
        """From sealed to running there; also what an earlier run has left."""
        self.hand_over_disks()
        state = self.target.status() if self.target else "inmigrate"
        if state == "inmigrate":
            raise Problem(f"the disks are {self.other.label} now, and writable, but the QEMU that had "
                          "loaded the VM is gone: boot it there (attach-vm.sh without --incoming)")
        if state == "paused":
            if self.options.before_cont:
                self.timed("hook", self.run_hook)
            self.target.call("cont")
        if not self.target.wait(lambda: self.target.status() == "running", STATE_SECONDS):
            raise Problem(f"the VM does not run {self.other.label}: it is {self.target.status()}")
        self.target.pump(0)
        if not self.options.keep_source and self.source.status() == "postmigrate":
            self.source.call("quit")

    def run_hook(self):
        code = subprocess.run(["sh", "-c", self.options.before_cont], stdin=subprocess.DEVNULL,
                              check=False).returncode
        if code != 0:
            self.progress.say(f"--before-cont has failed with exit code {code}; going on")

    def hand_over_disks(self):
        """Every disk, whatever it takes: from the first record on there is no way back. Each is
        promoted as soon as its own record is written.
        """
        begin = time.monotonic()
        committed = []

        def hand_over(disk):
            self.commit_one(disk)
            committed.append(time.monotonic())
            disk.promote()

        self.all(hand_over)
        last = max(committed, default=begin)
        self.took["commit"] = last - begin
        self.took["promote"] = time.monotonic() - last

    def commit_one(self, disk):
        for left in reversed(range(COMMIT_TRIES)):
            try:
                disk.step("commit-release")  # the VM stands still: nothing is asked before
                return
            except FerryError:
                if left == 0:
                    raise
            time.sleep(0.2)
            with contextlib.suppress(FerryError):
                status = disk.source.status()
                if status["role"] == "retired":
                    return
                if status["phase"] != "sealed":
                    disk.step("prepare")
                    disk.step("seal")

    # --- the end ---

    def figures(self):
        """What --json prints: seconds and bytes, null where it is not known (an earlier run did it)."""
        stop, resume = self.source.time_of("STOP"), self.target and self.target.time_of("RESUME")
        steps = {step: self.took.get(step) for step in (*DISK_STEPS, "hook")}
        blackout = resume - stop if stop and resume else None
        whole = blackout is not None and None not in (steps[step] for step in DISK_STEPS)
        disk = sum(steps[step] for step in DISK_STEPS) if whole else None
        return {
            "name": self.here["name"],
            "seconds": time.monotonic() - self.began,
            "disks_seconds": self.took.get("disks"),
            "memory_seconds": self.took.get("memory"),
            "blackout_seconds": blackout,
            "blackout_disk_seconds": disk,
            "blackout_memory_seconds": blackout - disk - (steps["hook"] or 0.0) if whole else None,
            "steps_seconds": steps,
            "memory_bytes": self.memory_bytes,
            "guest_write_iops": sum(self.iops) / len(self.iops) if self.iops else None,
            "disks": [{"name": disk.name, "size_bytes": status["size_bytes"],
                       "sent_bytes": sum(path["sent_bytes"] for path in status["paths"]),
                       "mirrored_bytes": status["mirrored_bytes"]}
                      for disk, status in zip(self.disks, self.last)]}

    def summary(self):
        """The same for a person."""
        f = self.figures()
        steps = ", ".join(f"{step} {milliseconds(f['steps_seconds'][step])}" for step in DISK_STEPS)
        rows = [("moved", f"{f['name']}: now {self.other.label}"),
                ("time", f"{f['seconds']:.1f} s (disks {f['disks_seconds'] or 0:.1f} s, "
                         f"memory {f['memory_seconds'] or 0:.1f} s)"),
                ("guest stood still", milliseconds(f["blackout_seconds"]))]
        if f["blackout_memory_seconds"] is not None:
            rows += [("  for its memory", milliseconds(f["blackout_memory_seconds"])),
                     ("  for its disks", f"{milliseconds(f['blackout_disk_seconds'])} ({steps})")]
        if f["steps_seconds"]["hook"] is not None:
            rows.append(("  for --before-cont", milliseconds(f["steps_seconds"]["hook"])))
        if f["memory_bytes"] is not None:
            rows.append(("memory sent", bytes_text(f["memory_bytes"])))
        rows += [(f"{d['name']} sent", f"{bytes_text(d['sent_bytes'])} of "
                                       f"{bytes_text(d['size_bytes'])}, mirrored "
                                       f"{bytes_text(d['mirrored_bytes'])}") for d in f["disks"]]
        if f["guest_write_iops"] is not None:
            rows.append(("guest's writes", f"{f['guest_write_iops']:.0f}/s while copying"))
        return rows
