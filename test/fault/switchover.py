#!/usr/bin/env python3
"""Somebody dies at every step of a switchover, and whose disk it is afterwards.

usage: switchover.py release|pivot|ownership|journal [CASE]...     switchover.py --list

Each case of a sweep is (who dies, at which step). What died is started again with its old command
line, the operator repeats the command until it succeeds, and then:
  - exactly one side takes writes, the other refuses them; a retired disk refuses reads, too;
  - the owner's disk holds what the guests were told, and of each request that was never answered the
    old bytes or the new ones;
  - no guest saw an error but the release; repeating the command succeeds.
"ownership" is what a reboot, another --state directory, a copy or a moved file may do: ownership.py.
"journal" is the death of a pivoted disk's server together with its target: journal.py.
"""
import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "interop"))
sys.dont_write_bytecode = True
import ferry  # noqa: E402
import sandbox  # noqa: E402
import witness  # noqa: E402
from ferry import MIB, check, wait_until  # noqa: E402

SIZE = 8 * MIB
AT_ONCE = 4
OPTIONS = ("--quarantine", "500ms", "--downtime-limit", "2s", "--sync-timeout", "300ms",
           "--reconnect-delay", "20s")

STEPS = ("before prepare", "after prepare", "after seal", "during commit", "after commit",
         "during promote", "after promote", "after abort")
WHO = ("source", "source, in order", "target", "path", "operator", "source and target")
FIRST = ("create", "created", "named")           # points in the write of a first record
LATER = ("overwrite", "torn", "overwritten")     # and of a later one: stop_at_record.cpp


@dataclasses.dataclass(frozen=True)
class Case:
    who: str
    step: str
    kind: str
    point: str = ""

    @property
    def name(self):
        return f"{self.who}: {self.step}" + (f" ({self.point})" if self.point else "")


def sweep(kind):
    for step in STEPS:
        if kind == "pivot" and "promote" in step:
            continue
        for who in WHO:
            if step == "during commit":
                points = FIRST + LATER if who == "source" else ("create", "named")
            elif step == "during promote":
                points = LATER if "target" in who else ("overwrite",)
            else:
                points = ("",)
            for point in points:
                yield Case(who, step, kind, point)


class Host:
    """A disk, and the nbdferry that serves it: its lives have one command line."""

    def __init__(self, world, name, *options):
        self.world, self.name, self.options = world, name, options
        self.disk = str(world.folder / f"{name}.img")
        self.stop_file = str(world.folder / f"{name}.stop")
        self.lives, self.ferry = 0, None

    def before(self):
        for end in (".sock", ".ctl"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.disk + end)
        self.lives += 1
        return ["env", f"LD_PRELOAD={os.environ['STOP_AT_RECORD']}",
                f"NBDFERRY_STOP={self.stop_file}"]

    def start(self, *instead):
        before = self.before()
        self.ferry = ferry.Ferry(self.world.scratch, self.disk, *(instead or self.options),
                                 name=f"{self.name}{self.lives}", before=before)
        return self.ferry

    def launch(self, *options):
        """One that isn't expected to come to serve."""
        command = [*self.before(), ferry.NBDFERRY, "serve", *options, self.disk]
        return self.world.scratch.start(f"{self.name}{self.lives}", command)

    @staticmethod
    def state_of(process):
        stat = pathlib.Path(f"/proc/{process.pid}/stat").read_text()
        return stat.rsplit(")", 1)[1].split()[0]

    def log(self):
        return self.world.scratch.log(f"{self.name}{self.lives}")

    def kill(self):
        self.ferry.process.kill()
        self.ferry.process.wait()

    def arm(self, point):
        pathlib.Path(self.stop_file).write_text(point)

    def wait_stopped(self):
        wait_until(lambda: self.state_of(self.ferry.process) == "T",
                   f"{self.name} to reach the point")

    def go_on(self):
        self.ferry.process.send_signal(signal.SIGCONT)

    def dead(self):
        return self.ferry.process.poll() is not None

    def command(self, *words):
        """In the background."""
        process = subprocess.Popen(
            [ferry.NBDFERRY, words[0], "--control", self.ferry.control, *words[1:]],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.world.scratch.processes.append(process)
        return process

    def write(self):
        """Somebody else's write and read: (may write, may read). The bytes are those already there."""
        def does(command):
            return ferry.run(["qemu-io", "-f", "raw", "-c", command, self.ferry.uri]).returncode == 0
        return does("write -P 0x6e 0 4k"), does("read 4k 4k")


class World:
    def __init__(self, scratch, folder, seed=1):
        self.scratch, self.folder = scratch, pathlib.Path(folder)
        self.dice = random.Random(seed)
        self.state = str(self.folder / "state")
        self.source = Host(self, "source", "--state", self.state)
        self.target = Host(self, "target", "--incoming", "--create", str(SIZE),
                           "--state", self.state)
        self.contents = bytearray(self.dice.randbytes(SIZE))
        pathlib.Path(self.source.disk).write_bytes(self.contents)
        self.guests = []
        self.relay = None

    def start(self, kind_of_record="first"):
        if kind_of_record == "later":  # the source's record is there already: it came from elsewhere
            disk = self.source.start("--incoming", *self.source.options)
            disk.ok("promote")
            disk.stop()
        self.target.start()
        self.relay = witness.Relay(self.target.ferry.socket)
        self.source.start()
        half = SIZE // 2
        # The first 64 KiB are for strangers' writes.
        self.guests = [witness.Witness(self.source.ferry.socket, self.contents, 65536, half, 1),
                       witness.Witness(self.source.ferry.socket, self.contents, half, SIZE, 2)]
        self.begin()

    def migrate(self, *options):
        self.source.ferry.ok("migrate", *OPTIONS, *options, "--wait",
                             f"nbd://127.0.0.1:{self.relay.port}/")

    def begin(self):
        for one in self.guests:
            one.begin()

    def end(self):
        for one in self.guests:
            one.end()

    def repeat(self, host, *words, seconds=20):
        """As an operator does: until it is done. What stands in the way has to be said."""
        end = time.monotonic() + seconds
        said = []
        while True:
            result = host.ferry.run(*words)
            if result.returncode == 0:
                return said
            ferry.check_error(result, "")
            text = result.stderr.strip()
            if text not in said:
                said.append(text)
            check(time.monotonic() < end, f"{words} does not succeed: {said}")
            if "can't prove" in text:
                host.ferry.ok("verify")
            time.sleep(0.1)

    def written(self, count=30):
        return sum(one.acknowledged for one in self.guests) > count

    def same(self, host):
        """The disk's file holds what the guests know."""
        data = pathlib.Path(host.disk).read_bytes()
        for one in self.guests:
            for block in range(one.low // witness.BLOCK, one.high // witness.BLOCK):
                part = slice(block * witness.BLOCK, (block + 1) * witness.BLOCK)
                if data[part] != self.contents[part]:
                    one.judge(block, data[part])
            check(not one.wrong, f"{host.name}: {one.wrong[:5]}")

    def close(self):
        for one in self.guests:
            one.over = True
        if self.relay:
            self.relay.cut()


# --- what dies, and comes back --------------------------------------------------------------------

def start_target(world):
    """With yesterday's command line; one that has been promoted refuses it, and says what to do."""
    try:
        world.target.start()
    except AssertionError:
        check("records that this disk counts" in world.target.log(), world.target.log())
        world.target.start("--state", world.state)
        check(world.target.ferry.status()["role"] == "owner", "promoted")


def die(world, case):
    source, target = world.source, world.target
    if case.who == "source, in order":
        source.ferry.process.send_signal(signal.SIGTERM)
        source.go_on()
        check(source.ferry.process.wait(timeout=30) == 0, f"the end: {source.log()}")
    elif case.who in ("source", "source and target"):
        source.kill()
    if case.who in ("target", "source and target"):
        target.kill()
    if case.who == "path":
        world.relay.cut()


def come_back(world, case):
    source, target = world.source, world.target
    for host in (source, target):
        if not host.dead():
            host.go_on()
    if case.who == "path":
        time.sleep(0.2)
        world.relay.open()
    if target.dead():
        time.sleep(0.2)
        start_target(world)
    if source.dead():
        for one in world.guests:
            one.end()
        source.start()
        world.begin()


# --- the steps ------------------------------------------------------------------------------------

NEXT = {"before prepare": ("source", "switch", "--prepare"),
        "after prepare": ("source", "switch", "--seal"),
        "after seal": ("source", "switch", "--commit", "KIND"),
        "after commit": ("target", "promote"),
        "after promote": ("target", "promote"),
        "after abort": ("source", "switch", "--abort")}


def bring_to(world, case):
    """To the step; something of it may be stopped."""
    disk = world.source.ferry
    switch = ("switch", f"--{case.kind}")
    if case.step in ("after prepare", "after seal", "after abort"):
        world.repeat(world.source, "switch", "--prepare")
    if case.step in ("after seal", "after abort"):
        disk.ok("switch", "--seal")
    if case.step == "after abort":
        disk.ok("switch", "--abort")
    command = None
    if case.step == "during commit":
        world.source.arm(case.point)
        command = world.source.command(*switch)
        world.source.wait_stopped()
    if case.step in ("after commit", "during promote", "after promote"):
        world.repeat(world.source, *switch)
    if case.step == "during promote":
        world.target.arm(case.point)
        command = world.target.command("promote")
        world.target.wait_stopped()
    if case.step == "after promote":
        world.target.ferry.ok("promote")
    if case.who == "operator" and command is None:
        # In the middle of the command that comes next.
        side, *words = NEXT[case.step]
        if case.kind == "pivot" and words == ["promote"]:
            side, words = "source", switch
        words = [word.replace("KIND", case.kind) for word in words]
        command = getattr(world, side).command(*words)
        time.sleep(world.dice.random() * 0.02)
    if case.who == "operator":
        command.kill()
    if command is not None:
        world.command = command


def run_sweep_case(case, world):
    world.start("later" if case.step == "during commit" and case.point in LATER else "first")
    world.migrate()
    wait_until(world.written, "the guests write")
    bring_to(world, case)
    die(world, case)
    come_back(world, case)
    if case.step == "after abort":
        world.repeat(world.source, "switch", "--abort")
        status = world.source.ferry.status()
        check(status["role"] == "owner" and status["serving"] == "source" and
              not status["holding"], f"aborted: {status}")
        check(world.source.write()[0], "after an abort the source takes writes")
        check(not world.target.write()[0], "after an abort the target takes writes")
    said = world.repeat(world.source, "switch", f"--{case.kind}")
    world.source.ferry.ok("switch", f"--{case.kind}")
    judge(world, case)
    return said


def judge(world, case):
    source, target = world.source, world.target
    if case.kind == "release":
        wait_until(lambda: all(not one.thread.is_alive() for one in world.guests),
                   "the guests learn of the release")
        world.end()
        check(source.write() == (False, False), "a released disk answers")
        if case.step not in ("during promote", "after promote"):
            check(not target.write()[0] or target.ferry.status()["role"] == "owner",
                  "the target takes a stranger's writes before it is promoted")
        world.repeat(target, "promote")
        target.ferry.ok("promote")
        check(source.ferry.status()["role"] == "retired", "the source is retired")
        check(target.ferry.status()["role"] == "owner", "the target is the owner")
        world.same(source)
        world.same(target)
        check(target.write() == (True, True), "the owner takes writes")
        check(source.write() == (False, False), "a released disk answers")
    else:
        time.sleep(0.1)
        world.end()
        world.source.ferry.ok("switch", "--pivot")
        ferry.run_ok(["qemu-io", "-f", "raw", "-c", "flush", source.ferry.uri])
        status = source.ferry.status()
        check(status["role"] == "pivoted" and status["serving"] == "target", f"pivoted: {status}")
        world.same(target)
        own = pathlib.Path(source.disk).read_bytes()
        check(source.write() == (True, True), "the pivoted source takes writes")
        check(not target.write()[0], "the target takes a stranger's writes")
        check(pathlib.Path(source.disk).read_bytes() == own, "its own disk is left alone")
        with open(target.disk, "rb") as f:
            check(f.read(4096) == b"\x6e" * 4096, "what it took is on the target")
    if not source.dead():
        source.ferry.stop()
    target.ferry.stop()


def run_case(name, run, seed):
    begun = time.monotonic()
    with ferry.Scratch() as scratch, ferry.state_directory() as folder:
        world = World(scratch, folder, seed)
        try:
            said = run(world) or []
        finally:
            world.close()
    return f"{name}: {time.monotonic() - begun:.1f} s" + "".join(f"\n    {s}" for s in said)


def groups():
    import journal  # which need this file
    import ownership
    all_groups = {kind: {case.name: lambda w, c=case: run_sweep_case(c, w) for case in sweep(kind)}
                  for kind in ("release", "pivot")}
    return all_groups | {"ownership": ownership.CASES, "journal": journal.CASES}


def main(group, *names):
    sandbox.enter()
    runs = {name: run for name, run in groups()[group].items() if not names or name in names}
    check(runs, "no such case")
    failed = []
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        pending = {pool.submit(run_case, name, run, seed): name
                   for seed, (name, run) in enumerate(runs.items())}
        for done in concurrent.futures.as_completed(pending):
            try:
                print(done.result(), flush=True)
            except Exception as error:  # whatever it is: the other cases go on
                failed.append(pending[done])
                traceback.print_exception(error)
                print(f"{pending[done]}: FAILED: {error}", flush=True)
    check(not failed, f"failed: {failed}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        for group_name, cases in groups().items():
            for case_name in cases:
                print(f"{group_name:10} {case_name}")
    else:
        main(*sys.argv[1:])
