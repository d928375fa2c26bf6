"""What the benches share: nbdferry with a clock on what it says, the target's server, processor
time, and results. Standard library only; scratch directory and processes come from interop/ferry.py.

A time ends where the program itself says so: the line in which `serve` reports the commit.
"""
import dataclasses
import http.client
import json
import os
import pathlib
import queue
import socket
import statistics
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "interop"))
import ferry  # noqa: E402

GIB = 1024 ** 3
MIB = 1024 ** 2
COMMITTED = "switched over"


def say(text):
    """Progress; the results alone go to standard output."""
    print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass
class Result:
    bench: str
    name: str
    values: list  # one a run
    unit: str = "ratio"
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""
    every: bool = False  # each value must keep to the bound, not the median alone

    def summary(self):
        values = sorted(self.values)
        low, high = values[0], values[-1]
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else \
            [low, low, high]
        median = statistics.median(values)
        reached = None
        if self.at_least is not None:
            reached = (low if self.every else median) >= self.at_least
        if self.at_most is not None:
            reached = (high if self.every else median) <= self.at_most
        return {"bench": self.bench, "name": self.name, "unit": self.unit, "runs": len(values),
                "median": round(median, 4), "q1": round(quartiles[0], 4),
                "q3": round(quartiles[2], 4), "min": round(low, 4), "max": round(high, 4),
                "at_least": self.at_least, "at_most": self.at_most, "reached": reached,
                "note": self.note}


def print_table(results):
    print(f"\n{'bench':<7} {'result':<47} {'runs':>4} {'median':>9}  {'quartiles':^17}  "
          f"{'min..max':^17}  wanted")
    for result in results:
        r = result.summary()
        wanted = ""
        if r["reached"] is not None:
            bound = f">= {r['at_least']:g}" if r["at_least"] is not None else f"<= {r['at_most']:g}"
            bound += " each" if result.every else ""
            wanted = bound + (" reached" if r["reached"] else " MISSED")
        name = r["name"] + ("" if r["unit"] == "ratio" else f", {r['unit']}")
        print(f"{r['bench']:<7} {name:<47} {r['runs']:>4} {r['median']:>9.3f}  "
              f"{r['q1']:>8.3f}{r['q3']:>9.3f}  {r['min']:>8.3f}{r['max']:>9.3f}  {wanted}")
        if r["note"]:
            print(f"        ({r['note']})")


def cpu_seconds(pid):
    """Of all its threads, so far."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory_bytes(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no VmHWM")


class Lines:
    """What a process says, line by line, each with the time at which it came."""

    def __init__(self, stream):
        self.lines = queue.SimpleQueue()
        self.seen = []
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream):
        for line in stream:
            self.lines.put((time.monotonic(), line.rstrip("\n")))
        self.lines.put((time.monotonic(), None))

    def wait_for(self, text, seconds):
        """(time, line); None if it did not come in time."""
        end = time.monotonic() + seconds
        while True:
            try:
                at, line = self.lines.get(timeout=max(0.001, end - time.monotonic()))
            except queue.Empty:
                return None
            ferry.check(line is not None, f"a process ended early; it said {self.seen}")
            self.seen.append(line)
            if text in line:
                return at, line

    def so_far(self):
        """All of them; nobody can wait for these any more."""
        while not self.lines.empty():
            _, line = self.lines.get()
            self.seen += [] if line is None else [line]
        return self.seen


class Refused(AssertionError):
    """nbdferry says no."""


class UnixHttp(http.client.HTTPConnection):
    def __init__(self, path, seconds):
        super().__init__("nbdferry", timeout=seconds)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Serve:
    """nbdferry serve on a disk that it owns, whatever earlier runs did to it."""

    def __init__(self, scratch, disk, prefix=()):
        forget(disk)
        self.scratch, self.disk = scratch, disk
        self.socket, self.control, self.uri = disk + ".sock", disk + ".ctl", \
            ferry.unix_uri(disk + ".sock")
        self.process = scratch.start("serve", [*prefix, ferry.NBDFERRY, "serve", disk],
                                     stderr=subprocess.PIPE, text=True)
        self.says = Lines(self.process.stderr)
        ferry.check(self.says.wait_for(f"serving {disk}", 20), "nbdferry serve did not come up")

    def command(self, name, *arguments, seconds=60):
        return ferry.run_ok([ferry.NBDFERRY, name, "--control", self.control, *arguments], seconds)

    def ask(self, method, path, seconds=60, **body):
        """As a command does it, but without a process whose start disturbs what is measured."""
        link = UnixHttp(self.control, seconds)
        try:
            link.request(method, path, json.dumps(body) if body else None)
            answer = link.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise Refused(f"{path}: {answer.status} {text}")
            return json.loads(text)
        finally:
            link.close()

    def status(self):
        return self.ask("GET", "/status")

    def mirror(self, uri, seconds, *options, watch=lambda status: None):
        """Seconds from the command's start until it is in sync, or None."""
        begin = time.monotonic()
        self.command("migrate", *options, uri)
        while time.monotonic() - begin < seconds:
            status = self.status()
            watch(status)
            ferry.check(status["phase"] not in ("failed", "cancelled"), f"migration: {status}")
            if status["phase"] == "in_sync":
                return time.monotonic() - begin
            time.sleep(0.02)
        return None

    def pivot(self, seconds):
        """True: committed."""
        try:
            self.ask("POST", "/switch", seconds, action="pivot")
        except Refused as why:
            say(str(why))
            return False
        return self.says.wait_for(COMMITTED, seconds) is not None

    def migrate_and_pivot(self, uri, seconds, *options):
        """Seconds from the command's start to the commit, or None."""
        begin = time.monotonic()
        self.command("migrate", "--switch", "pivot", *options, uri)
        end = self.says.wait_for(COMMITTED, seconds)
        return end[0] - begin if end else None

    def stop(self):
        ferry.check(self.scratch.stop(self.process) == 0, "nbdferry serve failed")
        forget(self.disk)


def forget(disk):
    """Without its record a disk is the owner again, ready for the next run."""
    pathlib.Path(disk + ".owner").unlink(missing_ok=True)


class NbdServer:
    """A contender's target, over TCP."""

    def __init__(self, scratch, command, prefix=(), host="127.0.0.1"):
        """command: of the address and the port, what to run."""
        self.scratch = scratch
        port = self.port = ferry.free_port()
        self.uri = f"nbd://{host}:{port}"
        self.process = scratch.start("target", [*prefix, *command(host, str(port))])
        ready = [*prefix, "nbdinfo", "--size", self.uri]
        ferry.wait_until(lambda: ferry.run(ready).returncode == 0, "the target")

    def stop(self):
        self.scratch.stop(self.process)


class Nbdkit(NbdServer):
    """The same for every contender."""

    def __init__(self, scratch, *plugin, **place):
        super().__init__(scratch, lambda host, port: ["nbdkit", "-f", "-i", host, "-p", port, *plugin], **place)


class Incoming(NbdServer):
    """nbdferry's own."""

    def __init__(self, scratch, image, **place):
        super().__init__(scratch, lambda host, port: [
            ferry.NBDFERRY, "serve", "--incoming", "--listen", f"{host}:{port}", image], **place)


class QemuNbd(NbdServer):
    """QEMU's own."""

    def __init__(self, scratch, image, **place):
        super().__init__(scratch, lambda host, port: [
            "qemu-nbd", "--persistent", "--format=raw", "--aio=io_uring", "--cache=writeback", "--shared=16",
            f"--bind={host}", f"--port={port}", image], **place)


def write_disk(path, size):
    """No zeroes and no holes. The same 64 MiB again and again: nobody here compresses."""
    return write_pieces(path, os.urandom(64 * MIB), size)


def write_pieces(path, piece, size):
    with open(path, "wb") as f:
        for _ in range(size // len(piece)):
            f.write(piece)
    return path


def sparse_file(path, size):
    pathlib.Path(path).unlink(missing_ok=True)
    with open(path, "wb") as f:
        f.truncate(size)
    return path


def fresh_target(path, size):
    """Each contender finds the same: a new disk of zeroes, all of it written, so that nobody waits for memory
    that the file system (and the machine below ours) has yet to find: that takes longer than the copy."""
    return write_pieces(path, bytes(MIB), size)


def in_turn(contenders, run):
    """Who goes first changes, so that nobody always runs in somebody's wake."""
    contenders = list(contenders)
    shift = run % len(contenders)
    return contenders[shift:] + contenders[:shift]
