"""Several paths to one target: `paths.py CASE`. The paths are local addresses of the loopback, relays that
can be cut (test/soak/path.py), or links of different rates between two network namespaces.
"""
import os
import pathlib
import subprocess
import sys
import time

import ferry
from ferry import MIB, check

SIZE = 64 * MIB
RELAY = pathlib.Path(__file__).resolve().parent.parent / "soak" / "path.py"
VIAS = ("--via", "127.0.0.2", "--via", "127.0.0.3")


class Relay:
    """A way to a unix socket, by TCP, that is cut and mended."""

    def __init__(self, scratch, uri, name):
        self.process = subprocess.Popen([sys.executable, RELAY, uri.split("socket=")[1]], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        scratch.processes.append(self.process)
        self.name = name
        self.uri = f"nbd://127.0.0.1:{int(self.process.stdout.readline())}/"

    def __call__(self, word):
        print(word, file=self.process.stdin, flush=True)
        check(self.process.stdout.readline() == "done\n", f"{self.name}: {word}")


def tcp(scratch, command, port, name="target"):
    scratch.start(name, command)
    ferry.wait_until(lambda: ferry.accepts(("127.0.0.1", port)), name)
    return f"nbd://127.0.0.1:{port}/"


def server(scratch, kind, image):
    """Its URI; by TCP."""
    port = ferry.free_port()
    if kind == "qemu-nbd":
        return tcp(scratch, ["qemu-nbd", "-t", "-e", "16", "-f", "raw", "-x", "", "-b", "127.0.0.1",
                             "-p", str(port), image], port)
    if kind == "nbdkit":
        return tcp(scratch, ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "file", image], port)
    os.unlink(image)
    there = ferry.Ferry(scratch, image, "--incoming", "--create", str(SIZE), "--listen",
                        f"127.0.0.1:{port}", name="target")
    check(there.status()["role"] == "incoming", "it waits")
    return f"nbd://127.0.0.1:{port}/"


def paths(disk):
    return disk.status()["paths"]


def states(disk):
    return [path["state"] for path in paths(disk)]


def sent(disk):
    return [path["sent_bytes"] for path in paths(disk)]


def until_up(disk, wanted):
    ferry.wait_until(lambda: states(disk) == wanted, f"the paths to be {wanted}")


def in_sync(disk, seconds=60):
    ferry.wait_until(lambda: disk.status()["in_sync"], "to be in sync", seconds)


def release(scratch, disk, load, image, target):
    in_sync(disk)
    disk.ok("switch", "--release")
    load.process.wait(timeout=20)
    disk.stop()
    ferry.same(image, target, "both sides")


def begin(scratch, *options, rate="400"):
    image = scratch.disk("source.img", SIZE)
    disk = ferry.Ferry(scratch, image, *options)
    load = ferry.Load(scratch, disk.uri, image, "--rate", rate, "--until-shutdown")
    return image, disk, load


def carry(scratch, kind="qemu-nbd"):
    """By both, copied and mirrored data, once the second one has been proved; then after a pivot."""
    image, disk, load = begin(scratch)
    target = scratch.garbage("target.img", SIZE)
    uri = server(scratch, kind, target)
    disk.ok("migrate", *VIAS, "--bandwidth", "40M", uri)
    until_up(disk, ["up", "up"])
    check([path["via"] for path in paths(disk)] == ["127.0.0.2", "127.0.0.3"], paths(disk))
    ferry.wait_until(lambda: min(sent(disk)) > 4 * MIB, "both to carry")
    disk.ok("set", "--bandwidth", "0")
    in_sync(disk)
    disk.ok("verify")
    before = sent(disk)
    time.sleep(1)
    check(sum(sent(disk)) > sum(before), "writes are mirrored")
    disk.ok("switch", "--pivot")
    load.running()
    before = sent(disk)
    ferry.wait_until(lambda: sum(sent(disk)) > sum(before), "the guest is served from there")
    check(states(disk) == ["up", "up"], states(disk))
    disk.process.kill()
    disk.process.wait()
    load.process.wait(timeout=20)
    # A restart has them, too.
    disk = ferry.Ferry(scratch, image, name="again")
    until_up(disk, ["up", "up"])
    disk.stop()


def carry_nbdkit(scratch):
    carry(scratch, "nbdkit")


def carry_nbdferry(scratch):
    carry(scratch, "nbdferry")


def wrong(scratch):
    """A second URI that leads to another export of the same size: refused, and nothing of it is changed."""
    image, disk, load = begin(scratch)
    target = scratch.garbage("target.img", SIZE)
    other = scratch.garbage("other.img", SIZE)
    uri = ferry.qemu_nbd(scratch, target)
    other_uri = ferry.qemu_nbd(scratch, other, name="other")
    disk.ok("migrate", uri, other_uri)
    until_up(disk, ["up", "refused"])
    error = disk.status()["last_error"]
    for part in (uri, other_uri, "leads to another export", "check the servers"):
        check(part in error, f"{part!r} is not in {error!r}")
    check(error in scratch.log("ferry"), "the log says so")
    release(scratch, disk, load, image, target)
    ferry.same(other, scratch.garbage("as-before.img", SIZE), "the other export as it was")


def cut(scratch):
    """One of two is cut in mid-copy, and comes back; then both. The guest sees nothing."""
    image, disk, load = begin(scratch)
    target = scratch.garbage("target.img", SIZE)
    uri = ferry.qemu_nbd(scratch, target)
    one, two = Relay(scratch, uri, "one"), Relay(scratch, uri, "two")
    disk.ok("migrate", "--bandwidth", "8M", "--quarantine", "2s", one.uri, two.uri)
    until_up(disk, ["up", "up"])
    ferry.wait_until(lambda: min(sent(disk)) > MIB, "both to carry")
    one("cut")
    until_up(disk, ["down", "up"])
    before = sent(disk)
    ferry.wait_until(lambda: sent(disk)[1] > before[1] + 2 * MIB, "the other one to go on")
    check(disk.status()["phase"] == "copying", disk.status()["phase"])
    check(one.uri in disk.status()["last_error"], disk.status()["last_error"])
    one("mend")
    until_up(disk, ["up", "up"])
    before = sent(disk)
    ferry.wait_until(lambda: sent(disk)[0] > before[0] + MIB, "the first one to carry again")

    one("cut")
    two("cut")
    ferry.wait_until(lambda: disk.status()["phase"] == "interrupted", "nothing to be left")
    two("mend")
    until_up(disk, ["down", "up"])
    one("mend")
    until_up(disk, ["up", "up"])
    load.running()
    disk.ok("set", "--bandwidth", "0")
    in_sync(disk)
    disk.ok("verify")
    release(scratch, disk, load, image, target)


def stall(scratch):
    """One of two goes silent: the other one carries on at once, the silent one is given up in time."""
    image, disk, load = begin(scratch)
    target = scratch.garbage("target.img", SIZE)
    uri = ferry.qemu_nbd(scratch, target)
    one, two = Relay(scratch, uri, "one"), Relay(scratch, uri, "two")
    disk.ok("migrate", "--bandwidth", "4M", "--answer-timeout", "3s", "--quarantine", "10s", one.uri,
            two.uri)
    until_up(disk, ["up", "up"])
    ferry.wait_until(lambda: min(sent(disk)) > MIB, "both to carry")
    one("stall")
    began, before = time.monotonic(), sent(disk)
    ferry.wait_until(lambda: sent(disk)[1] > before[1] + 3 * MIB, "the other one to go on", 2.5)
    check(states(disk) == ["up", "up"], "not given up so soon")
    until_up(disk, ["down", "up"])
    check(time.monotonic() - began < 6, "given up in time")
    one("mend")
    until_up(disk, ["up", "up"])
    load.running()
    disk.ok("set", "--bandwidth", "0")
    release(scratch, disk, load, image, target)


def links(scratch):
    """Two links of different rates: each carries what it can."""
    if os.geteuid() != 0:
        sys.exit(77)
    names = [f"nf{os.getpid()}{side}" for side in "ab"]
    made = []
    try:
        for name in names:
            if ferry.run(["ip", "netns", "add", name]).returncode != 0:
                sys.exit(77)
            made.append(name)
        rates = (200, 50)  # Mbit/s
        for number, rate in enumerate(rates):
            ends = (f"nfa{number}", f"nfb{number}")
            ferry.wire(names, ends, [f"10.78.{number}.1/24", f"10.78.{number}.2/24"])
            ferry.limit_rate(names[0], ends[0], f"{rate}mbit")
        measure(scratch, names, rates)
    finally:
        for name in made:
            ferry.run(["ip", "netns", "del", name])


def measure(scratch, names, rates):
    image = scratch.file("source.img")
    with open(image, "wb") as f:
        f.write(os.urandom(2 * SIZE))
    target = scratch.garbage("target.img", 2 * SIZE)
    scratch.start("target", ["ip", "netns", "exec", names[1], "qemu-nbd", "-t", "-e", "16", "-f", "raw",
                             "-x", "", target])
    disk = ferry.Ferry(scratch, image, before=["ip", "netns", "exec", names[0]])
    time.sleep(1)
    began = time.monotonic()
    disk.ok("migrate", "--via", "10.78.0.1", "--via", "10.78.1.1", "nbd://10.78.0.2/",
            "nbd://10.78.1.2/")
    until_up(disk, ["up", "up"])
    in_sync(disk)
    took = time.monotonic() - began
    carried = sent(disk)
    ideal = 2 * SIZE * 8 / 1e6 / sum(rates)
    print(f"{took:.2f} s; the links' sum would take {ideal:.2f} s; {carried} bytes")
    check(took < 1.35 * ideal, f"{took:.2f} s, ideal {ideal:.2f} s")
    check(2 < carried[0] / carried[1] < 8, carried)
    disk.ok("cancel")
    disk.stop()


def main(case):
    with ferry.Scratch() as scratch:
        {f.__name__: f for f in (carry, carry_nbdkit, carry_nbdferry, wrong, cut, stall, links)}[case](scratch)


main(*sys.argv[1:])
