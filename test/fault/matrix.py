#!/usr/bin/env python3
"""The fault matrix: what a target can do to a migration, and what must come of it.

usage: matrix.py GROUP [CASE]...     matrix.py --list

Each case is a line in cases.py. In every case a guest writes and reads at a given rate, from before
the fault to the end, and whatever happens:
  - it sees no error and no wrong byte, and waits no longer than the case's bound;
  - the status is true: it never says in sync while the fault lasts, says the reason for a failure,
    and what the case expects to read meanwhile;
  - in the end both sides are equal and what the guest wrote: after the migration's own recovery, or
    after a failure and a second migration to a healthy server;
  - nothing is left: no descriptor, no connection, no held request, and `serve` ends with 0.
"""
import concurrent.futures
import http.client
import json
import os
import pathlib
import socket
import sys
import threading
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "interop"))
sys.dont_write_bytecode = True
import cases  # noqa: E402
import ferry  # noqa: E402
import sandbox  # noqa: E402
import servers  # noqa: E402
from ferry import MIB, check, wait_until  # noqa: E402

SIZE = 16 * MIB
AT_ONCE = 4
OPTIONS = {"--quarantine": "1s", "--sync-timeout": "300ms", "--downtime-limit": "1s",
           "--max-delay": "50ms", "--reconnect-delay": "20s"}


class World:
    """One case's: files, processes, the disk, its guest, and what the status said over time."""

    def __init__(self, scratch, case, number):
        self.scratch, self.case, self.number, self.size = scratch, case, number, SIZE
        self.at_end = []  # called in reverse
        self.reasons = []  # that the operator was given
        self.source = scratch.disk("source.img", SIZE)
        self.image = scratch.garbage("target.img", SIZE)
        self.server = case.server(self)
        self.disk = ferry.Ferry(scratch, self.source)
        self.load = ferry.Load(scratch, self.disk.uri, self.source, "--depth", "16",
                               "--until-shutdown", "--rate", str(case.rate), "--bytes",
                               str(case.bytes))
        wait_until(lambda: self.status()["guest"]["connections"] == 1, "the guest is there")
        self.descriptors = self.open_descriptors()
        self.watch = Watch(self)

    def status(self):
        """Without a process for each."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(10)
            s.connect(self.disk.control)
            s.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            response = http.client.HTTPResponse(s)
            response.begin()
            return json.loads(response.read())

    def open_descriptors(self):
        """Of the serving process, but those of control connections that come and go."""
        folder = f"/proc/{self.disk.process.pid}/fd"
        return len(os.listdir(folder))

    def wait_for(self, condition, what, seconds=20):
        wait_until(lambda: condition(self.status()), what, seconds)

    def pause(self, seconds):
        time.sleep(seconds)
        self.load.running()


class Watch:
    """Asks for the status all the time. What is never true, and what was read, is noted."""

    def __init__(self, world):
        self.world, self.lies, self.texts, self.phases = world, [], set(), []
        self.must_not_be_in_sync = False
        self.over = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.over:
            must_not = self.must_not_be_in_sync
            try:
                self.judge(self.world.status(), must_not)
            except OSError as error:
                if not self.over:
                    self.lies.append(f"no status: {error!r}")
                return
            time.sleep(0.05)

    def judge(self, status, must_not):
        phase, error = status["phase"], status["last_error"]
        self.texts.update({status["verdict"], error or ""})
        if not self.phases or self.phases[-1] != phase:
            self.phases.append(phase)

        def lie(condition, what):
            if condition:
                self.lies.append(f"{what}: {status}")
        lie(must_not and status["in_sync"], "in sync while the fault lasts")
        lie(status["in_sync"] and phase not in ("in_sync", "prepared", "sealed", "switching",
                                                "switched"), "in sync in this phase")
        lie(phase == "failed" and (not error or error not in status["verdict"]),
            "failed without the reason")
        lie(any("\n" in (t or "") for t in (error, status["verdict"])), "several lines")
        lie(phase in ("copying", "in_sync") and not any(p["connections"] for p in status["paths"]),
            "going on without a connection")
        lie(phase == "interrupted" and not error, "interrupted without a reason")
        lie(status["serving"] != "source" and phase in ("copying", "failed", "interrupted"),
            "somebody else serves")

    def end(self):
        self.over = True
        self.thread.join(timeout=10)
        check(not self.lies, "\n".join(["the status lied"] + self.lies[:3]))

    def has_said(self, text):
        return any(text in t for t in list(self.texts))


# --- what becomes of it ---------------------------------------------------------------------------

def begin(world, uri, **more):
    options = OPTIONS | world.case.options | dict(more)
    return world.disk.run("migrate", *(word for pair in options.items() for word in pair), uri)


def recovers(world):
    """By itself. The operator only switches."""
    result = begin(world, world.server.uri)
    check(result.returncode == 0, f"migrate: {result.stderr}")
    world.case.act(world)
    servers.wait_until_fired(world.server)
    world.watch.must_not_be_in_sync = False
    finish(world, world.image)
    # The sample that is compared after a loss is the second line: what may be gone was sent again before.
    check("does not hold what it held" not in world.scratch.log("ferry"), "the target differed after its return")


def refused(world):
    """`migrate` itself says it."""
    result = begin(world, world.server.uri)
    ferry.check_error(result, world.case.says)
    world.reasons.append(result.stderr.strip())
    servers.wait_until_fired(world.server)
    after_failure(world)


def fails(world):
    """Later, with the reason in the status."""
    result = begin(world, world.server.uri)
    check(result.returncode == 0, f"migrate: {result.stderr}")
    world.case.act(world)
    world.wait_for(lambda s: s["phase"] == "failed", "failed")
    servers.wait_until_fired(world.server)
    status = world.status()
    check(world.case.says in status["last_error"], f"the reason: {status['last_error']}")
    world.reasons.append(status["verdict"])
    after_failure(world)


def persists(world):
    """It is tried again and again, said so, until the operator cancels."""
    result = begin(world, world.server.uri)
    check(result.returncode == 0, f"migrate: {result.stderr}")
    world.watch.must_not_be_in_sync = True
    world.case.act(world)
    wait_until(lambda: world.watch.has_said(world.case.says), f"the status says {world.case.says}")
    world.pause(2)
    check(world.status()["phase"] in ("copying", "interrupted"), f"goes on: {world.status()}")
    servers.wait_until_fired(world.server)
    world.reasons += [world.status()["verdict"], world.status()["last_error"]]
    world.disk.ok("cancel")
    world.wait_for(lambda s: s["phase"] == "cancelled", "cancelled")
    after_failure(world)


def unswitchable(world):
    """It may get in sync, yet a switchover is given up, with the reason, and nobody is hurt."""
    result = begin(world, world.server.uri)
    check(result.returncode == 0, f"migrate: {result.stderr}")
    world.case.act(world)
    servers.wait_until_fired(world.server)
    for _ in range(2):
        world.wait_for(lambda s: s["in_sync"], "in sync")
        result = world.disk.run("switch", "--release")
        ferry.check_error(result, world.case.says)
        world.reasons.append(result.stderr.strip())
        world.load.running()
    check(not world.status()["holding"], "the guest's writes are held")
    world.disk.ok("cancel")
    world.wait_for(lambda s: s["phase"] == "cancelled", "cancelled")
    after_failure(world)


def pivoted(world):
    """The guest is served from the target when the fault comes. It may wait, it gets no error."""
    result = begin(world, world.server.uri)
    check(result.returncode == 0, f"migrate: {result.stderr}")
    world.wait_for(lambda s: s["in_sync"] and s["stale_bytes"] + s["copying_bytes"] == 0, "in sync")
    world.disk.ok("switch", "--pivot")
    world.pause(0.3)
    world.case.act(world)
    servers.wait_until_fired(world.server)
    world.pause(1)
    check(world.status()["role"] == "pivoted", f"pivoted: {world.status()}")
    statistics = world.load.end()
    world.watch.end()
    world.disk.stop()
    judge_guest(world, statistics)
    ferry.same(world.load.shadow, world.image, "the target against what the guest wrote")


def after_failure(world):
    """Nothing is held, the guest goes on, and a second migration gets through."""
    world.load.running()
    status = world.status()
    check(status["serving"] == "source" and not status["holding"] and not status["in_sync"] and
          status["held_requests"] == 0, f"after the failure: {status}")
    wait_until(lambda: world.open_descriptors() <= world.descriptors + 1,
               "descriptors are given back", 5)  # one may be the watch's
    if hasattr(world.server, "connections"):
        wait_until(lambda: world.server.connections() <= 0, "connections are closed", 5)
    image = world.scratch.garbage("second.img", SIZE)
    uri = ferry.nbdkit(world.scratch, "file", image, name="second")
    world.watch.must_not_be_in_sync = False
    result = begin(world, uri)
    check(result.returncode == 0, f"the second migration: {result.stderr}")
    finish(world, image)


def finish(world, image):
    """In sync, released, equal."""
    disk, load = world.disk, world.load
    # In sync is said when the rest is small; after a fault all of it has to have gone through.
    world.wait_for(lambda s: s["in_sync"] and s["stale_bytes"] + s["copying_bytes"] == 0,
                   "in sync", 30)
    release(world)
    wait_until(lambda: load.process.poll() is not None, "the guest learns of the release")
    statistics = load.end()
    status = world.status()
    check(status["role"] == "retired" and not status["holding"] and status["held_requests"] == 0,
          f"released: {status}")
    world.watch.end()
    disk.stop()
    ferry.same(world.source, image, "source against target")
    ferry.same(load.shadow, image, "the target against what the guest wrote")
    judge_guest(world, statistics)


def judge_guest(world, statistics):
    check(statistics["writes"] > 0, "the guest wrote nothing")
    longest = statistics["max_us"] / 1e6
    check(longest <= world.case.bound, f"a guest's request took {longest:.2f} s")
    world.longest = longest


def release(world):
    """A prepare that gives up because of the load beside it may be asked for again."""
    for attempt in range(5):
        result = world.disk.run("switch", "--release")
        if result.returncode == 0:
            return
        ferry.check_error(result, "")
        world.wait_for(lambda s: s["in_sync"], "in sync once more", 30)
    raise AssertionError(f"switch: {result.stderr}")


OUTCOMES = {"recovers": recovers, "refused": refused, "fails": fails, "persists": persists,
            "unswitchable": unswitchable, "pivoted": pivoted}


def run_case(case, number):
    """Returns (how it went, None or why it failed)."""
    begun = time.monotonic()
    with ferry.Scratch() as scratch:
        world = World(scratch, case, number)
        try:
            OUTCOMES[case.outcome](world)
            if case.outcome in ("recovers", "pivoted") and case.says:
                check(world.watch.has_said(case.says),
                      f"nothing said {case.says!r}: {world.watch.texts}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n  phases: {world.watch.phases}\n  said: "
                                 f"{sorted(world.watch.texts)}") from None
        finally:
            world.watch.over = True
            for undo in reversed(world.at_end):
                undo()
    took = time.monotonic() - begun
    return (f"{case.outcome}, longest request {world.longest * 1000:.0f} ms, {took:.1f} s" +
            "".join(f"\n    {reason}" for reason in world.reasons))


def main(group, *names):
    inside = sandbox.enter()
    chosen = [case for case in cases.MATRIX[group] if not names or case.name in names]
    check(chosen, "no such case")
    rootless = [case for case in chosen if inside or not case.needs_root]
    skipped = [case.name for case in chosen if case not in rootless]
    failed = []
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        runs = {pool.submit(run_case, case, number): case
                for number, case in enumerate(rootless, start=1)}
        for run in concurrent.futures.as_completed(runs):
            name = runs[run].name
            try:
                print(f"{name}: {run.result()}", flush=True)
            except Exception as error:  # whatever it is: the other cases go on
                failed.append(name)
                if not isinstance(error, AssertionError):
                    traceback.print_exception(error)
                print(f"{name}: FAILED: {error}", flush=True)
    check(not failed, f"failed: {', '.join(failed)}")
    if skipped:
        sandbox.skip(f"namespaces and mounts need root: {', '.join(skipped)}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        for group_name, group_cases in cases.MATRIX.items():
            for listed in group_cases:
                print(f"{group_name:10} {listed.name:36} {listed.outcome}")
    else:
        main(*sys.argv[1:])
