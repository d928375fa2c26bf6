"""The cases of bench_transport.py. Each has `rates` (a wire for each), run(run, hosts) once a run, and
results() at the end. A new one (over TLS, say) is a class here and a line in CASES.

 - two: 2 GiB by one wire of 1 Gb/s, by two; idle, and under 2,000 random writes of 4 KiB a second
 - unequal: 1 Gb/s and 250 Mb/s, each alone and both
 - cut: three wires of 500 Mb/s, of which one is cut in mid-copy, under the same writes
 - far: 1 Gb/s and 150 ms there and back (relay.cpp); nbdcopy by the same way shows what it carries
 - limit: --bandwidth 50M on a wire of 1 Gb/s, idle and under those writes: the bytes that the target's
   wire brings, sampled every 100 ms, in each window of 5 s
 - wait: a guest's writes in mode sync, each mirrored, while 2 GiB are copied and when nothing is
 - tls: the idle copy of 1 GiB over loopback, to nbdkit that demands TLS, with certificates; nbdcopy likewise,
   and as many connections
"""
import pathlib
import signal
import subprocess
import threading
import time

import ferry
from measure import GIB, MIB, Nbdkit, Result, Serve, fresh_target, in_turn, say, write_disk
from peers import TARGET_HOST, Guest, guest_text
from tls import Authority

RATE = 2000
LIMIT_SECONDS = 90  # of a migration
WIRE = 1e9 / 8      # bytes a second
SAMPLE_SECONDS = 0.1
WINDOW_SECONDS = 5


class Trial:
    """One migration of a disk by some of the wires, with or without a guest."""

    def __init__(self, scratch, hosts, size, guest=None):
        """guest: arguments of peers.Guest."""
        self.size = size
        self.disk = write_disk(scratch.file("disk.img"), size)
        self.image = fresh_target(scratch.file("target.img"), size)
        self.target = Nbdkit(scratch, "file", self.image, prefix=hosts.prefixes[1], host="0.0.0.0")
        self.server = Serve(scratch, self.disk, hosts.prefixes[0])
        self.scratch, self.source, self.guest = scratch, hosts.prefixes[0], None
        if guest:
            self.add_guest(**guest)
            time.sleep(1)
            self.before = self.guest.phase()
        self.samples = []  # (time, payload bytes answered, the disk's bytes that are stale)

    def add_guest(self, *options, **more):
        self.guest = Guest(self.scratch, self.server.uri, self.disk, *options, prefix=self.source, **more)

    def uri(self, wire):
        return f"nbd://10.77.{wire}.2:{self.target.port}"

    def carry(self, uris, *options, watch=lambda status: None):
        """Until in sync; what each path has carried: self.sent."""
        def look(status):
            self.sent = [path["sent_bytes"] for path in status["paths"]]
            self.samples.append((time.monotonic(), sum(self.sent), status["stale_bytes"]))
            watch(status)

        begin = time.monotonic()
        seconds = self.server.mirror(uris[-1], LIMIT_SECONDS, *options, *uris[:-1], watch=look)
        ferry.check(seconds is not None, f"not in sync within {LIMIT_SECONDS} s: "
                    f"{self.server.status()}")
        end, sent, _ = self.samples[-1]
        self.whole = sent / (end - begin)
        self.steady = self.rate(lambda stale: 0.1 * self.size < stale < 0.9 * self.size)

    def rate(self, chosen):
        """Bytes a second over the samples that are chosen by what is stale."""
        part = [(at, sent) for at, sent, stale in self.samples if chosen(stale)]
        return (part[-1][1] - part[0][1]) / (part[-1][0] - part[0][0])

    def end(self):
        """Pivots, and compares what the target holds."""
        if self.guest:
            self.during = self.guest.phase()
        end = time.monotonic() + LIMIT_SECONDS
        while not self.server.pivot(30):
            ferry.check(time.monotonic() < end, f"no pivot: {self.server.status()}")
            time.sleep(0.2)
        if self.guest:
            self.guest.end()
        self.server.stop()
        # What was cut off from it, it would wait for.
        self.scratch.stop(self.target.process, signal.SIGKILL)
        ferry.same(self.guest.shadow if self.guest else self.disk, self.image, "the target")

    def text(self):
        return (f"whole {self.whole / 1e6:.1f} MB/s, steady {self.steady / 1e6:.1f} MB/s, by path "
                f"{[round(sent / MIB) for sent in self.sent]} MiB" +
                (f", guest {guest_text(vars(self), ('before', 'during'))}" if self.guest else ""))


WRITES = {"rate": RATE, "depth": 64}


class Striped:
    """The same disk by some of the wires and by all, in turn."""
    name = ""
    rates = ()
    contenders = {}  # name -> (wires, bytes, guest)

    def __init__(self):
        self.rows = {name: [] for name in self.contenders}

    def run(self, run, hosts):
        for name in in_turn(self.contenders, run):
            wires, size, guest = self.contenders[name]
            with ferry.Scratch() as scratch:
                trial = Trial(scratch, hosts, size, guest)
                trial.carry([trial.uri(wire) for wire in wires])
                trial.end()
                self.rows[name].append(trial)
                say(f"transport {self.name} {name}: {trial.text()}")

    def result(self, name, values, unit="ratio", **more):
        return Result("transport", f"{self.name}: {name}", list(values), unit, **more)

    def ratios(self, name, over, parts, **bound):
        """A contender's rate to the sum of others', run by run."""
        for what in ("whole", "steady"):
            yield self.result(f"{over}, {what}", [
                getattr(mine, what) / sum(getattr(self.rows[part][i], what) for part in parts)
                for i, mine in enumerate(self.rows[name])], **bound)

    def speeds(self):
        for name, rows in self.rows.items():
            yield self.result(f"{name}, steady", [row.steady / 1e6 for row in rows], "MB/s")


class Two(Striped):
    name, rates = "two", ("1gbit", "1gbit")
    contenders = {"one": ((1,), GIB, None), "both": ((1, 2), 2 * GIB, None),
                  "one, load": ((1,), GIB, WRITES), "both, load": ((1, 2), 2 * GIB, WRITES)}

    def results(self):
        yield from self.ratios("both", "both to one", ["one"], at_least=1.95)
        yield from self.ratios("both, load", "both to one, load", ["one, load"], at_least=1.95)
        yield from self.speeds()
        yield self.result("guest's p99 during to before, both", [
            row.during["p99_us"] / row.before["p99_us"] for row in self.rows["both, load"]])


class Unequal(Striped):
    name, rates = "unequal", ("1gbit", "250mbit")
    contenders = {"fast": ((1,), GIB, None), "slow": ((2,), GIB // 4, None),
                  "both": ((1, 2), GIB, None)}

    def results(self):
        yield from self.ratios("both", "both to the sum", ["fast", "slow"], at_least=0.95)
        yield from self.speeds()


class Cut(Striped):
    """With what is needed to give a silent path up, and its writes (rule 8), soon."""
    name, rates = "cut", ("500mbit",) * 3
    contenders = {"three": ((1, 2, 3), 2 * GIB, WRITES)}
    options = ("--answer-timeout", "2s", "--quarantine", "2s")
    settled_seconds = 3  # after the cut

    def run(self, run, hosts):
        wires, size, guest = self.contenders["three"]
        with ferry.Scratch() as scratch:
            trial = Trial(scratch, hosts, size, guest)
            trial.cut_at = None

            def watch(status):
                if trial.cut_at is None and status["stale_bytes"] < 0.7 * size:
                    trial.cut_from = time.monotonic()
                    hosts.cut(2)  # takes seconds where the kernel is busy with other namespaces
                    trial.cut_at = time.monotonic()

            trial.carry([trial.uri(wire) for wire in wires], *self.options, watch=watch)
            trial.down = trial.server.status()["paths"][1]["state"]
            self.judge(trial)
            trial.end()
            self.rows["three"].append(trial)
            say(f"transport cut: before {trial.three / 1e6:.1f}, after {trial.two / 1e6:.1f} MB/s, cut path "
                f"{trial.down}; {trial.text()}")

    def judge(self, trial):
        def rate(begin, end):
            part = [(at, sent) for at, sent, _ in trial.samples if begin < at < end]
            ferry.check(len(part) > 1, f"the wire was cut too late, within "
                        f"{trial.cut_at - trial.cut_from:.1f} s")
            return (part[-1][1] - part[0][1]) / (part[-1][0] - part[0][0])

        end = trial.samples[-1][0]
        trial.three = rate(trial.samples[0][0] + 0.5, trial.cut_from)
        trial.two = rate(trial.cut_at + self.settled_seconds, end)
        trial.at_once = rate(trial.cut_at, trial.cut_at + self.settled_seconds)

    def results(self):
        rows = self.rows["three"]
        yield self.result("completes without an error of the guest", [1.0] * len(rows), "of the runs",
                          at_least=1, every=True)
        yield self.result("by two afterwards to two thirds", [
            row.two / (row.three * 2 / 3) for row in rows], at_least=0.95)
        yield self.result(f"in the {self.settled_seconds} s after it", [
            row.at_once / (row.three * 2 / 3) for row in rows])
        yield self.result("guest's longest write", [row.during["max_us"] / 1e3 for row in rows], "ms")


class Far(Striped):
    name, rates = "far", (None,)  # the relay limits it
    contenders = {"nbdferry": None, "nbdcopy": None}
    size = 2 * GIB
    delay_ms = 75

    def run(self, run, hosts):
        for name in in_turn(self.contenders, run):
            with ferry.Scratch() as scratch:
                trial = Trial(scratch, hosts, self.size)
                relay = scratch.start("relay", [
                    *hosts.prefixes[1], str(pathlib.Path(ferry.NBD_LOAD).parent / "relay"), "--to",
                    f"127.0.0.1:{trial.target.port}", "--delay", str(self.delay_ms), "--rate",
                    str(WIRE), "--listen", f"{TARGET_HOST}:0"], stdout=subprocess.PIPE, text=True)
                trial.relay_uri = f"nbd://{TARGET_HOST}:{int(relay.stdout.readline())}"
                getattr(self, "by_" + name)(trial, hosts)
                self.rows[name].append(trial)

    @staticmethod
    def by_nbdferry(trial, _):
        trial.carry([trial.relay_uri])
        trial.end()
        say(f"transport far nbdferry: {trial.text()}")

    def by_nbdcopy(self, trial, hosts):
        begin = time.monotonic()
        ferry.run_ok([*hosts.prefixes[0], "nbdcopy", "--connections=8", "--requests=64", "--flush",
                      trial.disk, trial.relay_uri], LIMIT_SECONDS)
        trial.whole = self.size / (time.monotonic() - begin)
        trial.server.stop()
        trial.target.stop()
        say(f"transport far nbdcopy: whole {trial.whole / 1e6:.1f} MB/s")

    def results(self):
        mine = self.rows["nbdferry"]
        for what in ("whole", "steady"):
            yield self.result(f"{what} to the link", [getattr(row, what) / WIRE for row in mine],
                              at_least=0.9)
        yield self.result("nbdcopy (8 connections, 64 requests), whole", [
            row.whole / WIRE for row in self.rows["nbdcopy"]])


class Meter:
    """Samples what has come in by a wire at the target's host: [(time, bytes)]."""

    def __init__(self, pid, device):
        self.lines = pathlib.Path(f"/proc/{pid}/net/dev")  # of its network namespace
        self.device, self.samples, self.over = device, [], threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        at = time.monotonic()
        while not self.over.wait(max(0, at - time.monotonic())):
            line = next(line for line in self.lines.read_text().splitlines() if self.device in line)
            self.samples.append((time.monotonic(), int(line.split(":")[1].split()[0])))
            at += SAMPLE_SECONDS

    def end(self):
        self.over.set()
        self.thread.join()
        return self.samples


class Limit(Striped):
    name, rates = "limit", ("1gbit",)
    bandwidth = 50 * MIB
    contenders = {"idle": ((1,), GIB, None), "load": ((1,), GIB, WRITES)}

    def run(self, run, hosts):
        for name in in_turn(self.contenders, run):
            wires, size, guest = self.contenders[name]
            with ferry.Scratch() as scratch:
                trial = Trial(scratch, hosts, size, guest)
                meter = Meter(trial.target.process.pid, hosts.ends(1)[1])
                trial.carry([trial.uri(wire) for wire in wires], "--bandwidth", "50M")
                trial.windows = self.windows(meter.end())
                trial.end()
                self.rows[name].append(trial)
                say(f"transport limit {name}: windows of {WINDOW_SECONDS} s: {min(trial.windows):.4f} to "
                    f"{max(trial.windows):.4f} of the limit; {trial.text()}")

    def windows(self, samples):
        """Each window's rate to the limit, from the first data on."""
        samples = [s for s in samples if s[1] > samples[0][1] + MIB]
        steps = round(WINDOW_SECONDS / SAMPLE_SECONDS)
        return [(b - a) / (end - begin) / self.bandwidth
                for (begin, a), (end, b) in zip(samples, samples[steps:])]

    def results(self):
        for name, rows in self.rows.items():
            yield self.result(f"{name}: a window of 5 s is off by", [
                max(abs(w - 1) for w in row.windows) for row in rows], at_most=0.05, every=True)
        for name, rows in self.rows.items():
            yield self.result(f"{name}: all of it to the limit", [
                row.steady / self.bandwidth for row in rows])


class Wait(Striped):
    """The guest keeps to what is copied first, so that each of its writes is mirrored at once."""
    name, rates = "wait", ("1gbit",)
    contenders = {"sync": ((1,), 2 * GIB, None)}
    span = 64 * MIB
    alone_seconds = 5
    guest = {"rate": 500, "depth": 64}
    p99_ms_max = 50  # as long as the wire's queue, which the copy would fill

    def run(self, run, hosts):
        wires, size, _ = self.contenders["sync"]
        with ferry.Scratch() as scratch:
            trial = Trial(scratch, hosts, size)

            def watch(status):
                done = 1 - status["stale_bytes"] / size
                if trial.guest is None and done > 0.1:
                    trial.add_guest("--span", str(self.span), **self.guest)
                    trial.phases = {}
                elif trial.guest is not None and done > 0.2 and trial.counted is None:
                    trial.guest.phase()
                    trial.counted = status["mirrored_bytes"]
                elif done > 0.9 and "bulk" not in trial.phases:
                    trial.phases["bulk"] = trial.guest.phase()
                    trial.counted = status["mirrored_bytes"] - trial.counted

            trial.counted = None
            trial.carry([trial.uri(wires[0])], "--mode", "sync", watch=watch)
            time.sleep(1)
            trial.before = trial.guest.phase()
            time.sleep(self.alone_seconds)
            trial.phases["alone"] = trial.guest.phase()
            written = trial.phases["bulk"]["writes"] * 4096
            ferry.check(abs(trial.counted - written) < 0.1 * written,
                        f"{trial.counted} bytes were mirrored of {written}")
            trial.end()
            self.rows["sync"].append(trial)
            say("transport wait: " + ", ".join(
                f"{name} p50 {p['p50_us'] / 1e3:.2f} p99 {p['p99_us'] / 1e3:.2f} max "
                f"{p['max_us'] / 1e3:.2f} ms" for name, p in trial.phases.items()) +
                f"; the copy {trial.steady / 1e6:.1f} MB/s")

    def results(self):
        rows = self.rows["sync"]
        for phase, what in (("bulk", "beside the copy"), ("alone", "nothing else")):
            for key in ("p50_us", "p99_us", "max_us"):
                bound = {"at_most": self.p99_ms_max} if (phase, key) == ("bulk", "p99_us") else {}
                yield self.result(f"{key[:-3]} {what}", [row.phases[phase][key] / 1e3 for row in rows],
                                  "ms", **bound)
        yield self.result("the copy meanwhile to the wire", [row.steady / WIRE for row in rows])


class Tls(Striped):
    name, rates = "tls", ()
    contenders = {"nbdferry": None, "nbdcopy": None, "nbdferry, plain": None, "nbdcopy, plain": None}
    size = GIB

    def run(self, run, hosts):
        with ferry.Scratch() as scratch:
            ours = Authority(scratch, "ours")
            there, here = ours.sign("there", "server", "DNS:localhost"), ours.sign("here", "client", "DNS:here")
            disk = write_disk(scratch.file("disk.img"), self.size)
            for name in in_turn(self.contenders, run):
                secret = "plain" not in name
                image = fresh_target(scratch.file("target.img"), self.size)
                target = Nbdkit(scratch, *(["--tls=on", f"--tls-certificates={there}"] if secret else []),
                                "file", image)
                uri = f"nbds://localhost:{target.port}/" if secret else target.uri
                copy = self.by_nbdferry if "nbdferry" in name else self.by_nbdcopy
                seconds = copy(scratch, disk, uri, here if secret else None)
                target.stop()
                ferry.same(disk, image, f"{name}'s copy")
                self.rows[name].append(self.size / seconds / 1e6)
                say(f"transport tls {name}: {self.rows[name][-1]:.0f} MB/s")

    @staticmethod
    def by_nbdferry(scratch, disk, uri, here):
        serve = Serve(scratch, disk)
        options = ["--tls", "require", "--tls-certificates", here] if here else []
        seconds = serve.migrate_and_pivot(uri, LIMIT_SECONDS, *options)
        ferry.check(seconds is not None, "the copy did not end")
        serve.stop()
        return seconds

    @staticmethod
    def by_nbdcopy(_, disk, uri, here):
        begin = time.monotonic()
        ferry.run_ok(["nbdcopy", "--connections=4", "--flush", disk,
                      uri + (f"?tls-certificates={here}" if here else "")], LIMIT_SECONDS)
        return time.monotonic() - begin

    def results(self):
        def ratio(name, mine, others, **bound):
            return self.result(name, [a / b for a, b in zip(self.rows[mine], self.rows[others])], **bound)

        yield ratio("nbdferry's speed to nbdcopy's", "nbdferry", "nbdcopy", at_least=0.9)
        yield ratio("the same without TLS", "nbdferry, plain", "nbdcopy, plain")
        for name, rows in self.rows.items():
            yield self.result(name, rows, "MB/s")


CASES = {case.name: case for case in (Two, Unequal, Cut, Far, Limit, Wait, Tls)}
