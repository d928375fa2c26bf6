"""The cases of bench_mirror.py in which a guest is watched before, during and after a migration.
Each case runs every contender once a run, and says afterwards what came of it.

 - link: 1 GiB over a wire of 1 Gb/s under 2,000 random 4 KiB writes a second, open loop. The
   wire's queue (tbf) is 50 ms long, or 5 ms.
 - tmpfs: 2 GiB over loopback; the guest writes 4 KiB at random as fast as it can, 16 at a time. Once to the
   contender's own kind of server (nbdferry serve --incoming, qemu-nbd), once to nbdkit.
 - outrun: the guest writes 64 KiB at random, 250 MB/s unless it is slowed, to a wire of 1 Gb/s.
 - hang: the target stops for 5 s while writes wait for it (sync).
 - far: each read or write of the target takes 20 ms; 2,000 writes a second, open loop. First the
   copy, then in sync.

A p99 is compared with the same guest's before the migration: that needs a machine with nothing else
to do, or what else it does is what is compared with.

A guest that is slowed on purpose (outrun, hang) is not measured open loop: from the time at which a
write was due, each would seem later than the one before, without an end. There a latency counts
from the sending, with at most 16 writes in flight, and what was not sent in time is left out.
"""
import dataclasses
import pathlib
import signal
import time

import ferry
from measure import GIB, MIB, Incoming, Nbdkit, QemuNbd, Result, Serve, fresh_target, in_turn, say, write_disk
from peers import LINK_BYTES_PER_SECOND, TARGET_HOST, Guest, Qemu, guest_text

RATE = 2000
QUEUE_MS = 50
MAX_DELAY_MS = 50  # the default of --max-delay
SYNC_TIMEOUT_MS = 1000  # the default of --sync-timeout
HANG_SECONDS = 5
SAID_MAX = 12  # lines of the log
SLOWED = ("--no-catch-up",)
CONTENDERS = ("nbdferry", "background", "write-blocking")
LOOPBACK = ([], [])


@dataclasses.dataclass
class Case:
    """What is tried, and what was seen: for each contender a row a run."""
    name: str
    size: int
    guest: dict  # of Guest
    guest_options: tuple = ()
    target: tuple = ()  # more words for nbdkit
    own_target: bool = False  # the contender's own kind of server instead
    migrate: tuple = ()  # options
    stays: float | None = None  # seconds in sync before the pivot; None: pivots at once, by itself
    limit: float = 60
    qemu_limit: float = 20
    contenders: tuple = CONTENDERS
    kept_min: float | None = None  # of nbdferry's guest's rate

    def __post_init__(self):
        self.rows = {name: [] for name in self.contenders}

    def run(self, run, prefixes=LOOPBACK):
        host = "127.0.0.1" if prefixes is LOOPBACK else TARGET_HOST
        for contender in in_turn(self.contenders, run):
            with ferry.Scratch() as scratch:
                trial = Trial(self, scratch, contender, prefixes, host)
                trial.before()
                self.during(trial)
                self.rows[contender].append(trial.after())
            say(f"mirror {self.name} {contender}: {text(self.rows[contender][-1])}")

    def during(self, trial):
        if self.stays is None:
            trial.migrate_and_pivot()
        elif trial.mirror():
            time.sleep(self.stays)
            trial.cut("during")
            trial.pivot()
        else:
            trial.cut("during")

    def results(self):
        mine = self.rows["nbdferry"]
        yield self.result(f"committed within {self.limit:g} s",
                          [float(row["seconds"] is not None) for row in mine], "of the runs",
                          at_least=1, every=True)
        # What was never reached has no figure.
        yield from (result for result in self.bounds(mine) if result.values)
        for contender in self.contenders:
            yield from self.seen(contender)

    def bounds(self, mine):
        raise NotImplementedError

    def seen(self, contender):
        rows = self.rows[contender]
        done = [row["seconds"] for row in rows if row["seconds"]]
        limit = self.limit if contender == "nbdferry" else self.qemu_limit
        note = "" if len(done) == len(rows) else \
            f"committed in {len(done)} of {len(rows)} runs within {limit:g} s"
        yield self.result(f"{contender}: rate kept", kept(rows), note=note,
                          at_least=self.kept_min if contender == "nbdferry" else None)
        for name, key in (("p99", "p99_us"), ("longest", "max_us")):
            yield self.result(f"{contender}: {name}", [row["during"][key] / 1e3 for row in rows],
                              "ms")
        if done:
            yield self.result(f"{contender}: commit after", done, "s")

    def result(self, name, values, unit="ratio", **more):
        return Result("mirror", f"{self.name} {name}", values, unit, **more)


class Trial:
    """One migration by one contender, and its guest."""

    def __init__(self, case, scratch, contender, prefixes, host):
        self.case, self.scratch = case, scratch
        self.mine = contender == "nbdferry"
        self.limit = case.limit if self.mine else case.qemu_limit
        disk = write_disk(scratch.file("disk.img"), case.size)
        self.image = fresh_target(scratch.file("target.img"), case.size)
        self.target = self.start_target(prefix=prefixes[1], host=host)
        self.server = Serve(scratch, disk, prefixes[0]) if self.mine else \
            Qemu(scratch, disk, prefixes[0], contender)
        self.windows = scratch.file("windows")
        self.guest = Guest(scratch, self.server.uri, disk, "--windows", self.windows,
                           *case.guest_options, prefix=prefixes[0], **case.guest)
        self.out = {"seconds": None, "said": [], "longest_delay_us": 0}
        self.begin = None

    def start_target(self, **place):
        if self.case.own_target:
            return (Incoming if self.mine else QemuNbd)(self.scratch, self.image, **place)
        options = [word for word in self.case.target if word.startswith("-")]
        parameters = [word for word in self.case.target if not word.startswith("-")]
        return Nbdkit(self.scratch, *options, "file", self.image, *parameters, **place)

    def cut(self, name):
        self.out[name] = self.guest.phase()

    def before(self):
        time.sleep(1)
        self.guest.phase()
        time.sleep(3)
        self.cut("before")
        self.begin = time.monotonic()

    def options(self):
        return self.case.migrate if self.mine else ()

    def watch(self, status):
        self.out["longest_delay_us"] = max(self.out["longest_delay_us"],
                                           status["guest"]["delay_us"])

    def mirror(self):
        """True: in sync."""
        watch = {"watch": self.watch} if self.mine else {}
        self.out["in_sync"] = self.server.mirror(self.target.uri, self.limit, *self.options(),
                                                 **watch)
        return self.out["in_sync"] is not None

    def pivot(self):
        # A guest that outruns the wire is not in sync at every moment: then it is tried again.
        end = time.monotonic() + self.limit
        while not (done := self.server.pivot(self.limit)) and self.mine and time.monotonic() < end:
            time.sleep(0.2)
        if done:
            self.out["seconds"] = time.monotonic() - self.begin
        time.sleep(0.2)
        self.cut("switch")

    def migrate_and_pivot(self):
        self.out["seconds"] = self.server.migrate_and_pivot(self.target.uri, self.limit)
        self.cut("during")

    def after(self):
        if self.mine:
            self.out["status"] = self.server.status()
        time.sleep(1)
        self.out["after"] = self.guest.end()
        self.server.stop()
        self.target.stop()
        if self.out["seconds"]:
            ferry.same(self.guest.shadow, self.image, "the target against what the guest wrote")
        self.out["windows"] = self.read_windows()
        if self.mine:
            self.out["said"] = [line.split(": ", 1)[1] for line in self.server.says.so_far()
                                if ": mode " in line]
        return self.out

    def read_windows(self):
        """(seconds since the migration's start, answers, p99 and longest latency in ms) each."""
        lines = [line.split() for line in pathlib.Path(self.windows).read_text().splitlines()]
        return [(int(t) / 1e3 - self.begin, int(n), float(p99) / 1e3, float(longest) / 1e3)
                for t, n, p99, longest in lines]


def kept(rows):
    return [row["during"]["iops"] / row["before"]["iops"] for row in rows]


def text(out):
    parts = [f"committed after {out['seconds']:.2f} s" if out["seconds"] else "not committed"]
    if out.get("in_sync"):
        parts[0] = f"in sync after {out['in_sync']:.2f} s, " + parts[0]
    parts.append("guest " + guest_text(out, [
        name for name in ("before", "copying", "during", "switch", "after") if name in out]))
    if "in_sync" in out and "status" in out:
        parts.append(f"longest delay seen {out['longest_delay_us'] / 1e3:.0f} ms")
    parts += out["said"][:SAID_MAX]
    if "status" in out and not out["seconds"]:
        parts.append(status_text(out["status"]))
    return "; ".join(parts)


def status_text(status):
    return (f"status: {status['phase']}, {status['mode']} ({status['mode_reason']}), "
            f"{status['verdict']}, last error: {status['last_error']}")


class Link(Case):
    def __init__(self, queue):
        super().__init__(f"link {queue}:", GIB, {"rate": RATE, "depth": 64}, qemu_limit=25,
                         kept_min=0.995)
        self.queue = queue

    def bounds(self, mine):
        yield self.result("commit to the time on the wire", [
            row["seconds"] / wire_seconds(self.size, row) for row in mine if row["seconds"]],
            at_most=1.15)
        yield self.result("guest's p99 to its p99 before", p99_to_before(mine), at_most=2)
        yield self.result("p99 before", [row["before"]["p99_us"] / 1e3 for row in mine], "ms")
        for phase in ("before", "during"):
            yield self.result(f"worst 100 ms {phase}", [
                row[phase]["worst_100ms"] / (RATE / 10) for row in mine], "of its rate")


def wire_seconds(size, row):
    """Of the payload alone, at the full rate; TCP's headers take 5 % more."""
    return (size + row["status"]["mirrored_bytes"]) / LINK_BYTES_PER_SECOND


def p99_to_before(rows, phase="during"):
    return [row[phase]["p99_us"] / row["before"]["p99_us"] for row in rows]


class Tmpfs(Case):
    def __init__(self, name, own_target):
        super().__init__(f"{name}:", 2 * GIB, {"depth": 16}, kept_min=0.5, own_target=own_target)

    def bounds(self, _):
        for contender in self.contenders:
            yield self.result(f"{contender}: rate before", [
                row["before"]["iops"] for row in self.rows[contender]], "/s")


class Outrun(Case):
    def __init__(self):
        super().__init__("outrun:", 512 * MIB, {"rate": 3800, "depth": 16, "size": 64 * 1024},
                         guest_options=SLOWED, stays=3)

    def bounds(self, mine):
        yield self.result("guest's rate before to the wire's", [
            row["before"]["iops"] * self.guest["size"] / LINK_BYTES_PER_SECOND for row in mine])
        yield self.result("longest write", [row["during"]["max_us"] / 1e3 for row in mine], "ms",
                          at_most=MAX_DELAY_MS + QUEUE_MS, every=True,
                          note="--max-delay and the wire's queue together")
        yield self.result("longest pacing in the status", [
            row["longest_delay_us"] / 1e3 for row in mine], "ms")
        yield self.result("longest write at the switch", [
            row["switch"]["max_us"] / 1e3 for row in mine if "switch" in row], "ms")


class Hang(Case):
    """QEMU has no time limit for a write that waits for the target."""

    def __init__(self):
        super().__init__("hang:", 256 * MIB, {"rate": RATE, "depth": 16}, guest_options=SLOWED,
                         migrate=("--mode", "sync"), stays=1,
                         contenders=("nbdferry", "write-blocking"))

    def during(self, trial):
        ferry.check(trial.mirror(), "not in sync before the target hangs")
        time.sleep(self.stays)
        trial.guest.phase()
        trial.target.process.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        time.sleep(HANG_SECONDS - 1)
        if trial.mine:
            trial.out["hung"] = trial.server.status()
            say(f"mirror hang: after {time.monotonic() - begin:.1f} s, "
                f"{status_text(trial.out['hung'])}")
        time.sleep(begin + HANG_SECONDS - time.monotonic())
        trial.target.process.send_signal(signal.SIGCONT)
        back = not trial.mine or self.back_in_sync(trial)
        time.sleep(0.5)
        trial.cut("during")
        if back:
            trial.pivot()

    def back_in_sync(self, trial):
        begin = time.monotonic()
        while time.monotonic() - begin < self.limit:
            status = trial.server.status()
            if status["phase"] == "in_sync" and status["mode"] == "sync":
                trial.out["recovered_seconds"] = time.monotonic() - begin
                return True
            time.sleep(0.02)
        return False

    def bounds(self, mine):
        yield self.result("longest write", [row["during"]["max_us"] / 1e3 for row in mine], "ms",
                          at_most=SYNC_TIMEOUT_MS * 1.1, every=True)
        yield self.result("in sync again, in mode sync, after", [
            row["recovered_seconds"] for row in mine if "recovered_seconds" in row], "s")
        yield self.result("the status says why", [
            float("did not answer" in row["hung"]["mode_reason"]) for row in mine], "of the runs",
            at_least=1, every=True, note=status_text(mine[-1]["hung"]))


class Far(Case):
    """64 threads, so that what is tried is the distance and not how many requests nbdkit takes. The
    copy has a phase of its own: it takes the processors' time, wherever the target is.
    """

    def __init__(self):
        super().__init__("far:", GIB, {"rate": RATE, "depth": 64}, stays=4, target=(
            "--threads=64", "--filter=delay", "rdelay=20ms", "wdelay=20ms"))

    def during(self, trial):
        if trial.mirror():
            trial.cut("copying")
            time.sleep(self.stays)
            trial.cut("during")
            trial.pivot()
        else:
            trial.cut("during")

    def bounds(self, mine):
        yield self.result("guest's p99 in sync to its p99 before", p99_to_before(mine),
                          at_most=1.2)
        copied = [row for row in mine if "copying" in row]
        yield self.result("guest's p99 while copying to before", p99_to_before(copied, "copying"))
        yield self.result("p99 before", [row["before"]["p99_us"] / 1e3 for row in mine], "ms")
        yield self.result("longest write at the switch", [
            row["switch"]["max_us"] / 1e3 for row in mine if "switch" in row], "ms")
