"""What a restart goes on from: `resume.py CASE`, with real processes that are killed."""
import contextlib
import os
import pathlib
import sys
import time

import ferry
from ferry import MIB, check

SIZE = 96 * MIB
SLOW = ("--bandwidth", "24M", "--quarantine", "3s")


class Rig:
    """A disk of random data, a target, a guest; and a server that can be started again."""

    def __init__(self, scratch, state):
        self.scratch, self.state = scratch, state
        self.image = scratch.file("source.img")
        with open(self.image, "wb") as f:
            f.write(os.urandom(SIZE))
        self.target = scratch.garbage("target.img", SIZE)
        self.lives = 0
        self.disk = None

    def serve(self, *options):
        self.lives += 1
        self.disk = ferry.Ferry(self.scratch, self.image, "--state", self.state, *options,
                                name=f"ferry{self.lives}")
        return self.disk

    def log(self):
        return self.scratch.log(f"ferry{self.lives}")

    def migrate_half(self, uri, *options):
        """Starts it under load, and returns when most is there, and has been flushed once (5 s)."""
        load = self.load()
        self.migrate_to(3 / 4, uri, "--bandwidth", "12M", "--quarantine", "3s", *options)
        load.running()
        return load

    def migrate_to(self, part, uri, *options):
        """Starts it, and returns when this part of the disk is there."""
        self.disk.ok("migrate", *options, uri)
        ferry.wait_until(lambda: self.disk.status()["copied_bytes"] > SIZE * part,
                         f"{part} of it to be copied")

    def load(self):
        return ferry.Load(self.scratch, self.disk.uri, self.image, "--rate", "40", "--bytes", "4096",
                          name=f"load{self.lives}")

    def kill(self, load=None):
        self.disk.process.kill()
        self.disk.process.wait()
        if load is not None:
            load.process.wait(timeout=20)  # its connection is gone

    def finish(self, verify=True):
        """In sync, verified, released: and both sides are alike."""
        self.disk.ok("set", "--bandwidth", "0")
        ferry.wait_until(lambda: self.disk.status()["in_sync"], "to be in sync", 60)
        if verify:
            self.disk.ok("verify")
        self.disk.ok("switch", "--release")
        self.disk.stop()
        ferry.same(self.image, self.target, "both sides")


def remove(uri):
    """The socket that a server has left behind."""
    path = uri.split("socket=")[1]
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return path


def resumed(rig):
    status = rig.disk.status()
    check(status["resumed"], f"it goes on by itself: {rig.log()}")
    return status


def killed(rig):
    """kill -9 in the middle: what has been flushed on the target is not copied again."""
    uri = ferry.qemu_nbd(rig.scratch, rig.target)
    rig.serve()
    load = rig.migrate_half(uri)
    rig.kill(load)
    rig.serve()
    load = rig.load()
    ferry.wait_until(lambda: resumed(rig)["resumed_bytes"] > 0, "the target to be reached")
    have = rig.disk.status()["resumed_bytes"]
    check(have > SIZE // 8, f"only {have} bytes were there already")
    rig.disk.ok("set", "--bandwidth", "0")
    ferry.wait_until(lambda: rig.disk.status()["in_sync"], "to be in sync", 60)
    copied = rig.disk.status()["copied_bytes"]
    check(copied < SIZE - have // 2, f"{copied} bytes copied although {have} were there")
    rig.disk.fails("switch", "--release", because=["can't prove", "verify"])
    load.end()
    rig.finish()


def incoming(rig):
    """A nbdferry target says that it is the same, and that old connections are dead: no quarantine,
    no verification. It is killed, too."""
    os.unlink(rig.target)
    options = ("--incoming", "--create", str(SIZE), "--state", rig.state)
    there = ferry.Ferry(rig.scratch, rig.target, *options, name="there")
    rig.serve()
    load = rig.load()
    rig.migrate_to(3 / 4, there.uri, "--bandwidth", "12M", "--quarantine", "600s")
    rig.kill(load)
    rig.serve()
    ferry.wait_until(lambda: resumed(rig)["resumed_bytes"] > 0, "the target to be reached")
    check(rig.disk.status()["suspects"] == 0, f"fenced: {rig.disk.status()}")
    for _ in range(2):  # the target's process is killed, and ours does not lose sight of it
        there.process.kill()
        there.process.wait()
        there = ferry.Ferry(rig.scratch, rig.target, *options, name="there")
        ferry.wait_until(lambda: rig.disk.status()["phase"] in ("copying", "in_sync"), "its return")
        check(rig.disk.status()["suspects"] == 0, f"fenced: {rig.disk.status()}")
    # Both at once: the target's record says what it holds.
    rig.kill()
    there.process.kill()
    there.process.wait()
    there = ferry.Ferry(rig.scratch, rig.target, *options, name="there")
    rig.serve()
    ferry.wait_until(lambda: resumed(rig)["phase"] in ("copying", "in_sync"), "both")
    rig.finish(verify=False)
    there.ok("promote")
    there.stop()


def forgetful(rig):
    """Both are killed, and what the target had not flushed is gone: that is sent again, not all of it."""
    plugin = ("--filter=cache", "file", rig.target)
    uri = ferry.nbdkit(rig.scratch, *plugin)
    server = rig.scratch.processes[-1]
    rig.serve()
    load = ferry.Load(rig.scratch, rig.disk.uri, rig.image, "--rate", "1000", "--bytes", "4096")
    rig.disk.ok("migrate", "--trust-target", "--quarantine", "1s", uri)
    ferry.wait_until(lambda: rig.disk.status()["stale_bytes"] == 0, "all to be copied")
    time.sleep(0.8)  # some of it is flushed, some not
    rig.kill(load)
    server.kill()
    server.wait()
    check(not ferry.same_bytes(rig.image, rig.target), "something is lost, or this proves nothing")
    remove(uri)
    ferry.nbdkit(rig.scratch, *plugin)
    rig.serve()
    ferry.wait_until(lambda: resumed(rig)["resumed_bytes"] > 0, "the target to be reached")
    rig.finish(verify=False)


def differing(rig):
    """A verification found a difference, and we were killed: the switchover waits for the operator."""
    os.unlink(rig.target)
    there = ferry.Ferry(rig.scratch, rig.target, "--incoming", "--create", str(SIZE), "--state",
                        rig.state, name="there")
    rig.serve()
    rig.disk.ok("migrate", "--wait", there.uri)
    with open(rig.target, "r+b") as f:
        f.seek(5 * MIB)
        f.write(bytes(4096))
    check(rig.disk.run("verify").returncode == 1, "the difference is found")

    def restart():
        rig.kill()
        rig.serve()
        ferry.wait_until(lambda: resumed(rig)["in_sync"], "to be in sync")

    restart()
    rig.disk.fails("switch", "--release", because="acknowledge")
    rig.disk.ok("verify", "--acknowledge")
    restart()
    rig.finish(verify=False)
    there.ok("promote")
    there.stop()


def stopped(rig):
    """SIGTERM, and the next one goes on: an upgrade. Nothing is in quarantine, little is left."""
    uri = ferry.nbdkit(rig.scratch, "file", rig.target)
    server = rig.scratch.processes[-1]
    rig.serve()
    rig.migrate_to(1 / 2, uri, *SLOW)
    rig.disk.stop()
    # The target is there a little later than we are.
    rig.scratch.stop(server)
    remove(uri)
    rig.serve()
    check(rig.disk.status()["phase"] == "connecting", f"it waits: {rig.disk.status()}")
    time.sleep(0.5)
    ferry.nbdkit(rig.scratch, "file", rig.target)
    ferry.wait_until(lambda: resumed(rig)["resumed_bytes"] > 0, "the target to be reached")
    status = rig.disk.status()
    check(status["suspects"] == 0, f"nothing was left unanswered: {status}")
    check(status["resumed_bytes"] > SIZE * 3 // 8, f"most is there: {status['resumed_bytes']}")
    rig.finish()


def options(rig):
    """What was asked for, and changed since, holds after a restart."""
    uri = ferry.nbdkit(rig.scratch, "file", rig.target)
    rig.serve()
    rig.disk.ok("migrate", *SLOW, "--mode", "async", "--trust-target", uri)
    rig.disk.ok("set", "--mode", "sync", "--bandwidth", "32M")
    ferry.wait_until(lambda: rig.disk.status()["copied_bytes"] > SIZE // 4, "a quarter of it")
    rig.kill()
    rig.serve()
    status = resumed(rig)
    check(status["mode_wanted"] == "sync", f"the mode: {status['mode_wanted']}")
    rig.finish(verify=False)  # the target is trusted


def paused(rig):
    """What the operator has paused stays so, until he says otherwise."""
    uri = ferry.qemu_nbd(rig.scratch, rig.target)
    rig.serve()
    rig.migrate_to(1 / 2, uri, "--bandwidth", "32M", "--quarantine", "500ms")
    rig.disk.ok("pause")
    rig.kill()
    rig.serve()
    ferry.wait_until(lambda: resumed(rig)["phase"] == "paused", "to be paused")
    rig.disk.ok("resume")
    ferry.wait_until(lambda: rig.disk.status()["phase"] == "copying", "to go on")
    rig.kill()
    rig.serve()
    ferry.wait_until(lambda: resumed(rig)["phase"] != "connecting", "the target to be reached")
    check(rig.disk.status()["phase"] == "copying", "it was resumed before the restart")
    rig.finish()


def touched(rig):
    """Somebody wrote to the disk meanwhile: nothing is believed, everything is copied."""
    uri = ferry.nbdkit(rig.scratch, "file", rig.target)
    rig.serve()
    rig.migrate_to(1 / 2, uri, *SLOW)
    rig.kill()
    time.sleep(1.2)
    with open(rig.image, "r+b") as f:
        f.seek(5 * MIB)
        f.write(os.urandom(MIB))
    rig.serve()
    check("written" in rig.log() and "starting over" in rig.log(), f"it says why: {rig.log()}")
    check(not rig.disk.status()["resumed"], "nothing is believed")
    rig.finish(verify=False)


def replaced(rig):
    """The target is another one: a sample shows it, and everything is copied."""
    uri = ferry.nbdkit(rig.scratch, "file", rig.target)
    server = rig.scratch.processes[-1]
    rig.serve()
    rig.migrate_to(1 / 2, uri, *SLOW)
    rig.disk.stop()
    rig.scratch.stop(server)
    remove(uri)
    rig.target = rig.scratch.garbage("another.img", SIZE)
    check(ferry.nbdkit(rig.scratch, "file", rig.target) == uri, "at the same place")
    rig.serve()
    ferry.wait_until(lambda: "does not hold what it held" in rig.log(), "the sample")
    check(rig.disk.status()["resumed_bytes"] == 0, "nothing is believed")
    rig.finish(verify=False)


def failed(rig):
    """A migration that failed, and is started again to the same target, goes on, too."""
    uri = ferry.qemu_nbd(rig.scratch, rig.target)
    server = rig.scratch.processes[-1]
    rig.serve()
    load = rig.migrate_half(uri, "--trust-target")
    # It comes back as an export that can't be used.
    rig.scratch.stop(server)
    path = remove(uri)
    wrong = rig.scratch.start("wrong", ["nbdkit", "-f", "-r", "-U", path, "memory", str(SIZE)])
    ferry.wait_until(lambda: rig.disk.status()["phase"] == "failed", "the failure", 40)
    rig.scratch.stop(wrong)
    remove(uri)
    ferry.qemu_nbd(rig.scratch, rig.target)
    rig.disk.ok("migrate", *SLOW, "--trust-target", uri)
    status = resumed(rig)
    check(status["resumed_bytes"] > 0, f"some of it is there already: {status}")
    load.end()
    rig.finish(verify=False)


def pivoted(rig):
    """After a pivot a killed server serves from the target again, never from its own disk."""
    uri = ferry.qemu_nbd(rig.scratch, rig.target)
    rig.serve()
    rig.disk.ok("migrate", "--quarantine", "2s", "--switch", "pivot", "--wait", uri)
    load = rig.load()
    time.sleep(0.5)
    rig.kill(load)
    before = pathlib.Path(rig.image).stat().st_mtime_ns
    rig.serve()
    status = rig.disk.status()
    check(status["role"] == "pivoted" and status["serving"] == "target", f"pivoted: {status}")
    ferry.run_ok(["qemu-io", "-f", "raw", "-c", "write -P 0x5a 1M 64k", "-c", "flush",
                  "-c", "read -P 0x5a 1M 64k", rig.disk.uri])
    rig.disk.ok("switch", "--pivot")  # done already
    rig.disk.stop()
    check(pathlib.Path(rig.image).stat().st_mtime_ns == before, "its own disk is left alone")
    with open(rig.target, "rb") as f:
        f.seek(MIB)
        check(f.read(65536) == b"\x5a" * 65536, "the write is on the target")


def leaving(rig):
    """A pivoted disk's target says that it shuts down: the guest waits for the next one."""
    plugin = ("file", rig.target)
    uri = ferry.nbdkit(rig.scratch, *plugin)
    server = rig.scratch.processes[-1]
    rig.serve()
    rig.disk.ok("migrate", "--connections", "1", "--quarantine", "1s", "--switch", "pivot", "--wait", uri)
    load = ferry.Load(rig.scratch, rig.disk.uri, rig.image, "--rate", "2000", "--bytes", "4096")
    for _ in range(3):
        time.sleep(0.5)
        rig.scratch.stop(server)
        remove(uri)
        ferry.nbdkit(rig.scratch, *plugin)
        server = rig.scratch.processes[-1]
    time.sleep(1.5)
    load.running()
    load.end()
    rig.disk.stop()


def nowhere(rig):
    """Without a place for the state it says so, and migrates."""
    uri = ferry.nbdkit(rig.scratch, "file", rig.target)
    rig.state = "/proc/nbdferry"
    rig.serve()
    rig.disk.ok("migrate", *SLOW, uri)
    check("has to begin anew" in rig.log(), f"it says so: {rig.log()}")
    rig.finish(verify=False)


def main(case):
    with ferry.Scratch() as scratch, ferry.state_directory() as state:
        {f.__name__: f for f in (killed, incoming, forgetful, differing, stopped, options, paused, touched, replaced, failed,
                                 pivoted, leaving, nowhere)}[case](Rig(scratch, state))
        check(not os.listdir(state) or case in ("pivoted", "leaving"), f"left: {os.listdir(state)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
