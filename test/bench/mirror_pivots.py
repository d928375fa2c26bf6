"""How long the guest's writes stand still while the target takes over, by pivot; many times, each
with a new disk of 64 MiB over loopback.

The blackout is the longest time between two answers in a row around the switch: from the last write
that the source answered to the first one that the target did. Writes are due at a fixed rate, so
that this is too long by one interval between them at most (0.5 ms under load, 1 ms idle), and never
too short. Idle means that nobody writes but this probe, and not before it is in sync.
"""
import math
import time

import ferry
from measure import MIB, Nbdkit, Result, Serve, say, write_disk
from peers import Guest, Qemu

SIZE = 64 * MIB
PIVOTS = 300
QEMU_PIVOTS = 20
BATCH = 25  # with one directory and one nbdkit
LIMIT_SECONDS = 30
LOADS = {"idle": 1000, "under load": 2000}  # writes a second


class Pivots:
    def __init__(self):
        self.blackouts_ms = {("nbdferry", load): [] for load in LOADS}
        for mode in ("background", "write-blocking"):
            self.blackouts_ms[mode, "under load"] = []

    def run(self, runs):
        """The share of one run."""
        for (contender, load), seen in self.blackouts_ms.items():
            wanted = PIVOTS / len(LOADS) if contender == "nbdferry" else QEMU_PIVOTS
            left = math.ceil(wanted / runs)
            share = []
            while left > 0:
                share += batch(contender, load, min(left, BATCH))
                left -= BATCH
            seen += share
            say(f"mirror pivots {contender} {load}: {len(share)}, blackout p50 "
                f"{percentile(share, 0.5):.2f} ms, p99 {percentile(share, 0.99):.2f} ms, "
                f"longest {max(share):.2f} ms")

    def results(self):
        for (contender, load), seen in self.blackouts_ms.items():
            name = f"pivots {load}, {contender}: blackout"
            yield Result("mirror", name, seen, "ms")
            if contender == "nbdferry":
                yield Result("mirror", name + " p99", [percentile(seen, 0.99)], "ms",
                             at_most=10, note=f"of {len(seen)} pivots")


def percentile(values, share):
    return sorted(values)[math.ceil(share * len(values)) - 1]


def batch(contender, load, count):
    with ferry.Scratch() as scratch:
        source = write_disk(scratch.file("source.img"), SIZE)
        # It holds what the one before left there.
        image = write_disk(scratch.file("target.img"), SIZE)
        target = Nbdkit(scratch, "file", image)
        out = [one_pivot(scratch, contender, load, source, image, target.uri) for _ in range(count)]
        target.stop()
        return out


def one_pivot(scratch, contender, load, source, image, uri):
    """The blackout in milliseconds."""
    disk = scratch.file("disk.img")
    ferry.run_ok(["cp", source, disk])
    server = Serve(scratch, disk) if contender == "nbdferry" else \
        Qemu(scratch, disk, mode=contender)

    def start_guest():
        return Guest(scratch, server.uri, source, rate=LOADS[load], depth=64)

    guest = start_guest() if load == "under load" else None
    ferry.check(server.mirror(uri, LIMIT_SECONDS) is not None, f"{contender}: not in sync")
    guest = guest or start_guest()
    time.sleep(0.1)
    guest.phase()
    ferry.check(server.pivot(LIMIT_SECONDS), f"{contender}: no commit")
    time.sleep(0.02)
    seen = guest.phase()
    guest.end()
    server.stop()
    ferry.same(guest.shadow, image, "the target against what the guest wrote")
    return seen["longest_gap_us"] / 1e3
