"""Memory, and how soon a large disk serves.

 - The peak of serve's resident memory in a migration whose buffer is full: in sync, then a guest
   that writes as fast as it can, to a target that is slow; what overflows is copied again.
 - A disk of 16 TiB, sparse: from the start of `serve` to the first read that is answered, and a
   migration to nbdkit's memory plugin under 2,000 random writes a second, committed by pivot.
"""
import socket
import struct
import subprocess
import time

import ferry
from measure import (GIB, MIB, Nbdkit, Result, Serve, forget, fresh_target, peak_memory_bytes, say,
                     write_disk)

TIB = 1024 * GIB
BUFFER = 64 * MIB  # the default of --buffer
SMALL = 512 * MIB
LARGE = 16 * TIB


def allowed_bytes(size):
    return 64 * MIB + 32 * MIB * size // TIB + BUFFER


def full_buffer(scratch):
    """Peak resident bytes."""
    source = write_disk(scratch.file("source.img"), SMALL)
    target = Nbdkit(scratch, "--filter=rate", "file",
                    fresh_target(scratch.file("target.img"), SMALL), "rate=800M")
    serve = Serve(scratch, source)
    serve.command("migrate", "--wait", target.uri)
    guest = ferry.Load(scratch, serve.uri, source, "--depth", "64")
    fullest = 0
    for _ in range(40):
        time.sleep(0.2)
        fullest = max(fullest, serve.status()["buffered_bytes"])
    peak = peak_memory_bytes(serve.process.pid)
    serve.command("cancel")
    guest.end()
    serve.stop()
    target.stop()
    ferry.check(fullest > BUFFER / 2, f"the buffer held {fullest} bytes at most: it was not tried")
    return peak


def first_read(path):
    """Connects, and reads a block: handshake by EXPORT_NAME, simple reply."""
    with socket.socket(socket.AF_UNIX) as s, s.makefile("rb") as answers:
        s.connect(path)
        answers.read(18)
        s.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 0))
        answers.read(10)
        s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, LARGE // 2, 4096))
        ferry.check(answers.read(16 + 4096) == struct.pack(">IIQ", 0x67446698, 0, 1) + bytes(4096),
                    "the first read was not answered")


def time_to_serve(scratch, disk):
    forget(disk)
    begin = time.monotonic()
    process = scratch.start("early", [ferry.NBDFERRY, "serve", disk])
    while True:
        try:
            first_read(disk + ".sock")
            break
        except (FileNotFoundError, ConnectionRefusedError):
            ferry.check(process.poll() is None and time.monotonic() - begin < 30, "it never served")
            time.sleep(0.001)
    seconds = time.monotonic() - begin
    ferry.check(scratch.stop(process) == 0, "nbdferry serve failed")
    return seconds


def migrate_large(scratch, disk):
    """Seconds to the commit, and peak resident bytes."""
    target = Nbdkit(scratch, "memory", str(LARGE))
    serve = Serve(scratch, disk)
    guest = scratch.start("guest", [
        ferry.NBD_LOAD, "--uri", serve.uri, "--shadow", fresh_target(scratch.file("shadow"), LARGE),
        "--rate", "2000", "--bytes", "4096"], stdout=subprocess.DEVNULL)
    time.sleep(1)
    seconds = serve.migrate_and_pivot(target.uri, 120)
    peak = peak_memory_bytes(serve.process.pid)
    ferry.check(seconds, f"not committed within two minutes: {serve.status()}")
    time.sleep(0.5)
    ferry.check(scratch.stop(guest) == 0, "the guest saw errors: " + scratch.log("guest"))
    serve.stop()
    target.stop()
    return seconds, peak


def bench(runs):
    peaks, serves, large = [], [], []
    for run in range(runs):
        with ferry.Scratch() as scratch:
            peaks.append(full_buffer(scratch))
        say(f"memory {run + 1}/{runs}: {peaks[-1] / MIB:.0f} MiB with a full buffer "
            f"(of {allowed_bytes(SMALL) / MIB:.0f})")
        with ferry.Scratch() as scratch:
            disk = fresh_target(scratch.file("large.img"), LARGE)
            serves.append(time_to_serve(scratch, disk))
            large.append(migrate_large(scratch, disk))
            say(f"memory {run + 1}/{runs}: 16 TiB: serves after {serves[-1] * 1000:.0f} ms, "
                f"migrated in {large[-1][0]:.2f} s, {large[-1][1] / MIB:.0f} MiB "
                f"(of {allowed_bytes(LARGE) / MIB:.0f})")
    yield Result("memory", "full buffer: peak to what is allowed",
                 [peak / allowed_bytes(SMALL) for peak in peaks], at_most=1.0)
    yield Result("memory", "full buffer: peak", [peak / MIB for peak in peaks], "MiB")
    yield Result("memory", "16 TiB: start of serve to first answer", serves, "s", at_most=1.0)
    yield Result("memory", "16 TiB: migrate to commit, under load", [s for s, _ in large], "s")
    yield Result("memory", "16 TiB: peak to what is allowed",
                 [peak / allowed_bytes(LARGE) for _, peak in large], at_most=1.0)
    yield Result("memory", "16 TiB: peak", [peak / MIB for _, peak in large], "MiB")
