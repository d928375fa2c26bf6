"""The front, without a migration: 4 KiB at random over a unix socket, in a warm page cache, by
raw_load, which checks every read. All servers are up at once and take turns; each has a file of its
own. Beside the rates: the server's processor time for a request, which a busy machine bends less.
"""
import json
import os
import subprocess

import ferry
from measure import MIB, Lines, Result, Serve, cpu_seconds, in_turn, say, write_disk

RAW_LOAD = os.environ["RAW_LOAD"]
SIZE = 256 * MIB
PHASES = ["read:32", "write:32", "read:1", "write:1"]
SECONDS = 0.7


def start_servers(scratch):
    """{name: (socket, pid)}"""
    image = {name: write_disk(scratch.file(name + ".img"), SIZE)
             for name in ("nbdferry", "qemu-nbd", "nbdkit")}
    serve = Serve(scratch, image["nbdferry"])
    out = {"nbdferry": (serve.socket, serve.process.pid)}
    for name, command in {
        # With 16 threads nbdkit may abort when its client leaves, and one is no slower here.
        "nbdkit": ["nbdkit", "-f", "-t", "1", "-U", scratch.file("nbdkit.sock"), "file",
                   image["nbdkit"]],
        "qemu-nbd": ["qemu-nbd", "-t", "-e", "16", "-f", "raw", "-x", "", "--cache=writeback",
                     "--aio=io_uring", "-k", scratch.file("qemu-nbd.sock"), image["qemu-nbd"]],
    }.items():
        process = scratch.start(name, command)
        path = scratch.file(name + ".sock")
        ferry.wait_until(lambda at=path: ferry.accepts(at), name)
        out[name] = path, process.pid
    return serve, out


def one_load(scratch, socket, pid, run):
    """{phase: (requests a second, p50 in microseconds, server's microseconds for a request)}"""
    load = scratch.start("raw_load", [
        RAW_LOAD, "--socket", socket, "--seconds", str(SECONDS), "--seed", str(run + 1),
        *PHASES], stdout=subprocess.PIPE, text=True)
    says = Lines(load.stdout)
    out = {}
    ferry.check(says.wait_for("fill", 30), "raw_load did not begin")
    before = cpu_seconds(pid)
    for phase in PHASES:
        got = says.wait_for(phase, 30)
        ferry.check(got, "raw_load did not end")
        after = cpu_seconds(pid)
        figures = json.loads(got[1])
        out[phase] = figures["iops"], figures["p50_us"], \
            (after - before) * 1e6 / figures["requests"]
        before = after
    ferry.check(load.wait(timeout=30) == 0, "raw_load failed: " + scratch.log("raw_load"))
    return out


def bench(runs):
    rows = []
    with ferry.Scratch() as scratch:
        serve, servers = start_servers(scratch)
        for run in range(runs):
            row = {name: one_load(scratch, *servers[name], run) for name in in_turn(servers, run)}
            rows.append(row)
            for name in servers:
                say(f"front {run + 1}/{runs}: {name:<8} " + ", ".join(
                    f"{phase} {iops / 1000:.0f}k/s {cpu:.1f} us" for phase, (iops, _, cpu)
                    in row[name].items()))
        serve.stop()
    for phase in PHASES:
        for peer in ("qemu-nbd", "nbdkit"):
            yield Result("front", f"{phase}: nbdferry's rate to {peer}'s", [
                row["nbdferry"][phase][0] / row[peer][phase][0] for row in rows])
            yield Result("front", f"{phase}: CPU per request to {peer}'s", [
                row["nbdferry"][phase][2] / row[peer][phase][2] for row in rows])
