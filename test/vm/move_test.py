"""A real guest moves: there and back; a move that fails before the commit; a script that is killed at
each of its steps and run again. The guest writes all the while, and what it wrote is checked."""
import os
import signal
import sys
import time

import guest
from hosts import ferry, migrate, migrate_command, migrate_ok, two_hosts, wait_for

SIZES = ("256M", "128M")
DIE = os.path.join(os.path.dirname(__file__), "die.py")
# In the order of a move; each is one life of the script. The guest goes there and back.
DEATHS = (("before", "bring_disks_in_sync"), ("after", "bring_disks_in_sync"),
          ("after", "start_memory"), ("after", "send_memory"), ("after", "hand_over_state"),
          ("before", "finish"), ("after", "disk.step"), ("after", "commit_one"), ("after", "commit"),
          ("before", "summary"))


class World:
    """A guest on the first of two hosts."""

    def __init__(self, scratch, hosts):
        self.scratch = scratch
        self.here, self.there = hosts
        self.boot = guest.build(os.environ["GUEST_CACHE"], os.environ["GUEST_WRITER"])
        disks = guest.make_disks(scratch.file(""))
        os.rename(disks.a, self.here.disk(0))
        os.rename(disks.b, self.here.disk(1))
        self.console = guest.Console(seed=disks.seed)
        self.lives = 0
        self.here.attach(["", ""], self.qemu())
        self.console.wait_up()
        self.console.wait_progress(records=20)

    def qemu(self, device=True):
        self.lives += 1
        path = self.scratch.file(f"console{self.lives}")
        more = ["-device", "virtio-rng-pci"] if device else []
        return [*guest.qemu_arguments(self.boot, self.console.listen(path)), *more]

    def wait_there(self, **qemu):
        """The other host waits for the guest."""
        self.there.attach([f",size={size}" for size in SIZES], self.qemu(**qemu), incoming=True)

    def arrived(self):
        """It has moved: what was there is here now."""
        self.here.wait_end()
        self.here, self.there = self.there, self.here
        self.console.wait_progress(records=20)

    def goes_on(self):
        self.console.wait_progress(records=20)

    def end(self):
        self.console.stop()
        self.here.wait_end()
        self.there.stop()
        guest.check_disks(self.here.disk(0), self.here.disk(1), self.console)


def there_and_back(world):
    """Both sides are the same between the commit and the guest's first step there."""
    for _ in range(2):
        world.wait_there()
        compare = " && ".join(f"cmp {world.here.disk(n)} {world.there.disk(n)}" for n in (0, 1))
        mark = world.scratch.file("same")
        result = migrate_ok(world.here, world.there, "--before-cont", f"{compare} && touch {mark}")
        print(result.stdout, flush=True)
        ferry.check(os.path.exists(mark), "both sides differ at the commit: " + result.stderr)
        os.unlink(mark)
        world.arrived()


def does_not_load(world):
    """The destination's QEMU lacks a device: it finds out only when all has been sent."""
    world.wait_there(device=False)
    result = migrate(world.here, world.there)
    ferry.check(result.returncode == 1, f"it moved: {result.stdout}")
    print(result.stderr, flush=True)
    world.goes_on()
    ferry.check(world.here.status(0)["role"] == "owner", "the disk has been given away")
    world.there.stop()


def server_is_killed(world):
    """The destination's nbdferry goes while the memory moves."""
    world.wait_there()
    process = world.scratch.start("migrate", migrate_command(
        world.here, world.there, "--memory-bandwidth", "4"))
    wait_for(lambda: "memory:" in world.scratch.log("migrate"), "the memory moves", process)
    os.kill(world.there.server_pid(0), signal.SIGKILL)
    ferry.check(process.wait(120) == 1, "it moved: " + world.scratch.log("migrate"))
    print(world.scratch.log("migrate"), flush=True)
    world.goes_on()
    ferry.check(world.here.status(0)["role"] == "owner", "the disk has been given away")
    migrate(world.here, world.there, "--abort")
    world.there.stop()
    world.goes_on()


def script_is_killed(world):
    for when, step in DEATHS:
        begin = time.monotonic()
        world.wait_there()
        command = migrate_command(world.here, world.there)
        at = next(i for i, word in enumerate(command) if word.endswith("migrate-vm.sh"))
        dead = ferry.run([*command[:at], sys.executable, DIE, when, step, *command[at + 1:]], 120)
        ferry.check(dead.returncode == -signal.SIGKILL,
                    f"{when} {step}: not killed: {dead.returncode}: {dead.stderr}{dead.stdout}")
        migrate_ok(world.here, world.there)
        world.arrived()
        print(f"killed {when} {step}, run again: moved ({time.monotonic() - begin:.1f} s)",
              flush=True)


def main():
    if os.geteuid() != 0:
        guest.skip("network namespaces need root")
    scenes = {f.__name__: f for f in (there_and_back, does_not_load, server_is_killed,
                                      script_is_killed)}
    wanted = sys.argv[1:] or list(scenes)
    try:
        with two_hosts() as (scratch, hosts):
            world = World(scratch, hosts)
            for name in wanted:
                print("---", name, flush=True)
                scenes[name](world)
            world.end()
    except guest.Unavailable as why:
        guest.skip(str(why))


main()
