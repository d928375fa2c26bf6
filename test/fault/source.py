#!/usr/bin/env python3
"""The local disk fails. usage: source.py [CASE]...      needs root: mounts, a loop device, FUSE

The guest gets the error, that one and no other, and only for what failed; what it had acknowledged
stays; the migration goes on, copies what a failed write has left, does not switch while something
can't be read, and in the end both sides are equal and what the guest knows.
"""
import contextlib
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "interop"))
sys.dont_write_bytecode = True
import ferry  # noqa: E402
import guest  # noqa: E402
import sandbox  # noqa: E402
from ferry import MIB, check, wait_until  # noqa: E402

SIZE = 16 * MIB
GUEST_RATE = 400  # requests a second
BOUND = 1.5  # seconds, the guest's longest request
OPTIONS = ("--quarantine", "1s", "--downtime-limit", "1s")


def unmount(path):
    """Also when a case has failed, and the disk is in use."""
    ferry.run_ok(["umount", "--lazy", path])


class Fuse:
    """A file whose reads and writes fail when they are told to: nbdkit, as a file by nbdfuse."""

    def __init__(self, scratch):
        self.scratch, self.backing = scratch, scratch.disk("backing.img", SIZE)
        self.path = scratch.file("disk.img")
        pathlib.Path(self.path).touch()
        words = [f"error-{what}{more}" for what in ("pread", "pwrite", "zero")
                 for more in ("=EIO", "-rate=100%", f"-file={scratch.file('fail-' + what)}")]
        uri = ferry.nbdkit(scratch, "--filter=error", "file", self.backing, *words, name="backing")
        self.process = scratch.start("nbdfuse", ["nbdfuse", self.path, uri])
        wait_until(lambda: os.path.ismount(self.path), "nbdfuse")

    def fail(self, *what):
        for name in what:
            pathlib.Path(self.scratch.file("fail-" + name)).touch()

    def heal(self, *what):
        for name in what:
            os.unlink(self.scratch.file("fail-" + name))


@contextlib.contextmanager
def fuse(scratch):
    disk = Fuse(scratch)
    try:
        yield disk
    finally:
        unmount(disk.path)
        disk.process.wait(timeout=10)


@contextlib.contextmanager
def small_file(scratch):
    """A sparse file where there is room for less than half of it."""
    folder = scratch.file("small")
    os.mkdir(folder)
    ferry.run_ok(["mount", "-t", "tmpfs", "-o", f"size={SIZE * 3 // 8}", "fault", folder])
    path = folder + "/disk.img"
    pathlib.Path(path).touch()
    os.truncate(path, SIZE)
    try:
        yield path
    finally:
        unmount(folder)


@contextlib.contextmanager
def loop_device(scratch):
    """On that file. It goes by itself with its last user."""
    with small_file(scratch) as file:
        device = ferry.run_ok(["losetup", "--find", "--show", file]).strip()
        held = os.open(device, os.O_RDONLY)
        # Records of devices are kept here; in this mount namespace only.
        ferry.run_ok(["mount", "-t", "tmpfs", "fault", "/var/lib"])
        try:
            ferry.run_ok(["losetup", "--detach", device])
            yield device
        finally:
            os.close(held)


class World:
    def __init__(self, scratch, path, backing=None, loses=False):
        self.scratch, self.backing = scratch, backing or path
        self.target = scratch.garbage("target.img", SIZE)
        self.uri = ferry.nbdkit(scratch, "file", self.target)
        self.disk = ferry.Ferry(scratch, path, sockets=scratch.file("ferry"))
        shadow = pathlib.Path(self.backing).read_bytes() if backing else bytes(SIZE)
        self.guest = guest.Guest(self.disk.socket, shadow, GUEST_RATE, loses)

    def migrate(self, *more):
        self.disk.ok("migrate", *OPTIONS, *more, self.uri)

    def wait_for(self, condition, what, seconds=20):
        wait_until(lambda: condition(self.disk.status()), what, seconds)

    def in_sync(self):
        self.wait_for(lambda s: s["in_sync"] and s["stale_bytes"] + s["copying_bytes"] == 0,
                      "in sync")

    def release(self):
        result = None
        for _ in range(5):
            self.in_sync()
            result = self.disk.run("switch", "--release")
            if result.returncode == 0:
                break
        check(result.returncode == 0, f"switch: {result.stderr}")
        wait_until(lambda: self.guest.released, "the guest learns of the release")

    def finish(self, *errors):
        """Ends all; the guest has seen these errors and no others."""
        self.guest.end()
        seen = {error for error, _times in self.guest.errors.items()}
        check(seen == set(errors), f"errors: {self.guest.errors}, expected: {errors}")
        check(self.guest.longest <= BOUND, f"a request took {self.guest.longest:.2f} s")
        check(self.guest.writes > 50, f"the guest wrote {self.guest.writes} times")
        status = self.disk.status()
        check(not status["holding"] and status["held_requests"] == 0, f"held: {status}")
        source = pathlib.Path(self.backing).read_bytes()
        target = pathlib.Path(self.target).read_bytes()
        if not self.guest.loses:
            ferry.same(self.backing, self.target, "source against target")
        for at in range(0, SIZE, guest.BLOCK):
            block = slice(at, at + guest.BLOCK)
            if at // guest.BLOCK not in self.guest.unknown:
                check(source[block] == target[block] == self.guest.shadow[block],
                      f"source, target and what the guest knows differ at byte {at}")
        self.disk.stop()


def until_full(world, error):
    wait_until(lambda: world.guest.errors.get(error, 0) > 3, "the disk is full")


# --- cases ----------------------------------------------------------------------------------------

def full_file(scratch, *mode):
    """A sparse file on a full file system: ENOSPC, before the migration, in it, and in sync."""
    with small_file(scratch) as path:
        world = World(scratch, path)
        until_full(world, ("write", "ENOSPC"))
        world.migrate(*mode)
        world.in_sync()
        time.sleep(0.5)
        # There may be no room for the record that the switchover writes: it says so, and nothing is lost.
        result = world.disk.run("switch", "--release")
        if result.returncode != 0:
            ferry.check_error(result, ["given up", "No space left", "8 KiB free"])
            folder = os.path.dirname(path)
            ferry.run_ok(["mount", "-o", f"remount,size={SIZE * 3 // 8 + MIB}", folder])
            world.release()
        world.finish(("write", "ENOSPC"))


def full_file_sync(scratch):
    """The same in sync mode: the target's part of a write that failed here is undone there."""
    full_file(scratch, "--mode", "sync")


def full_device(scratch):
    """A block device whose writes fail after they have been acknowledged: the flush does. What the device
    holds then is anybody's guess (Linux 6.18's loop driver even acknowledges writes of which it has
    lost the end), so only what was never written is compared."""
    with loop_device(scratch) as device:
        world = World(scratch, device, loses=True)
        until_full(world, ("flush", "EIO"))
        world.migrate("--mode", "sync")
        world.in_sync()
        time.sleep(0.5)
        world.release()
        world.finish(("flush", "EIO"))


def writes_fail(scratch):
    """EIO for a while, during the copy, and again when in sync; between that all is as before."""
    with fuse(scratch) as disk:
        world = World(scratch, disk.path, disk.backing)
        world.migrate("--bandwidth", "8M")
        for moment in (lambda: world.wait_for(lambda s: s["copied_bytes"] > 0, "copying"),
                       world.in_sync):
            moment()
            disk.fail("pwrite", "zero")
            time.sleep(0.7)
            check(world.guest.errors.get(("write", "EIO"), 0) > 0, "the fault never came")
            disk.heal("pwrite", "zero")
            before = dict(world.guest.errors)
            time.sleep(0.3)
            # One may have been under way.
            check(sum(world.guest.errors.values()) <= sum(before.values()) + 1,
                  f"errors after the disk was well again: {before}, {world.guest.errors}")
        world.release()
        world.finish(*(set(world.guest.errors) & {("write", "EIO"), ("zero", "EIO")}))


def writes_fail_in_sync_mode(scratch):
    """The target has what the source refused: it is copied back."""
    with fuse(scratch) as disk:
        world = World(scratch, disk.path, disk.backing)
        world.migrate("--mode", "sync")
        world.in_sync()
        disk.fail("pwrite")
        time.sleep(0.7)
        disk.heal("pwrite")
        world.release()
        world.finish(("write", "EIO"))


def reads_fail(scratch):
    """What can't be read is said, not switched over, and copied once it can be."""
    with fuse(scratch) as disk:
        world = World(scratch, disk.path, disk.backing)
        disk.fail("pread")
        world.migrate()
        world.wait_for(lambda s: s["unreadable_bytes"] > 0, "unreadable bytes are told")
        status = world.disk.status()
        check(not status["in_sync"] and status["phase"] == "copying", f"unreadable: {status}")
        world.disk.fails("switch", "--release", because="cannot switch")
        wait_until(lambda: world.guest.errors.get(("read", "EIO"), 0) > 0, "the guest sees it")
        disk.heal("pread")
        world.release()
        check(world.disk.status()["unreadable_bytes"] == 0, "still unreadable")
        world.finish(("read", "EIO"))


CASES = {case.__name__: case for case in (full_file, full_file_sync, full_device, writes_fail,
                                          writes_fail_in_sync_mode, reads_fail)}
NEEDS = {"full_device": "/dev/loop-control", "writes_fail": "/dev/fuse",
         "writes_fail_in_sync_mode": "/dev/fuse", "reads_fail": "/dev/fuse"}


def main(*names):
    if not sandbox.enter():
        sandbox.skip("mounts and loop devices need root")
    failed, skipped = [], []
    for name in names or CASES:
        if not os.path.exists(NEEDS.get(name, "/")):
            skipped.append(f"{name} needs {NEEDS[name]}")
            continue
        begun = time.monotonic()
        try:
            with ferry.Scratch() as scratch:
                CASES[name](scratch)
            print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)
        except Exception as error:  # whatever it is: the other cases go on
            failed.append(name)
            print(f"{name}: FAILED: {error!r}", flush=True)
    check(not failed, f"failed: {', '.join(failed)}")
    if skipped:
        sandbox.skip(", ".join(skipped))


main(*sys.argv[1:])
