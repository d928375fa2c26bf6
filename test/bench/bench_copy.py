"""The idle bulk copy: 2 GiB without a zero, from tmpfs over loopback TCP to nbdkit's file plugin on
tmpfs, by nbdferry and by nbdcopy with as many connections. Each finds a new, sparse file there.
nbdferry's time ends with the commit of the pivot, nbdcopy's with its exit after the flush; both begin
with the start of the command.
"""
import resource
import time

import ferry
from measure import GIB, Nbdkit, Result, Serve, cpu_seconds, in_turn, say, sparse_file, write_disk

SIZE = 2 * GIB


def by_nbdferry(scratch, source, uri):
    serve = Serve(scratch, source)
    before = cpu_seconds(serve.process.pid)
    seconds = serve.migrate_and_pivot(uri, 120)
    ferry.check(seconds is not None, "the copy did not end")
    cpu = cpu_seconds(serve.process.pid) - before
    serve.stop()
    return seconds, cpu


def by_nbdcopy(_, source, uri):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.monotonic()
    ferry.run_ok(["nbdcopy", "--connections=4", "--flush", source, uri], 120)
    seconds = time.monotonic() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


CONTENDERS = {"nbdferry": by_nbdferry, "nbdcopy": by_nbdcopy}


def one_run(scratch, source, run):
    """{contender: (seconds, its processor time, nbdkit's)}"""
    out = {}
    for name in in_turn(CONTENDERS, run):
        image = sparse_file(scratch.file("target.img"), SIZE)
        target = Nbdkit(scratch, "file", image)
        before = cpu_seconds(target.process.pid)
        seconds, cpu = CONTENDERS[name](scratch, source, target.uri)
        out[name] = seconds, cpu, cpu_seconds(target.process.pid) - before
        target.stop()
        ferry.same(source, image, f"{name}'s copy")
    return out


def bench(runs):
    rows = []
    with ferry.Scratch() as scratch:
        source = write_disk(scratch.file("source.img"), SIZE)
        for run in range(runs):
            row = one_run(scratch, source, run)
            rows.append(row)
            say(f"copy {run + 1}/{runs}: " + ", ".join(
                f"{name} {s:.2f} s ({SIZE / s / 1e6:.0f} MB/s, CPU {cpu:.2f} s, nbdkit {kit:.2f} s)"
                for name, (s, cpu, kit) in sorted(row.items())))

    def ratios(a, b):
        return [a(row) / b(row) for row in rows]

    yield Result("copy", "nbdferry's speed to nbdcopy's", ratios(
        lambda r: r["nbdcopy"][0], lambda r: r["nbdferry"][0]), at_least=1.0)
    yield Result("copy", "processor time of nbdferry to nbdcopy's", ratios(
        lambda r: r["nbdferry"][1], lambda r: r["nbdcopy"][1]))
    for name in CONTENDERS:
        yield Result("copy", f"{name}'s speed", [SIZE / row[name][0] / 1e6 for row in rows], "MB/s")
