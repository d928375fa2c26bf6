"""Whose disk it is after reboots, with other --state directories, and for copies: cases of switchover.py.

A reboot is another boot id in the state file, or no state file at all; the record lies beside the disk.
"""
import contextlib
import json
import os
import pathlib
import shutil
import time

import ferry
import switchover
from ferry import MIB, check, wait_until

SLOT = 4096


def crc32c(data):
    crc = 0xffffffff
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82f63b78 if crc & 1 else 0)
    return crc ^ 0xffffffff


def reboot(world):
    """The state file is from an earlier boot, were it to survive."""
    files = list(pathlib.Path(world.state).glob("*.state"))
    check(files, "there is a state file")
    for file in files:
        with open(file, "r+b") as f:
            for at in (0, SLOT):
                f.seek(at)
                line, rest = f.read(SLOT).split(b"\n", 1)
                header = json.loads(rest) | {"boot": "00000000-0000-0000-0000-000000000000"}
                body = json.dumps(header).encode().ljust(len(rest))
                check(len(body) == len(rest), "the header fits")
                f.seek(at)
                f.write(line[:-8] + f"{crc32c(body):08x}\n".encode() + body)


def elsewhere(world):
    return ("--state", str(world.folder / "another-state"))


def role(host):
    return host.ferry.status()["role"]


def refuses(host, what):
    check(host.write() == (False, False), f"{what}: a retired disk answers")
    check(role(host) == "retired", f"{what}: {role(host)}")


def copying(world, *options):
    """A migration in the middle, and killed."""
    world.start()
    world.source.ferry.ok("migrate", *switchover.OPTIONS, "--bandwidth", "4M", *options,
                          f"nbd://127.0.0.1:{world.relay.port}/")
    wait_until(lambda: world.source.ferry.status()["copied_bytes"] > 2 * MIB, "a quarter of it")


def killed(world):
    world.source.kill()
    world.end()


def finish(world):
    """In the end a release takes everything there."""
    world.source.ferry.ok("set", "--bandwidth", "0")
    world.repeat(world.source, "switch", "--release")
    world.end()
    world.target.ferry.ok("promote")
    refuses(world.source, "in the end")
    world.same(world.target)


def switched(world, kind):
    world.start()
    world.migrate()
    wait_until(world.written, "the guests write")
    world.repeat(world.source, "switch", f"--{kind}")


# --- reboots --------------------------------------------------------------------------------------

def released_stays_released(world):
    switched(world, "release")
    world.end()
    world.source.kill()
    for what, options in (("the same state", ()), ("another state directory", elsewhere(world))):
        world.source.start(*options)
        refuses(world.source, what)
        world.source.ferry.ok("switch", "--release")
        world.source.ferry.fails("switch", "--abort", because="no migration is running")
        world.source.ferry.fails("migrate", world.target.ferry.uri, because="cannot migrate")
        world.source.kill()
    world.target.kill()
    world.target.start("--incoming", *elsewhere(world))
    check(role(world.target) == "incoming" and not world.target.write()[0],
          "a reboot does not promote")
    world.target.ferry.ok("promote")
    world.target.kill()
    world.target.start(*elsewhere(world))
    check(role(world.target) == "owner", "a reboot does not undo a promote")
    world.same(world.target)
    world.same(world.source)


def promoted_is_not_laid_open(world):
    """Its old command line, --incoming, is refused; also beside a copy of the disk."""
    world.target.start()
    world.target.ferry.ok("promote")
    world.target.kill()
    copy = switchover.Host(world, "copy", "--incoming")
    for end in ("", ".owner"):
        shutil.copyfile(world.target.disk + end, copy.disk + end)
    for host in (world.target, copy):
        try:
            host.start()
        except AssertionError:
            check("records that this disk counts" in host.log(), host.log())
        else:
            raise AssertionError("a promoted disk may be overwritten")


def pivoted_stays_pivoted(world):
    """Served from the target, never from its own disk, by whatever state."""
    switched(world, "pivot")
    world.end()
    own = pathlib.Path(world.source.disk).read_bytes()
    for lives, options in enumerate(((), elsewhere(world), ())):
        world.source.kill()
        if lives == 1:
            reboot(world)
        world.source.start(*options)
        check(role(world.source) == "pivoted", f"pivoted: {world.source.ferry.status()}")
        ferry.run_ok(["qemu-io", "-f", "raw", "-c", f"write -P {lives + 1} 0 4k", "-c", "flush",
                      world.source.ferry.uri])
        world.source.ferry.ok("switch", "--pivot")
        with open(world.target.disk, "rb") as f:
            check(f.read(4096) == bytes([lives + 1]) * 4096, "the target has it")
    world.begin()
    time.sleep(0.3)
    world.end()
    ferry.run_ok(["qemu-io", "-f", "raw", "-c", "flush", world.source.ferry.uri])
    world.same(world.target)
    check(pathlib.Path(world.source.disk).read_bytes() == own, "its own disk is left alone")
    world.source.ferry.fails("unfence", because="pivoted")


def pivoted_is_not_incoming(world):
    """It came by --incoming, was promoted and then pivoted; with its old command line it must not
    forget the target, and show its guest what was left behind. Nor is it served read-only."""
    world.start("later")
    world.migrate()
    world.repeat(world.source, "switch", "--pivot")
    world.source.kill()
    world.end()
    for option in ("--incoming", "--read-only"):
        try:
            world.source.start(option, *world.source.options)
        except AssertionError:
            check("was pivoted" in world.source.log(), world.source.log())
        else:
            raise AssertionError(f"a pivoted disk is served with {option}")
    world.source.start()
    check(role(world.source) == "pivoted", "pivoted")
    world.begin()
    time.sleep(0.2)


def pivoted_without_its_target(world):
    """It waits, then fails requests; it never falls back to its own disk."""
    switched(world, "pivot")
    world.end()
    world.source.ferry.stop()
    world.target.kill()
    world.source.start()
    check(ferry.run(["timeout", "1", "qemu-io", "-f", "raw", "-c", "read 0 4k",
                     world.source.ferry.uri]).returncode != 0, "a read from nowhere")
    world.target.start()
    world.begin()
    time.sleep(0.5)
    world.end()
    check(role(world.source) == "pivoted", "pivoted")


def unfinished_never_fences(world, after):
    """A migration that was not committed leaves an owner, whose map a reboot makes worthless."""
    copying(world)
    killed(world)
    options = after(world)
    world.source.start(*options)
    check(role(world.source) == "owner" and world.source.write()[0], "it is still the owner")
    check(not world.target.write()[0], "the target is still incoming")
    check(not world.source.ferry.status()["resumed"], f"the map is believed: {world.source.log()}")
    world.begin()
    time.sleep(0.2)
    if options:
        # And the first state, later: it doesn't know what was written since.
        killed(world)
        time.sleep(1.1)
        world.source.start()
        check("starting over" in world.source.log(), f"it says so: {world.source.log()}")
        check(not world.source.ferry.status()["resumed"], "the map is believed")
        world.begin()
    finish(world)


def an_old_migration_stays_dead(world):
    """Its state, found after a release and an unfence, doesn't begin it again."""
    copying(world, "--switch", "release")
    killed(world)
    world.source.start(*elsewhere(world))
    world.source.ferry.ok("migrate", *switchover.OPTIONS, "--switch", "release", "--wait",
                          f"nbd://127.0.0.1:{world.relay.port}/")
    world.source.ferry.stop()
    world.source.start(*elsewhere(world))
    world.source.ferry.ok("unfence")
    world.source.kill()
    world.source.start()
    time.sleep(0.5)
    status = world.source.ferry.status()
    check(status["phase"] == "idle" and status["role"] == "owner", f"it goes on: {status}")


def aborted_stays_aborted(world):
    """--switch release, aborted by the operator, killed: it goes on, but does not switch by itself."""
    copying(world, "--switch", "release")
    world.source.ferry.ok("switch", "--abort")
    killed(world)
    world.source.start()
    world.begin()
    world.source.ferry.ok("set", "--bandwidth", "0")
    wait_until(lambda: world.source.ferry.status()["in_sync"], "in sync")
    world.source.ferry.ok("verify")  # what a switchover would wait for
    time.sleep(1.5)
    check(role(world.source) == "owner", "it switched over although that was aborted")
    finish(world)


# --- copies ---------------------------------------------------------------------------------------

def copies_of_a_released_disk(world):
    """With their record they are as fenced as the first; it says that it was written for another."""
    switched(world, "release")
    world.end()
    world.source.ferry.stop()
    copy = switchover.Host(world, "copy")
    shutil.copyfile(world.source.disk, copy.disk)
    shutil.copyfile(world.source.disk + ".owner", copy.disk + ".owner")
    copy.start("--state", world.state)
    refuses(copy, "a copy")
    check("copied?" in copy.log(), f"it says so: {copy.log()}")
    copy.ferry.stop()

    moved = switchover.Host(world, "moved")
    for end in ("", ".owner"):
        os.rename(world.source.disk + end, moved.disk + end)
    moved.start("--state", world.state)
    refuses(moved, "moved with its record")
    moved.ferry.stop()
    link = switchover.Host(world, "link")
    os.symlink(moved.disk, link.disk)
    link.start("--state", world.state)
    refuses(link, "by a symbolic link")
    link.ferry.stop()
    # Another file in its place: fenced until somebody says otherwise.
    os.unlink(moved.disk)
    pathlib.Path(moved.disk).write_bytes(bytes(switchover.SIZE // 2))
    moved.start("--state", world.state)
    refuses(moved, "another file in its place")
    check("copied?" in moved.log(), f"it says so: {moved.log()}")
    moved.ferry.ok("unfence")
    check(moved.write() == (True, True), "unfenced")
    moved.kill()
    moved.start("--state", world.state)
    check(role(moved) == "owner" and "copied?" not in moved.log(), "and stays so")


def a_copy_of_a_pivoted_disk(world):
    """Never serves what lies in the file."""
    switched(world, "pivot")
    world.end()
    world.source.ferry.stop()
    copy = switchover.Host(world, "copy")
    shutil.copyfile(world.source.disk, copy.disk)
    shutil.copyfile(world.source.disk + ".owner", copy.disk + ".owner")
    ferry.run_ok(["qemu-io", "-f", "raw", "-c", "write -P 0x11 0 4k", copy.disk])
    copy.start("--state", world.state)
    check(role(copy) == "pivoted" and "copied?" in copy.log(), f"it says so: {copy.log()}")
    read = ferry.run(["qemu-io", "-f", "raw", "-c", "read -P 0x11 0 4k", copy.ferry.uri])
    check("verification failed" in read.stdout + read.stderr, f"it served its file: {read}")


def a_copy_does_not_resume(world):
    """A disk that was copied in the middle of a migration has no map, and no migration."""
    copying(world)
    killed(world)
    copy = switchover.Host(world, "copy")
    shutil.copyfile(world.source.disk, copy.disk)
    copy.start("--state", world.state)
    check(copy.ferry.status()["phase"] == "idle", "the copy goes on with the migration")
    copy.ferry.stop()
    # The copy in the first one's place is another file, too.
    os.replace(copy.disk, world.source.disk)
    world.source.start()
    check(not world.source.ferry.status()["resumed"], "another file's map is believed")
    check(role(world.source) == "owner", "owner")


# --- --incoming -----------------------------------------------------------------------------------

def start_stopped(host, point, *options):
    """Starts it with a stop in its first record; kills it there."""
    host.arm(point)
    process = host.launch(*options)
    wait_until(lambda: host.state_of(process) == "T", f"the point {point}")
    process.kill()
    process.wait()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(host.stop_file)


def incoming_killed_at_its_start(world, point):
    """The record of --incoming, first and over a retired one: old or new, and asked for again it is new."""
    later = point in switchover.LATER
    if later:
        switched(world, "release")
        world.end()
        world.source.ferry.stop()
    host = world.source if later else world.target
    start_stopped(host, point, "--incoming", *host.options)
    if later:
        host.start()
        expected = "incoming" if point == "overwritten" else "retired"
        check(role(host) == expected, f"{expected}: {role(host)}")
        check(not host.write()[0], "it takes a stranger's writes")
        host.kill()
    host.start("--incoming", *host.options)
    check(role(host) == "incoming" and not host.write()[0], "incoming")
    host.kill()
    host.start("--state", world.state)  # without the option: still not anybody's
    check(role(host) == "incoming" and not host.write()[0], "incoming without the option")


def another_source_does_not_take_over(world):
    """Committed, not promoted, rebooted: what the target holds is the only copy that counts."""
    switched(world, "release")
    world.end()
    world.target.kill()
    world.target.start()
    stranger = switchover.Host(world, "stranger", "--state", world.state)
    pathlib.Path(stranger.disk).write_bytes(b"\x33" * switchover.SIZE)
    stranger.start()
    result = stranger.ferry.run("migrate", *switchover.OPTIONS, world.target.ferry.uri)
    time.sleep(0.5)
    world.same(world.target)
    check("refused a migration" in world.target.log(), f"it says so: {world.target.log()}")
    wait_until(lambda: stranger.ferry.status()["phase"] == "failed", "the other migration fails")
    check("not permitted" in stranger.ferry.status()["last_error"] and
          role(stranger) == "owner", f"it says so: {result} {stranger.ferry.status()}")
    # The first source's goes on being let in, by a new migration of it, too.
    world.source.ferry.ok("unfence")
    world.begin()
    world.source.ferry.ok("migrate", *switchover.OPTIONS, "--switch", "release", "--wait",
                          f"nbd://127.0.0.1:{world.relay.port}/")
    world.end()
    world.same(world.target)


def fenced_again_and_again(world):
    """Released, unfenced, released elsewhere: each is durable, the generation grows."""
    world.start()
    for one in world.guests:
        one.end()
    generations = []
    for _ in range(2):
        world.source.ferry.ok("migrate", *switchover.OPTIONS, "--switch", "release", "--wait",
                              f"nbd://127.0.0.1:{world.relay.port}/")
        world.source.kill()
        world.source.start()
        refuses(world.source, "released")
        world.source.ferry.ok("unfence")
        world.source.ferry.ok("unfence")
        world.source.kill()
        world.source.start()
        check(role(world.source) == "owner" and world.source.write() == (True, True), "unfenced")
        record = pathlib.Path(world.source.disk + ".owner").read_bytes()[:SLOT]
        generations.append(json.loads(record.split(b"\n", 1)[1])["generation"])
    check(generations == [2, 4], f"generations: {generations}")


# --- a target that is not what it was -------------------------------------------------------------

def replaced_target(world):
    """While the source lives, the target comes back with another disk: what was copied is not there."""
    world.start()
    world.migrate()
    world.repeat(world.source, "switch", "--prepare")  # flushes the target: all of it is clean now
    world.source.ferry.ok("switch", "--abort")
    world.target.kill()
    for end in ("", ".owner"):
        os.unlink(world.target.disk + end)
    world.target.start()
    world.repeat(world.source, "switch", "--release")
    world.end()
    world.same(world.target)


def promoted_too_early(world):
    """Before the source's record: the source goes on writing to what another guest may write to now."""
    world.start()
    world.migrate()
    world.repeat(world.source, "switch", "--prepare")
    world.target.ferry.ok("promote")
    time.sleep(1)
    before = world.source.ferry.status()["mirrored_bytes"]
    time.sleep(0.5)
    world.end()
    status = world.source.ferry.status()
    check(status["mirrored_bytes"] == before, f"it still writes to the owner's disk: {status}")


def promoted_while_down(world):
    """The migration of a source that is started again does not go on over another guest's writes."""
    world.start()
    world.migrate()
    world.end()
    world.source.kill()
    world.target.ferry.ok("promote")
    world.source.start()
    wait_until(lambda: "promoted meanwhile" in (world.source.ferry.status()["last_error"] or ""),
               "the source to see it")
    check(world.source.ferry.status()["phase"] == "failed", "it has ended")
    world.begin()
    wait_until(world.written, "the guests write")
    world.end()
    check(world.source.ferry.status()["mirrored_bytes"] == 0, "it writes to the owner's disk")


def promoted_while_pivoted(world):
    """Another guest may write there: the pivoted source does not go back, nor does its next life."""
    world.start()
    world.migrate()
    world.repeat(world.source, "switch", "--pivot")
    wait_until(world.written, "the guests write")
    world.end()
    world.target.ferry.ok("promote")
    for life in range(2):
        wait_until(lambda: "promoted meanwhile" in (world.source.ferry.status()["last_error"] or ""),
                   "the source to see it")
        check(ferry.run(["timeout", "1", "qemu-io", "-f", "raw", "-c", "write 0 4k",
                         world.source.ferry.uri]).returncode != 0, "a write to another guest's disk")
        world.source.kill()
        if life == 0:
            world.source.start()
    world.same(world.target)


CASES = {
    "released stays released": released_stays_released,
    "promoted is not laid open": promoted_is_not_laid_open,
    "pivoted stays pivoted": pivoted_stays_pivoted,
    "pivoted is not incoming": pivoted_is_not_incoming,
    "pivoted without its target": pivoted_without_its_target,
    "unfinished, and a reboot": lambda w: unfinished_never_fences(w, lambda w: reboot(w) or ()),
    "unfinished, and another state": lambda w: unfinished_never_fences(w, elsewhere),
    "an old migration stays dead": an_old_migration_stays_dead,
    "aborted stays aborted": aborted_stays_aborted,
    "copies of a released disk": copies_of_a_released_disk,
    "a copy of a pivoted disk": a_copy_of_a_pivoted_disk,
    "a copy does not resume": a_copy_does_not_resume,
    "another source does not take over": another_source_does_not_take_over,
    "fenced again and again": fenced_again_and_again,
    "replaced target": replaced_target,
    "promoted too early": promoted_too_early,
    "promoted while down": promoted_while_down,
    "promoted while pivoted": promoted_while_pivoted,
} | {f"incoming killed at its start ({point})":
     lambda w, p=point: incoming_killed_at_its_start(w, p)
     for point in (*switchover.FIRST, *switchover.LATER)}
