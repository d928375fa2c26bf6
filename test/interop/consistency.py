#!/usr/bin/env python3
"""--consistency crash, for real: the source dies by SIGKILL in the middle of the mirroring, and the
target must hold what a power cut could have left of the guest's disk.

The guest keeps a ledger. In round i it writes i into some blocks, waits, flushes, and writes i into
block 0. So where block 0 says c, no block may be older than its last write of a round up to c."""
import os
import random
import signal
import socket
import struct
import time

import ferry
from ferry import MIB, check

BLOCK = 4096
BLOCKS = 64 * MIB // BLOCK
WRITES_PER_ROUND = 8
WRITE, FLUSH = 1, 3


class Guest:
    """The least of an NBD client that writes many blocks at once."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        check(self.receive(16) == b"NBDMAGICIHAVEOPT", "the server's greeting")
        self.receive(2)
        # Fixed newstyle, no zeroes; GO to the export "".
        self.socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 7, 6) + struct.pack(">IH", 0, 0))
        kind = None
        while kind != 1:  # ACK
            _, _, kind, length = struct.unpack(">QIII", self.receive(20))
            check(kind < 1 << 31, f"the server refuses: {kind:#x}")
            self.receive(length)

    def receive(self, length):
        data = b""
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def send(self, command, offset=0, data=b""):
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, command, 1, offset, len(data)) + data)

    def answers(self, count):
        for _ in range(count):
            _, error, _ = struct.unpack(">IIQ", self.receive(16))
            check(error == 0, f"the guest sees error {error}")


def stamp(number):
    return struct.pack("<Q", number) * (BLOCK // 8)


def numbers(image):
    """What each block of it says."""
    with open(image, "rb") as f:
        data = f.read()
    out = []
    for block in range(BLOCKS):
        values = set(struct.unpack_from("<512Q", data, block * BLOCK))
        check(len(values) == 1, f"block {block} is torn: {sorted(values)[:4]}")
        out.append(values.pop())
    return out


def play(scratch, life):
    """Returns how many rounds the target lacked, of those that the guest had finished."""
    image, target = scratch.file(f"source{life}.img"), scratch.file(f"target{life}.img")
    for path in (image, target):
        with open(path, "wb") as f:
            f.truncate(64 * MIB)
    disk = ferry.Ferry(scratch, image, name=f"ferry{life}")
    # Slow, so that many writes are on their way.
    uri = ferry.nbdkit(scratch, "--threads=16", "--filter=delay", "file", target, "wdelay=20ms",
                       name=f"target{life}")
    # The guest outruns the target by far, and the buffer holds all of it.
    disk.ok("migrate", "--wait", "--mode", "async", "--max-delay", "0ms", "--buffer", "512M",
            "--consistency", "crash", uri)
    ferry.wait_until(lambda: disk.status()["consistent"], "consistent")
    dice = random.Random(life)
    rounds = [dice.sample(range(1, BLOCKS), WRITES_PER_ROUND) for _ in range(4000)]  # blocks of each
    guest = Guest(f"{image}.sock")
    dies_at = time.monotonic() + 0.5 + 0.2 * life
    done = 0
    killed = False
    try:
        for number, blocks in enumerate(rounds, 1):
            if time.monotonic() > dies_at and not killed:
                status = disk.status()
                check(status["consistent"] and status["buffered_bytes"] > 0,
                      f"nothing is on its way: {status}")
                os.kill(disk.process.pid, signal.SIGKILL)
                killed = True
            for block in blocks:
                guest.send(WRITE, block * BLOCK, stamp(number))
            guest.answers(len(blocks))
            guest.send(FLUSH)
            guest.answers(1)
            guest.send(WRITE, 0, stamp(number))
            guest.answers(1)
            done = number
    except (OSError, EOFError):
        pass  # it has been killed
    check(killed, "the guest ended before its time")
    disk.process.wait()
    time.sleep(0.2)  # what had been sent may still be applied
    there = numbers(target)
    finished = there[0]
    last = [0] * BLOCKS
    for number, blocks in enumerate(rounds[:finished], 1):
        for block in blocks:
            last[block] = number
    wrong = [b for b in range(1, BLOCKS) if there[b] < last[b]]
    check(not wrong, f"the ledger says {finished}, but block {wrong[:1]} says "
                     f"{[there[b] for b in wrong[:1]]} instead of {[last[b] for b in wrong[:1]]}")
    check(0 < finished <= done + 1, f"the ledger says {finished} of {done}")
    return done - finished


def main():
    with ferry.Scratch() as scratch:
        lacking = [play(scratch, life) for life in range(5)]
        print("rounds that the target lacked:", lacking)
        check(max(lacking) > 0, "the target was never behind: nothing was tried")


main()
