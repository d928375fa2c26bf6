#!/usr/bin/env python3
"""ctest vm.restart: a real guest, and the processes that serve its disks are killed (kill -9) or ended
(SIGTERM, as an upgrade does) and started again while their disks migrate. QEMU is run by
attach-vm.sh, and waits as that tells it to. The guest sees nothing of it but time; the migration goes on
by itself, with the delta; what arrives is all that the guest wrote.

Skipped (exit code 77) where QEMU or the kernel's package can't be had.
"""
import contextlib
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

import guest
from hosts import ATTACH, NAME, ferry

MIB = ferry.MIB
FLUSHED = 6.5  # seconds: the target is flushed every 5 s while it is copied to
LONGEST_STOP = 20  # seconds: QEMU tries again 1, 3, 7 and 15 s after the loss; the machine may be busy
SIZES = (64, 64)  # MiB
BANDWIDTH = ("2M", "3M")  # so that the copy outlasts three restarts


class Disk:
    """One of the guest's, the process that serves it, and where it migrates to."""

    def __init__(self, scratch, state, number, image, kind):
        self.scratch, self.number, self.image, self.kind = scratch, number, image, kind
        self.size = os.path.getsize(image)
        self.options = ("--state", state, "--export", f"disk{number}")
        self.lives = 0
        self.serve()
        self.uri = ferry.unix_uri(self.ferry.socket, f"disk{number}")
        self.there = scratch.file(f"there{number}.img")
        if kind == "incoming":
            self.target = ferry.Ferry(scratch, self.there, "--incoming", "--create", str(self.size),
                                      "--state", state, name=f"target{number}")
            self.target_uri = self.target.uri
        else:
            scratch.garbage(f"there{number}.img", self.size)
            self.target_uri = ferry.qemu_nbd(scratch, self.there, name=f"target{number}")
            self.target = scratch.processes[-1]

    def __str__(self):
        return f"disk{self.number} to {self.kind}"

    def serve(self):
        self.lives += 1
        self.ferry = ferry.Ferry(self.scratch, self.image, *self.options,
                                 name=f"disk{self.number}.{self.lives}")

    def status(self):
        return self.ferry.status()

    def wait(self, condition, what):
        """Until condition(status); returns that status."""
        found = []

        def holds():
            found[:] = [self.status()]
            return condition(found[0])
        try:
            ferry.wait_until(holds, f"{self}: {what}", 40)
        except AssertionError as error:
            raise AssertionError(f"{error}: {found}") from error
        return found[0]

    def end(self):
        """The processes on both sides, by SIGTERM."""
        self.ferry.stop()
        if self.kind == "incoming":
            self.target.stop()
        else:
            self.scratch.stop(self.target)


class World:
    """A guest on two disks that migrate to servers of these kinds."""

    def __init__(self, scratch, state, pause_us, kinds):
        self.scratch = scratch
        boot = guest.build(os.environ["GUEST_CACHE"], os.environ["GUEST_WRITER"])
        images = guest.make_disks(scratch.path, *SIZES)
        self.disks = [Disk(scratch, state, number, image, kind)
                      for number, (image, kind) in enumerate(zip((images.a, images.b), kinds))]
        self.console = guest.Console(seed=images.seed)
        command = [ATTACH, "--name", NAME, "--dir", scratch.file("vm")]
        for disk in self.disks:
            command += ["--disk", disk.uri]
        listening = self.console.listen(scratch.file("console"))
        self.attached = scratch.start("attach", [
            *command, "--", *guest.qemu_arguments(boot, listening, pause_us=pause_us)])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """attach-vm.sh ends with its QEMU, which may have lost its disks and wait for them."""
        if self.attached.poll() is None:
            pid = self.attached.pid
            children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
            for child in map(int, children.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            self.attached.wait(timeout=20)
        self.console.close()

    def boot(self):
        self.console.wait_up()
        self.goes_on()

    def goes_on(self):
        self.console.wait_progress(records=20, seconds=LONGEST_STOP)

    def each(self, do):
        return [do(disk) for disk in self.disks]

    def migrate(self):
        for disk, bandwidth in zip(self.disks, BANDWIDTH):
            disk.ferry.ok("migrate", "--bandwidth", bandwidth, "--quarantine", "3s", disk.target_uri)

    def stood_still(self, since):
        """Seconds for which nothing was synced to disk A, nothing written to disk B, to 0.1 s."""
        def longest(number_of):
            last, at, most = number_of(self.console.statuses[0]), since, 0.0
            for status in [s for s in self.console.statuses if s.host >= since]:
                most = max(most, status.host - at)
                if number_of(status) != last:
                    last, at = number_of(status), status.host
            return most
        return longest(lambda s: s.a.synced), longest(lambda s: s.b.acknowledged)

    def restart(self, what, how=signal.SIGKILL, down=0.0):
        """Both disks' processes end and are started again, `down` seconds later; the guest goes on."""
        begin = time.monotonic()
        self.each(lambda disk: disk.ferry.process.send_signal(how))
        for disk in self.disks:
            code = disk.ferry.process.wait(timeout=20)
            wanted = -how if how == signal.SIGKILL else 0
            ferry.check(code == wanted, f"{disk} ended with {code}: {self.log(disk)}")
        time.sleep(down)
        self.each(Disk.serve)
        served = time.monotonic() - begin
        self.goes_on()
        # The same of what is behind disk A's page cache.
        synced = self.console.last.a.synced
        self.console.wait(lambda: self.console.last.a.synced > synced, "disk A's sync", LONGEST_STOP)
        still = self.stood_still(begin)
        longest = max(self.console.latency(what, begin)[3] for what in ("write_b", "sync_a", "sync_b"))
        print(f"{what}, {how.name}: served again after {served:.2f} s; the guest's I/O stood still for "
              f"{still[0]:.1f} and {still[1]:.1f} s, its longest request took {longest / 1e6:.2f} s",
              flush=True)
        ferry.check(max(still) < LONGEST_STOP, "that is too long")

    def log(self, disk):
        return self.scratch.log(f"disk{disk.number}.{disk.lives}")

    def resumed(self, least=1):
        """It goes on by itself: at least so many bytes are there already."""
        for disk in self.disks:
            status = disk.wait(lambda s: s["resumed_bytes"] > 0 or not s["resumed"],
                               "the target to be reached")
            ferry.check(status["resumed"] and status["resumed_bytes"] >= least,
                        f"{disk}: not gone on with: {status} {self.log(disk)}")
            print(f"  {disk}: {status['resumed_bytes'] / MIB:.1f} of {disk.size / MIB:.0f} MiB are there, "
                  f"{status['suspects'] / MIB:.1f} in quarantine", flush=True)

    def restart_and_resume(self, what, *how, least=1, **more):
        for disk in self.disks:
            in_sync = disk.status()["in_sync"]
            ferry.check(in_sync == (what == "in sync"), f"{disk}: in sync: {in_sync}, not {what}")
        self.restart(what, *how, **more)
        self.resumed(least)

    def get_in_sync(self):
        for disk in self.disks:
            have = disk.status()["resumed_bytes"]
            disk.ferry.ok("set", "--bandwidth", "0")
            status = disk.wait(lambda s: s["in_sync"], "to be in sync")
            ferry.check(status["copied_bytes"] <= disk.size - have // 2,
                        f"{disk}: {status['copied_bytes']} copied although {have} were there")

    def verify(self):
        for disk in self.disks:
            disk.ferry.ok("verify")
            ferry.check(disk.status()["mismatched_bytes"] == 0, f"{disk}: {disk.status()}")

    def stop(self):
        """The guest reads all of it back and ends."""
        records = self.console.stop()
        code = self.attached.wait(timeout=20)
        ferry.check(code == 0, f"attach-vm.sh: {code}: {self.scratch.log('attach')}")
        print(f"the guest ended after records {records}", flush=True)

    def check_there(self):
        guest.check_disks(*(disk.there for disk in self.disks), self.console)


def migrates(world):
    """Killed twice in the middle of the copy, and once upgraded."""
    begin = time.monotonic()
    world.migrate()
    world.goes_on()
    time.sleep(max(0.0, begin + FLUSHED - time.monotonic()))
    world.restart_and_resume("copying")
    world.restart_and_resume("copying again", down=1.2)
    world.restart_and_resume("upgrade", signal.SIGTERM)


def released(world):
    """In sync it is killed once more; then verified, and released when the guest has ended."""
    migrates(world)
    world.get_in_sync()
    time.sleep(FLUSHED)
    world.restart_and_resume("in sync", least=SIZES[0] * MIB // 2)
    world.get_in_sync()
    world.verify()
    world.goes_on()
    world.stop()
    for disk in world.disks:
        disk.ferry.ok("switch", "--release")
        if disk.kind == "incoming":
            disk.target.ok("promote")
        disk.end()
        ferry.same(disk.image, disk.there, "both sides")
    world.check_there()


def pivoted(world):
    """The guest goes on from the target; the restarted process serves it from there, too."""
    world.migrate()
    world.get_in_sync()
    world.goes_on()
    world.each(lambda disk: disk.ferry.ok("switch", "--pivot"))
    world.goes_on()
    before = world.each(lambda disk: os.stat(disk.image).st_mtime_ns)
    for how in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        world.restart("pivoted", how)
        for disk in world.disks:
            status = disk.status()
            ferry.check((status["role"], status["serving"]) == ("pivoted", "target"),
                        f"{disk}: not pivoted: {status}")
    world.stop()
    world.each(Disk.end)
    ferry.check(before == world.each(lambda disk: os.stat(disk.image).st_mtime_ns),
                "the old disk was written to")
    world.check_there()


# The guest's pause between two records, and its disks' targets. A copy that is slow needs a guest that is.
SCENES = ((released, 5000, "incoming", "incoming"), (released, 5000, "qemu-nbd", "qemu-nbd"),
          (pivoted, 500, "incoming", "qemu-nbd"))


def main():
    for number, (scene, pause_us, *kinds) in enumerate(SCENES):
        if sys.argv[1:] and str(number) not in sys.argv[1:]:
            continue
        print("---", number, scene.__name__, *kinds, flush=True)
        begin = time.monotonic()
        state = tempfile.mkdtemp(prefix="nbdferry-state-", dir="/dev/shm")
        try:
            with ferry.Scratch() as scratch, World(scratch, state, pause_us, kinds) as world:
                world.boot()
                scene(world)
            left = os.listdir(state)
            ferry.check(not left or scene is pivoted, f"left: {left}")
        except guest.Unavailable as why:
            guest.skip(why)
        finally:
            shutil.rmtree(state)
        print(f"{time.monotonic() - begin:.0f} s", flush=True)


main()
