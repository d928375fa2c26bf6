"""1 GiB over one link of 1 Gb/s (tbf, between two network namespaces) under 2,000 random 4 KiB writes
a second, open loop: a write's latency counts from the time at which it was due. Beside nbdferry:
QEMU's mirror (qemu-storage-daemon) in both copy modes, to the same nbdkit, with a time limit, since
`background` never gets level under this load.

Committed means: the target serves. The load goes on through it, and then the target must equal what
the guest knows that it wrote. The wire time is that of the payload alone at the full 1 Gb/s, which
no TCP reaches (headers take 5%).
"""
import os
import time

import ferry
from measure import GIB, Nbdkit, Result, Serve, fresh_target, say, write_disk
from peers import LINK_BYTES_PER_SECOND, TARGET_HOST, Guest, Qemu, guest_text, link

SIZE = GIB
RATE = 2000
LIMIT_SECONDS = 40
QEMU_LIMIT_SECONDS = 25


def one_run(contender, source, prefixes, limit):
    """What the guest saw before and during, the time to the commit, the bytes mirrored."""
    with ferry.Scratch() as scratch:
        image = fresh_target(scratch.file("target.img"), SIZE)
        disk = scratch.file("disk.img")
        ferry.run_ok(["cp", source, disk])
        target = Nbdkit(scratch, "file", image, prefix=prefixes[1], host=TARGET_HOST)
        server = Serve(scratch, disk, prefixes[0]) if contender == "nbdferry" else \
            Qemu(scratch, disk, prefixes[0], contender)
        guest = Guest(scratch, server.uri, source, rate=RATE, depth=64)
        time.sleep(1)
        guest.phase()
        time.sleep(3)
        out = {"before": guest.phase()}
        out["seconds"] = server.migrate_and_pivot(target.uri, limit)
        out["during"] = guest.phase()
        if contender == "nbdferry":
            ferry.check(out["seconds"], f"not committed within {limit} s: {server.status()}")
            out["mirrored"] = server.status()["mirrored_bytes"]
        time.sleep(1)
        out["after"] = guest.end()
        server.stop()
        target.stop()
        if out["seconds"]:
            ferry.same(guest.shadow, image, "the target against what the guest wrote")
        return out


def report(label, out):
    done = f"committed in {out['seconds']:.2f} s" if out["seconds"] else "not committed in time"
    say(f"link {label}: {done}; guest " + guest_text(out, ("before", "during", "after")))


def qemu_results(mode, rows):
    done = [row["seconds"] for row in rows if row["seconds"]]
    note = "" if done else f"never level within the limit of {QEMU_LIMIT_SECONDS} s"
    yield Result("link", f"QEMU {mode}: guest's rate kept", [
        row["during"]["iops"] / row["before"]["iops"] for row in rows], note=note)
    yield Result("link", f"QEMU {mode}: guest's p99", [
        row["during"]["p99_us"] / 1000 for row in rows], "ms")
    if done:
        yield Result("link", f"QEMU {mode}: time to commit", done, "s")


def bench(runs):
    if os.geteuid() != 0:
        say("link: left out: network namespaces need root")
        return
    rows = {"nbdferry": [], "background": [], "write-blocking": []}
    with ferry.Scratch() as scratch, link() as prefixes:
        source = write_disk(scratch.file("source.img"), SIZE)
        for run in range(runs):
            for contender, seen in rows.items():
                limit = LIMIT_SECONDS if contender == "nbdferry" else QEMU_LIMIT_SECONDS
                seen.append(one_run(contender, source, prefixes, limit))
                report(f"{run + 1}/{runs} {contender}", seen[-1])
    mine = rows["nbdferry"]
    yield Result("link", "time to commit to the bytes' time on the wire", [
        row["seconds"] / ((SIZE + row["mirrored"]) / LINK_BYTES_PER_SECOND) for row in mine],
        at_most=1.3)
    yield Result("link", "time to commit", [row["seconds"] for row in mine], "s")
    yield Result("link", "guest's rate kept", [
        row["during"]["iops"] / row["before"]["iops"] for row in mine], at_least=0.99)
    for phase in ("before", "during"):
        yield Result("link", f"guest's p99 {phase}", [row[phase]["p99_us"] / 1000 for row in mine],
                     "ms")
        yield Result("link", f"guest's worst 100 ms {phase}", [
            row[phase]["worst_100ms"] / (RATE / 10) for row in mine], "of its rate")
        yield Result("link", f"guest's longest write {phase}", [
            row[phase]["max_us"] / 1000 for row in mine], "ms")
    for mode in ("background", "write-blocking"):
        yield from qemu_results(mode, rows[mode])
