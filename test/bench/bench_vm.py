"""A VM with two disks (256 and 128 MiB) under load moves between two hosts with a link of 1 Gb/s for its
disks and one for its memory:
 - nbdferry: scripts/migrate-vm.sh
 - QEMU, memory only: its own migration, both hosts on the same files
 - QEMU, mirror: its own migration, disks by blockdev-mirror in write-blocking mode to the NBD server of
   the destination's QEMU, as libvirt does it
First one guest moves there and back many times in a row; then each contender in turn, with a new guest
each time. Whatever a guest wrote is checked at its end.

Blackout: from one QEMU's STOP to the other's RESUME. A guest's longest wait for a write includes it, since
its own clock stands still meanwhile.
"""
import json
import os
import pathlib
import sys
import time

from measure import Result, say

TREE = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TREE / "test/vm"), str(TREE / "scripts/vm")]
import guest  # noqa: E402
from hosts import ferry, migrate_ok, two_hosts  # noqa: E402
from qmp import Qmp  # noqa: E402
from world import World  # noqa: E402

SECONDS_BEFORE = 3  # of the guest undisturbed, to compare with
SIZES_MIB = (256, 128)
PORT = 10808


class QemuHost:
    """Plain QEMU on a host, with plain files as disks."""

    def __init__(self, world, host, files, incoming):
        qmp = os.path.join(host.folder, f"qmp{world.lives}.sock")
        command = [*host.prefix, "qemu-system-x86_64", "-qmp", f"unix:{qmp},server=on,wait=off",
                   *world.qemu()]
        for number, file in enumerate(files):
            command += [
                "-blockdev", f"driver=file,node-name=file{number},filename={file},aio=io_uring,"
                             "discard=unmap,locking=off",
                "-blockdev", f"driver=raw,node-name=disk{number},file=file{number},discard=unmap",
                "-device", f"virtio-blk-pci,id=device{number},drive=disk{number},discard=on"]
        if incoming:
            command += ["-S", "-incoming", "defer"]
        self.process = world.scratch.start(f"qemu{world.lives}", command)
        ferry.wait_until(lambda: os.path.exists(qmp) and ferry.accepts(qmp), "QEMU")
        self.qmp = Qmp(qmp, f"QEMU on host {host.number}")

    def end(self):
        self.qmp.call("quit")
        self.qmp.close()
        self.process.wait(20)


class QemuWorld(World):
    """The same guest without nbdferry. `mirror`: the disks move, too."""

    def __init__(self, scratch, hosts, mirror):
        self.mirror = mirror
        super().__init__(scratch, hosts)

    def start(self):
        self.files = [self.here.disk(0), self.here.disk(1)]
        self.source = QemuHost(self, self.here, self.files, incoming=False)

    def move(self):
        files = self.files
        if self.mirror:
            files = [self.there.disk(0), self.there.disk(1)]
            for file, size in zip(files, SIZES_MIB):
                with open(file, "wb") as f:
                    f.truncate(size * ferry.MIB)
        target = QemuHost(self, self.there, files, incoming=True)
        begin = time.monotonic()
        source, there = self.source.qmp, target.qmp
        if self.mirror:
            self.mirror_disks(source, there)
        capabilities = [{"capability": name, "state": True} for name in
                        ("events", "pause-before-switchover", "late-block-activate", "multifd")]
        for qemu in (source, there):
            qemu.call("migrate-set-capabilities", capabilities=capabilities)
            qemu.call("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=300)
        uri = f"tcp:{self.there.memory_address}:{PORT}"
        there.call("migrate-incoming", uri=uri)
        source.call("migrate", uri=uri)
        status(source, "pre-switchover")
        if self.mirror:
            for number in (0, 1):
                source.call("block-job-cancel", device=f"mirror{number}")
            ferry.check(source.wait(lambda: not source.call("query-block-jobs"), 30, 0.001),
                        "the mirror does not end")
        source.call("migrate-continue", state="pre-switchover")
        status(source, "completed")
        ferry.check(there.wait(lambda: there.status() == "paused", 30, 0.001), "not loaded")
        if self.mirror:
            there.call("nbd-server-stop")
        there.call("cont")
        seconds = time.monotonic() - begin
        there.status()
        blackout = there.time_of("RESUME") - source.time_of("STOP")
        self.source.end()
        self.source, self.files = target, files
        self.here, self.there = self.there, self.here
        self.goes_on()
        return {"seconds": seconds, "blackout_seconds": blackout}

    def mirror_disks(self, source, there):
        there.call("nbd-server-start", addr={"type": "inet", "data": {
            "host": self.there.disk_address, "port": str(PORT + 1)}})
        for number in (0, 1):
            there.call("block-export-add", type="nbd", id=f"export{number}",
                       node_name=f"disk{number}", writable=True)
            source.call("blockdev-add", driver="nbd", node_name=f"target{number}",
                        export=f"disk{number}", discard="unmap", server={
                            "type": "inet", "host": self.there.disk_address,
                            "port": str(PORT + 1)})
            source.call("blockdev-mirror", job_id=f"mirror{number}", device=f"disk{number}",
                        target=f"target{number}", sync="full", copy_mode="write-blocking")
        ferry.check(source.wait(
            lambda: all(job["ready"] for job in source.call("query-block-jobs")), 120, 0.05),
            "the mirror does not get ready")

    def stop(self):
        self.console.stop()
        self.source.process.wait(20)
        return self.files


class FerryWorld(World):
    def move(self):
        self.wait_there()
        figures = json.loads(migrate_ok(self.here, self.there, "--json").stdout)
        self.arrived()
        return figures


def status(qemu, wanted):
    ferry.check(qemu.wait(lambda: qemu.migration()["status"] == wanted, 120, 0.001),
                f"the migration does not get to {wanted}: {qemu.migration()}")


def in_a_row(round_trips):
    with two_hosts() as (scratch, hosts):
        world = FerryWorld(scratch, hosts)
        moves = []
        for _ in range(round_trips):
            moves += [world.move(), world.move()]
        world.end()
    say(f"vm: {2 * round_trips} moves in a row: nothing lost")
    return moves


def one_run(make):
    """There and back, with what the guest saw meanwhile."""
    with two_hosts() as (scratch, hosts):
        world = make(scratch, hosts)
        time.sleep(SECONDS_BEFORE)
        before = world.console.latency("write_b", time.monotonic() - SECONDS_BEFORE)
        rows = []
        for _ in range(2):
            begin = time.monotonic()
            row = world.move()
            writes = world.console.latency("write_b", begin)
            rows.append({**row, "p99_us": writes[2], "p99_before_us": before[2],
                         "longest_seconds": row["blackout_seconds"] + writes[3] / 1e6})
        world.end()
    return rows


def bench(runs):
    try:
        if os.geteuid() != 0:
            raise guest.Unavailable("network namespaces need root")
        guest.build(os.environ["GUEST_CACHE"], os.environ["GUEST_WRITER"])
    except guest.Unavailable as why:
        say(f"vm: left out: {why}")
        return
    row = in_a_row(2 * runs)
    contenders = {"nbdferry": FerryWorld,
                  "QEMU, memory only": lambda *where: QemuWorld(*where, mirror=False),
                  "QEMU, mirror": lambda *where: QemuWorld(*where, mirror=True)}
    seen = {name: [] for name in contenders}
    for run in range(runs):
        for name, make in contenders.items():
            moves = one_run(make)
            seen[name] += moves
            say(f"vm {run + 1}/{runs} {name}: " + ", ".join(
                f"{m['seconds']:.1f} s, blackout {m['blackout_seconds'] * 1e3:.0f} ms, longest write "
                f"{m['longest_seconds'] * 1e3:.0f} ms" for m in moves))
    yield from results(row, seen)


def results(row, seen):
    own = sorted(m["blackout_seconds"] for m in seen["QEMU, memory only"])
    own = own[len(own) // 2]
    yield Result("vm", "in a row: blackout", [m["blackout_seconds"] * 1e3 for m in row], "ms")
    yield Result("vm", "in a row: its disk part", [m["blackout_disk_seconds"] * 1e3 for m in row],
                 "ms", at_most=10)
    yield Result("vm", "blackout over QEMU's memory-only one", [
        (m["blackout_seconds"] - own) * 1e3 for m in seen["nbdferry"]], "ms", at_most=20)
    for name, moves in seen.items():
        for what, key, unit, scale in (
                ("time", "seconds", "s", 1), ("blackout", "blackout_seconds", "ms", 1e3),
                ("guest's p99 meanwhile", "p99_us", "ms", 1e-3),
                ("guest's longest write", "longest_seconds", "ms", 1e3)):
            yield Result("vm", f"{name}: {what}", [m[key] * scale for m in moves], unit)
