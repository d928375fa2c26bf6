"""1 GiB over one link of 1 Gb/s (tbf, between two network namespaces) under 2,000 random 4 KiB writes
a second, open loop: a write's latency counts from the time at which it was due. Beside nbdferry:
QEMU's mirror (qemu-storage-daemon) in both copy modes, to the same nbdkit, with a time limit, since
`background` never gets level under this load.

Committed means: the target serves. The load goes on through it, and then the target must equal what
the guest knows that it wrote. The wire time is that of the payload alone at the full 1 Gb/s, which
no TCP reaches (headers take 5%).
"""
import contextlib
import json
import os
import signal
import socket
import subprocess
import time

import ferry
from measure import GIB, Lines, Nbdkit, Result, Serve, fresh_target, say, write_disk

SIZE = GIB
RATE = 2000
LINK_BYTES_PER_SECOND = 1e9 / 8
LIMIT_SECONDS = 40
QEMU_LIMIT_SECONDS = 25
TARGET_HOST = "10.77.1.2"


@contextlib.contextmanager
def link():
    """Two hosts and a wire of 1 Gb/s between them: yields (source's prefix, target's prefix)."""
    names = [f"nbdferry-{side}-{os.getpid()}" for side in ("src", "dst")]
    ends = [f"nf{side}{os.getpid()}" for side in ("s", "d")]
    try:
        for name in names:
            ferry.run_ok(["ip", "netns", "add", name])
        ferry.wire(names, ends, ["10.77.1.1/24", f"{TARGET_HOST}/24"])
        ferry.limit_rate(names[0], ends[0], "1gbit")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            ferry.run(["ip", "netns", "del", name])


class Guest:
    """Writes at its rate until the end; its time is cut into phases."""

    def __init__(self, scratch, uri, source):
        self.scratch = scratch
        self.shadow = scratch.file("shadow.img")
        ferry.run_ok(["cp", source, self.shadow])
        self.process = scratch.start("guest", [
            ferry.NBD_LOAD, "--uri", uri, "--shadow", self.shadow, "--rate", str(RATE),
            "--depth", "64", "--bytes", "4096"], stdout=subprocess.PIPE, text=True)
        self.says = Lines(self.process.stdout)

    def phase(self):
        """Ends one phase, begins the next; what the ended one was like."""
        ferry.check(self.process.poll() is None, "the guest ended: " + self.scratch.log("guest"))
        self.process.send_signal(signal.SIGUSR1)
        return json.loads(self.says.wait_for("phase", 10)[1])

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        last = json.loads(self.says.wait_for("last", 20)[1])
        ferry.check(self.process.wait(20) == 0, "the guest saw errors: " + self.scratch.log("guest"))
        return last


class Qemu:
    """qemu-storage-daemon in front of the disk, and its mirror job."""

    def __init__(self, scratch, source, prefix, mode):
        self.mode = mode
        front, monitor = scratch.file("qemu.sock"), scratch.file("qmp.sock")
        self.uri = ferry.unix_uri(front)
        self.scratch = scratch
        self.process = scratch.start("qemu", [
            *prefix, "qemu-storage-daemon",
            "--blockdev", f"driver=file,node-name=file,filename={source},aio=io_uring",
            "--blockdev", "driver=raw,node-name=source,file=file",
            "--nbd-server", f"addr.type=unix,addr.path={front}",
            "--export", "type=nbd,id=export,node-name=source,name=,writable=on",
            "--chardev", f"socket,id=qmp,path={monitor},server=on,wait=off",
            "--monitor", "chardev=qmp"])
        ferry.wait_until(lambda: ferry.accepts(front) and os.path.exists(monitor), "QEMU")
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(monitor)
        self.says = Lines(self.socket.makefile("r"))
        self.says.wait_for("QMP", 10)
        self.call("qmp_capabilities")

    def call(self, command, **arguments):
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            _, line = self.says.wait_for('"', 20)
            answer = json.loads(line)
            ferry.check("error" not in answer, f"QEMU: {command}: {line}")
            if "return" in answer:
                return

    def migrate_and_pivot(self, uri, seconds):
        host, port = uri.removeprefix("nbd://").split(":")
        begin = time.monotonic()
        self.call("blockdev-add", driver="nbd", **{"node-name": "target"},
                  server={"type": "inet", "host": host, "port": port})
        self.call("blockdev-mirror", **{"job-id": "mirror", "device": "source", "target": "target",
                                        "sync": "full", "copy-mode": self.mode})
        if not self.says.wait_for("BLOCK_JOB_READY", seconds):
            return None
        self.call("block-job-complete", device="mirror")
        end = self.says.wait_for("BLOCK_JOB_COMPLETED", seconds)
        return end[0] - begin if end else None

    def stop(self):
        self.socket.close()
        self.scratch.stop(self.process)


def one_run(contender, source, prefixes, limit):
    """What the guest saw before and during, the time to the commit, the bytes mirrored."""
    with ferry.Scratch() as scratch:
        image = fresh_target(scratch.file("target.img"), SIZE)
        disk = scratch.file("disk.img")
        ferry.run_ok(["cp", source, disk])
        target = Nbdkit(scratch, "file", image, prefix=prefixes[1], host=TARGET_HOST)
        server = Serve(scratch, disk, prefixes[0]) if contender == "nbdferry" else \
            Qemu(scratch, disk, prefixes[0], contender)
        guest = Guest(scratch, server.uri, source)
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
    def guest(phase):
        p = out[phase]
        return (f"{phase} {p['iops']:.0f}/s p99 {p['p99_us'] / 1000:.2f} ms max "
                f"{p['max_us'] / 1000:.1f} ms worst 100 ms {p['worst_100ms']}")
    done = f"committed in {out['seconds']:.2f} s" if out["seconds"] else "not committed in time"
    say(f"link {label}: {done}; guest " + ", ".join(map(guest, ("before", "during", "after"))))


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
