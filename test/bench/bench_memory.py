"""Memory, and how soon a large disk serves.

 - The peak of serve's resident memory in a migration whose buffer is full: in sync, then a guest
   that writes as fast as it can, to a target that is slow; what overflows is copied again. Once
   with small writes of many sizes; once with large ones beside a client that takes no replies.
 - A disk of 16 TiB, sparse: from the start of `serve` to the first read that is answered, and a
   migration to nbdkit's memory plugin under 2,000 random writes a second, committed by pivot.
"""
import os
import socket
import struct
import subprocess
import threading
import time

import ferry
from measure import (GIB, MIB, Nbdkit, Result, Serve, forget, peak_memory_bytes, say,
                     sparse_file, write_disk)

TIB = 1024 * GIB
BUFFER = 64 * MIB  # the default of --buffer
SMALL = 512 * MIB
LARGE = 16 * TIB


def allowed_bytes(size):
    return 64 * MIB + 32 * MIB * size // TIB + BUFFER


class Greedy:
    """Writes 1 MiB at a time, 64 in flight; another connection asks for reads and takes none."""

    def __init__(self, _scratch, serve, _source):
        self.ended = False
        self.writer, self.answers = connect(serve.socket)
        self.reader, _ = connect(serve.socket)
        for i in range(200):
            self.reader.sendall(request(0, i, i * MIB, MIB))
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()

    def _write(self):
        data, sent = os.urandom(MIB), 0
        while not self.ended:
            self.writer.sendall(request(1, sent, sent * MIB % SMALL, MIB) + data)
            sent += 1
            if sent > 64:
                self.answers.read(16)

    def end(self):
        self.ended = True
        self.thread.join()
        for s in self.reader, self.writer:
            s.close()


def many_sizes(scratch, serve, source):
    return ferry.Load(scratch, serve.uri, source, "--depth", "64")


def full_buffer(scratch, load):
    """Peak resident bytes."""
    source = write_disk(scratch.file("source.img"), SMALL)
    target = Nbdkit(scratch, "--filter=rate", "file",
                    sparse_file(scratch.file("target.img"), SMALL), "rate=200M")
    serve = Serve(scratch, source)
    # Mode auto and pacing would see to it that it does not get full.
    serve.command("migrate", "--wait", "--mode", "async", "--max-delay", "0ms", target.uri)
    guest = load(scratch, serve, source)
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


def connect(path):
    """Handshake by EXPORT_NAME: replies are simple ones."""
    s = socket.socket(socket.AF_UNIX)
    s.connect(path)
    answers = s.makefile("rb")
    answers.read(18)
    s.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 0))
    answers.read(10)
    return s, answers


def request(command, cookie, offset, length):
    return struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, offset, length)


def first_read(path):
    """Connects, and reads a block."""
    s, answers = connect(path)
    with s, answers:
        s.sendall(request(0, 1, LARGE // 2, 4096))
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
        ferry.NBD_LOAD, "--uri", serve.uri, "--shadow", sparse_file(scratch.file("shadow"), LARGE),
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
    peaks, serves, large = {"small writes": [], "greedy": []}, [], []
    for run in range(runs):
        for name, load in (("small writes", many_sizes), ("greedy", Greedy)):
            with ferry.Scratch() as scratch:
                peaks[name].append(full_buffer(scratch, load))
            say(f"memory {run + 1}/{runs}: {peaks[name][-1] / MIB:.0f} MiB with a full buffer, "
                f"{name} (of {allowed_bytes(SMALL) / MIB:.0f})")
        with ferry.Scratch() as scratch:
            disk = sparse_file(scratch.file("large.img"), LARGE)
            serves.append(time_to_serve(scratch, disk))
            large.append(migrate_large(scratch, disk))
            say(f"memory {run + 1}/{runs}: 16 TiB: serves after {serves[-1] * 1000:.0f} ms, "
                f"migrated in {large[-1][0]:.2f} s, {large[-1][1] / MIB:.0f} MiB "
                f"(of {allowed_bytes(LARGE) / MIB:.0f})")
    for name, of_load in peaks.items():
        yield Result("memory", f"full buffer, {name}: peak to what is allowed",
                     [peak / allowed_bytes(SMALL) for peak in of_load], at_most=1.0)
        yield Result("memory", f"full buffer, {name}: peak", [p / MIB for p in of_load], "MiB")
    yield Result("memory", "16 TiB: start of serve to first answer", serves, "s", at_most=1.0)
    yield Result("memory", "16 TiB: migrate to commit, under load", [s for s, _ in large], "s")
    yield Result("memory", "16 TiB: peak to what is allowed",
                 [peak / allowed_bytes(LARGE) for _, peak in large], at_most=1.0)
    yield Result("memory", "16 TiB: peak", [peak / MIB for _, peak in large], "MiB")
