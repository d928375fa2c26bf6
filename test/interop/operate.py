#!/usr/bin/env python3
"""What an operator does, under a guest's load. usage: operate.py
steps|verify|checksums|incoming|stop|curl"""
import json
import os
import signal
import sys
import time

import ferry
from ferry import MIB, check, run


def steps(scratch):
    """Pause, resume, cancel, again; prepare, abort; prepare, seal, commit."""
    image = scratch.disk("source.img")
    target = scratch.garbage("target.img")
    disk = ferry.Ferry(scratch, image)
    load = ferry.Load(scratch, disk.uri, image, "--rate", "1000", "--compare")
    slow = ferry.nbdkit(scratch, "--filter=rate", "memory", str(64 * MIB), "rate=40M", name="slow")
    uri = ferry.qemu_nbd(scratch, target)

    # What a cancelled migration had sent and not seen answered is in quarantine for the next one.
    disk.ok("migrate", "--quarantine", "1s", slow)
    disk.ok("pause")
    check(disk.status()["phase"] == "paused", "paused")
    disk.fails("switch", "--pivot", because="paused")
    disk.ok("resume")
    check(disk.status()["mode_wanted"] == "auto", "the default")
    disk.ok("set", "--mode", "sync", "--bandwidth", "30M", "--buffer", "16M")
    check(disk.status()["mode_wanted"] == "sync", "the mode that was set")
    load.running()
    disk.ok("cancel")
    ferry.wait_until(lambda: disk.status()["phase"] == "cancelled", "cancelled")

    disk.ok("migrate", "--wait", "--downtime-limit", "5s", "--quarantine", "1s", uri)
    disk.ok("switch", "--prepare")
    check(disk.status()["phase"] == "prepared", "prepared")
    disk.ok("switch", "--prepare")
    disk.ok("switch", "--abort")
    ferry.wait_until(lambda: disk.status()["phase"] in ("copying", "in_sync"), "aborted")
    load.running()
    disk.ok("switch", "--prepare")
    disk.ok("switch", "--seal")
    time.sleep(0.2)  # requests pile up
    status = disk.status()
    check(status["phase"] == "sealed" and status["holding"], f"sealed: {status}")
    check(status["held_requests"] > 0, "the guest's writes are held")
    ferry.same(image, target, "both sides while sealed")
    disk.ok("switch", "--commit", "pivot")
    disk.ok("switch", "--commit", "pivot")
    time.sleep(0.3)
    load.end()
    disk.stop()
    ferry.same(load.shadow, target, "the target against what the guest wrote")


def verify(scratch):
    """A difference that somebody else made on the target is found, and healed."""
    image = scratch.disk("source.img")
    target = scratch.garbage("target.img")
    disk = ferry.Ferry(scratch, image)
    load = ferry.Load(scratch, disk.uri, image, "--rate", "500", "--until-shutdown")
    disk.ok("migrate", "--wait", ferry.nbdkit(scratch, "file", target))
    disk.ok("verify")
    check(disk.status()["mismatched_bytes"] == 0, "both sides are equal")
    # Random bytes where the guest hardly writes the very same ones.
    with open(target, "r+b") as f:
        for offset in (5 * MIB, 33 * MIB + 4096):
            f.seek(offset)
            f.write(os.urandom(100 * 1024))
    disk.run("verify")
    check(disk.status()["mismatched_bytes"] > 0, "the difference was found")
    disk.ok("verify")
    refused = disk.run("switch", "--release")
    check(refused.returncode == 1 and "acknowledge" in refused.stderr, "somebody has to see it")
    disk.ok("verify", "--acknowledge")
    disk.ok("switch", "--release")
    ferry.wait_until(lambda: load.process.poll() is not None, "the guest learns of the release")
    load.end()
    disk.stop()
    ferry.same(image, target, "healed")


def checksums(scratch):
    """A nbdferry target is asked for checksums: hardly anything travels, and a difference is found."""
    image = scratch.disk("source.img")
    target = scratch.file("target.img")
    there = ferry.Ferry(scratch, target, "--incoming", "--create", "64M", name="there")
    wire = ferry.Counted(scratch, there.socket)
    disk = ferry.Ferry(scratch, image)
    disk.ok("migrate", "--wait", wire.uri)

    def moved(verify, code):
        before = wire.bytes
        result = disk.run(*verify)
        check(result.returncode == code, f"verify: {result.returncode}: {result.stderr}")
        return wire.bytes - before

    whole = moved(["verify"], 0)
    check(disk.status()["verified_bytes"] == 64 * MIB, f"all of it: {disk.status()}")
    check(whole < 64 * MIB / 100, f"{whole} bytes moved, of 64 MiB")
    damage = os.urandom(100 * 1024)
    with open(target, "r+b") as f:
        f.seek(33 * MIB + 4096)
        f.write(damage)
    part = moved(["verify"], 1)
    check(part < 64 * MIB / 20, f"{part} bytes moved to find 100 KiB")
    check(disk.status()["mismatched_bytes"] == len(damage), f"all of it is found: {disk.status()}")
    ferry.wait_until(lambda: disk.status()["in_sync"], "healed")
    load = ferry.Load(scratch, disk.uri, image, "--rate", "500", "--until-shutdown")
    disk.ok("verify")
    disk.ok("verify", "--acknowledge")
    disk.ok("switch", "--release")
    ferry.wait_until(lambda: load.process.poll() is not None, "the guest learns of the release")
    load.end()
    there.ok("promote")
    disk.stop()
    there.stop()
    ferry.same(image, target, "healed")
    ferry.same(load.shadow, target, "the target against what the guest wrote")


def writable(uri):
    return run(["qemu-io", "-f", "raw", "-c", "write -P 0x77 0 4k", uri]).returncode == 0


def incoming(scratch):
    """From nbdferry to nbdferry, and who owns the disk at each step, also across restarts."""
    image = scratch.disk("source.img")
    target = scratch.file("target.img")
    there = ferry.Ferry(scratch, target, "--incoming", "--create", "64M", name="there")
    check(there.status()["role"] == "incoming", "incoming")
    check(not writable(there.uri), "an incoming disk takes a stranger's writes")
    here = ferry.Ferry(scratch, image, name="here")
    load = ferry.Load(scratch, here.uri, image, "--rate", "1000", "--until-shutdown")
    here.ok("migrate", "--wait", there.uri)
    check(not writable(there.uri), "a stranger's writes during the migration")
    here.ok("switch", "--release")
    ferry.wait_until(lambda: load.process.poll() is not None, "the guest learns of the release")
    load.end()
    check(not writable(there.uri), "a stranger's writes before promote")
    check(not writable(here.uri), "the source is fenced")

    def says_where_to_go(disk):
        verdict = disk.status()["verdict"]
        check(there.uri in verdict and "promote" in verdict, f"the verdict: {verdict}")

    says_where_to_go(here)
    here.fails("migrate", there.uri, because="cannot migrate")
    there.ok("promote")
    there.ok("promote")
    check(there.status()["role"] == "owner", "promoted")

    here.stop()
    here = ferry.Ferry(scratch, image, name="here-again")
    check(here.status()["role"] == "retired", "retired across a restart")
    says_where_to_go(here)
    check(not writable(here.uri), "a retired disk takes writes")
    check(run(["nbdcopy", here.uri, "null:"]).returncode != 0, "a retired disk answers reads")
    here.stop()
    there.stop()
    ferry.same(image, target, "source against target")
    ferry.same(load.shadow, target, "the target against what the guest wrote")
    there = ferry.Ferry(scratch, target, name="there-again")
    check(there.status()["role"] == "owner", "owner across a restart")
    check(writable(there.uri), "the owner takes writes")
    there.stop()
    here = ferry.Ferry(scratch, image, name="here-third")
    here.ok("unfence")
    check(here.status()["role"] == "owner" and writable(here.uri), "unfenced")
    here.stop()


def stop(scratch):
    """SIGTERM and SIGINT, with a guest at work and a migration under way: exit 0, nothing lost."""
    image = scratch.disk("source.img")
    for number, how in enumerate((signal.SIGTERM, signal.SIGINT)):
        disk = ferry.Ferry(scratch, image, name=f"ferry{number}")
        load = ferry.Load(scratch, disk.uri, image, "--rate", "2000", name=f"load{number}")
        slow = ferry.nbdkit(scratch, "--filter=rate", "memory", str(64 * MIB), "rate=40M",
                            name=f"slow{number}")
        disk.ok("migrate", slow)
        time.sleep(0.5)
        code = scratch.stop(disk.process, how)
        check(code == 0, f"exit code {code}")
        check(not os.path.exists(disk.socket), "the socket is gone")
        load.process.wait(timeout=10)
        # What the guest had answered is on the disk; what it had not may be, too.
        check(differing_sectors(load.shadow, image) <= 16 * 128 + 16, "acknowledged writes are lost")


def differing_sectors(a, b):
    with open(a, "rb") as f, open(b, "rb") as g:
        x, y = f.read(), g.read()
    return sum(x[i:i + 512] != y[i:i + 512] for i in range(0, len(x), 512))


def curl(scratch):
    image = scratch.disk("source.img")
    disk = ferry.Ferry(scratch, image)

    def ask(path, *more):
        text = ferry.run_ok(["curl", "-sS", "-m", "20", "--unix-socket", disk.control, *more,
                             "http://x" + path])
        return json.loads(text)

    check(ask("/status")["phase"] == "idle", "status")
    uri = ferry.nbdkit(scratch, "memory", str(64 * MIB))
    check("error" not in ask("/migrate", "-d", json.dumps({"uris": [uri], "mode": "sync"})), "migrate")
    ferry.wait_until(lambda: ask("/status")["in_sync"], "in sync")
    check("error" in ask("/switch", "-d", '{"action":"commit-pivot"}'), "not sealed")
    check("error" not in ask("/switch", "-d", '{"action":"pivot"}'), "pivot")
    check(ask("/status")["serving"] == "target", "pivoted")
    disk.stop()


def main(what):
    with ferry.Scratch() as scratch:
        {"steps": steps, "verify": verify, "checksums": checksums, "incoming": incoming,
         "stop": stop, "curl": curl}[what](scratch)


main(*sys.argv[1:])
