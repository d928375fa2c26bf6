"""A real guest moves: there and back; a move that fails before the commit; a script that is killed at
each of its steps and run again. The guest writes all the while, and what it wrote is checked."""
import os
import signal
import sys
import time

from hosts import ferry, migrate, migrate_command, migrate_ok, wait_for
from world import play

DIE = os.path.join(os.path.dirname(__file__), "die.py")
# In the order of a move; each is one life of the script. The guest goes there and back.
DEATHS = (("before", "bring_disks_in_sync"), ("after", "bring_disks_in_sync"),
          ("after", "start_memory"), ("after", "send_memory"), ("after", "hand_over_state"),
          ("before", "finish"), ("after", "disk.step"), ("after", "commit_one"),
          ("before", "disk.promote"), ("after", "disk.promote"), ("after", "hand_over_disks"),
          ("before", "qmp.cont"), ("after", "qmp.cont"), ("before", "summary"))


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
    """The destination's nbdferry goes while the memory moves, which goes on to its end."""
    world.wait_there()
    process = world.scratch.start("migrate", migrate_command(
        world.here, world.there, "--memory-bandwidth", "16"))
    wait_for(lambda: "memory:" in world.scratch.log("migrate"), "the memory moves", process)
    os.kill(world.there.server_pid(0), signal.SIGKILL)
    ferry.check(process.wait(120) == 1, "it moved: " + world.scratch.log("migrate"))
    print(world.scratch.log("migrate"), flush=True)
    world.goes_on()
    ferry.check(world.here.status(0)["role"] == "owner", "the disk has been given away")
    migrate(world.here, world.there, "--abort")
    world.there.stop()
    world.goes_on()


def script_is_interrupted(world):
    """By Ctrl-C, in the middle of the memory: the guest stays."""
    world.wait_there()
    process = world.scratch.start("interrupted", migrate_command(
        world.here, world.there, "--memory-bandwidth", "4"))
    wait_for(lambda: "memory:" in world.scratch.log("interrupted"), "the memory moves", process)
    process.send_signal(signal.SIGINT)
    ferry.check(process.wait(60) == 130, world.scratch.log("interrupted"))
    world.goes_on()
    # The QEMU that had begun to load is gone; attach-vm.sh there has started another by itself.
    world.there.wait_described()
    migrate_ok(world.here, world.there)
    world.arrived()


def script_is_killed(world):
    for when, step in DEATHS:
        begin = time.monotonic()
        world.wait_there()
        command = migrate_command(world.here, world.there)
        at = next(i for i, word in enumerate(command) if word.endswith("migrate-vm.sh"))
        dead = ferry.run([*command[:at], sys.executable, DIE, when, step, *command[at + 1:]], 180)
        ferry.check(dead.returncode == -signal.SIGKILL,
                    f"{when} {step}: not killed: {dead.returncode}: {dead.stderr}{dead.stdout}")
        migrate_ok(world.here, world.there)
        world.arrived()
        print(f"killed {when} {step}, run again: moved ({time.monotonic() - begin:.1f} s)",
              flush=True)


# Where the scene before left writes unanswered, a move waits for the quarantine of a minute.
play(there_and_back, does_not_load, script_is_interrupted, server_is_killed, script_is_killed)
