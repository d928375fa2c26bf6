"""What the benches of a migration share: a wire of 1 Gb/s between two hosts, a guest whose time is
cut into phases, and QEMU's mirror, with the same commands as measure.Serve.
"""
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import time

import ferry
from measure import Lines, say

LINK_BYTES_PER_SECOND = 1e9 / 8
TARGET_HOST = "10.77.1.2"


class Hosts:
    """The source's and the target's: two network namespaces, and the wires between them. Where the machine has two
    processors each has one of its own, so that neither takes the other's time. Wire N has the addresses
    10.77.N.1 and 10.77.N.2, and is numbered from 1."""

    def __init__(self):
        self.names = [f"nbdferry-{side}-{os.getpid()}" for side in ("src", "dst")]
        self.processors = sorted(os.sched_getaffinity(0))[:2]
        pins = [["taskset", "--cpu-list", str(cpu)] for cpu in self.processors]
        self.prefixes = [[*pin, "ip", "netns", "exec", name]
                         for pin, name in zip(pins if len(pins) == 2 else [[], []], self.names)]

    @staticmethod
    def ends(number):
        return [f"nf{side}{number}-{os.getpid()}" for side in ("s", "d")]

    def add_wire(self, number, rate, queue):
        """What the source sends is limited to the rate (as tc writes it), if there is one."""
        ends = self.ends(number)
        ferry.wire(self.names, ends, [f"10.77.{number}.1/24", f"10.77.{number}.2/24"])
        if rate:
            ferry.limit_rate(self.names[0], ends[0], rate, queue)
        for side, name in enumerate(self.names):
            # Linux's own, whatever this machine prefers: BBR lets a connection that is always busy send next to
            # nothing for 200 ms every 10 s, and whoever waits for it waits as long.
            ferry.run_ok(["ip", "-n", name, "route", "change", f"10.77.{number}.0/24", "dev", ends[side],
                          "src", f"10.77.{number}.{side + 1}", "congctl", "cubic"])
        for prefix, end in zip(self.prefixes, ends):
            # Or a host would receive on the processor of the one that sends.
            ferry.run_ok([*prefix, "sh", "-c", f"""
                mask=$(sed -n 's/^Cpus_allowed:[[:space:]]*//p' /proc/self/status)
                echo "$mask" > /sys/class/net/{end}/queues/rx-0/rps_cpus"""])

    def cut(self, number):
        ferry.run_ok(["ip", "-n", self.names[1], "link", "set", self.ends(number)[1], "down"])


@contextlib.contextmanager
def hosts(rates, queue="50ms"):
    """Two of them, with a wire for each rate; gone in any case. What runs on neither, as we do, keeps away from
    the source's processor: it is the guest's time that is measured."""
    ours = os.sched_getaffinity(0)
    pair = Hosts()
    try:
        if len(ours) > 1:
            os.sched_setaffinity(0, ours - {pair.processors[0]})
        for name in pair.names:
            ferry.run_ok(["ip", "netns", "add", name])
            ferry.run_ok(["ip", "-n", name, "link", "set", "lo", "up"])
        for number, rate in enumerate(rates, start=1):
            pair.add_wire(number, rate, queue)
        yield pair
    finally:
        os.sched_setaffinity(0, ours)
        for name in pair.names:
            ferry.run(["ip", "netns", "del", name])


@contextlib.contextmanager
def link(queue="50ms", rate="1gbit"):
    """Two hosts and a wire between them: yields (source's prefix, target's prefix)."""
    with hosts([rate], queue) as pair:
        yield pair.prefixes


@contextlib.contextmanager
def awake():
    """No processor ever halts: it polls when it has nothing to do, which costs nobody anything. That a process
    has something to do instead, with a priority below all, would hold others up for a tick of the kernel."""
    with contextlib.ExitStack() as stack:
        try:
            latency = stack.enter_context(open("/dev/cpu_dma_latency", "wb", buffering=0))
            latency.write(struct.pack("i", 0))  # for as long as it is open
        except OSError as why:
            say(f"processors may halt meanwhile: {why}")
        yield


class Guest:
    """Writes until the end, and knows what; its time is cut into phases."""

    def __init__(self, scratch, uri, disk, *options, prefix=(), rate=0, depth=16, size=4096):
        """disk: a file that holds what the disk holds now."""
        self.scratch = scratch
        self.shadow = scratch.file("shadow.img")
        ferry.run_ok(["cp", disk, self.shadow])
        self.process = scratch.start("guest", [
            *prefix, ferry.NBD_LOAD, "--uri", uri, "--shadow", self.shadow, "--rate", str(rate),
            "--depth", str(depth), "--bytes", str(size), *options],
            stdout=subprocess.PIPE, text=True)
        self.says = Lines(self.process.stdout)

    def phase(self):
        """Ends one phase, begins the next; what the ended one was like."""
        ferry.check(self.process.poll() is None, "the guest ended: " + self.scratch.log("guest"))
        self.process.send_signal(signal.SIGUSR1)
        return json.loads(self.says.wait_for("phase", 10)[1])

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        last = json.loads(self.says.wait_for("last", 20)[1])
        ferry.check(self.process.wait(20) == 0,
                    "the guest saw errors: " + self.scratch.log("guest"))
        return last


def guest_text(out, phases):
    """One line of what the guest saw in each phase."""
    return ", ".join(
        f"{name} {p['iops']:.0f}/s p99 {p['p99_us'] / 1000:.2f} ms max {p['max_us'] / 1000:.1f} ms "
        f"worst 100 ms {p['worst_100ms']}" for name, p in ((n, out[n]) for n in phases))


class Qemu:
    """qemu-storage-daemon in front of the disk, and its mirror job."""

    def __init__(self, scratch, disk, prefix=(), mode="background"):
        self.mode = mode
        front, monitor = scratch.file("qemu.sock"), scratch.file("qmp.sock")
        self.uri = ferry.unix_uri(front)
        self.scratch = scratch
        self.process = scratch.start("qemu", [
            *prefix, "qemu-storage-daemon",
            "--blockdev", f"driver=file,node-name=file,filename={disk},aio=io_uring",
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

    def mirror(self, uri, seconds):
        """Seconds from the command's start until the mirror is ready, or None."""
        host, port = uri.removeprefix("nbd://").split(":")
        begin = time.monotonic()
        self.call("blockdev-add", driver="nbd", **{"node-name": "target"},
                  server={"type": "inet", "host": host, "port": port})
        self.call("blockdev-mirror", **{"job-id": "mirror", "device": "source", "target": "target",
                                        "sync": "full", "copy-mode": self.mode})
        ready = self.says.wait_for("BLOCK_JOB_READY", seconds)
        return ready[0] - begin if ready else None

    def pivot(self, seconds):
        """True: the target serves."""
        self.call("block-job-complete", device="mirror")
        return self.says.wait_for("BLOCK_JOB_COMPLETED", seconds) is not None

    def migrate_and_pivot(self, uri, seconds):
        """Seconds from the command's start until the target serves, or None."""
        begin = time.monotonic()
        if self.mirror(uri, seconds) is None or not self.pivot(seconds):
            return None
        return time.monotonic() - begin

    def stop(self):
        self.socket.close()
        self.scratch.stop(self.process)
