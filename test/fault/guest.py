"""A guest that expects errors: it writes, zeroes and reads at random, one request at a time, notes which
errors it got, and keeps a shadow. What a failed write has left is read, since it may be anything."""
import contextlib
import errno
import random
import struct
import threading
import time

import nbd
from ferry import check

READ, WRITE, ZEROES, FLUSH = 0, 1, 6, 3
NAMES = {READ: "read", WRITE: "write", ZEROES: "zero", FLUSH: "flush"}
BLOCK = 4096


class Guest:
    def __init__(self, path, shadow, rate=150, loses=False, seed=1):
        """`loses`: a disk that acknowledges what it then loses: nothing is known of what was written."""
        self.loses = loses
        self.shadow, self.pause, self.dice = bytearray(shadow), 1 / rate, random.Random(seed)
        self.errors = {}      # (command, errno's name): how often
        self.unknown = set()  # blocks of which it isn't known what they hold
        self.wrong = []
        self.writes, self.longest = 0, 0.0
        self.released = self.over = False
        self.socket, size = nbd.dial(path, 20)
        check(size == len(shadow), "the shadow is as large as the disk")
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def receive(self, length):
        return nbd.receive(self.socket, length)

    def request(self, command, offset=0, length=0, data=b""):
        """(error, what was read); waits for the answer."""
        begun = time.monotonic()
        self.socket.sendall(nbd.request(command, 7, offset, length, data))
        _magic, error, _cookie = struct.unpack(">IIQ", self.receive(16))
        got = self.receive(length) if command == READ and error == 0 else b""
        self.longest = max(self.longest, time.monotonic() - begun)
        if error == 108:
            self.released = True
        elif error:
            key = (NAMES[command], errno.errorcode.get(error, str(error)))
            self.errors[key] = self.errors.get(key, 0) + 1
        return error, got

    def run(self):
        try:
            while not self.over and not self.released:
                self.step()
                time.sleep(self.pause)
        except (OSError, struct.error) as error:
            self.wrong.append(f"the guest's connection: {error!r}")

    def step(self):
        length = BLOCK * self.dice.randrange(1, 9)
        offset = BLOCK * self.dice.randrange(0, (len(self.shadow) - length) // BLOCK + 1)
        command = self.dice.choices([WRITE, ZEROES, READ, FLUSH], [60, 10, 28, 2])[0]
        end = offset + length
        blocks = range(offset // BLOCK, end // BLOCK)
        if command == FLUSH:
            self.request(FLUSH)
        elif command == READ:
            error, got = self.request(READ, offset, length)
            if not error:
                self.compare(offset, got)
        else:
            data = self.dice.randbytes(length) if command == WRITE else bytes(length)
            error, _ = self.request(command, offset, length, data if command == WRITE else b"")
            self.writes += 1
            if self.loses:
                self.unknown.update(blocks)
            elif not error:
                self.shadow[offset:end] = data
                self.unknown.difference_update(blocks)
            elif not self.released:
                self.unknown.update(blocks)
                self.resolve(blocks)

    def compare(self, offset, got):
        for at in range(0, len(got), BLOCK):
            where = offset + at
            if where // BLOCK in self.unknown:
                continue
            if got[at:at + BLOCK] != self.shadow[where:where + BLOCK]:
                self.wrong.append(f"the disk differs at byte {where}")

    def resolve(self, blocks):
        for block in list(blocks):
            error, got = self.request(READ, block * BLOCK, BLOCK)
            if not error:
                self.shadow[block * BLOCK:(block + 1) * BLOCK] = got
                self.unknown.discard(block)

    def end(self):
        self.over = True
        self.thread.join(timeout=20)
        check(not self.thread.is_alive(), "the guest hangs")
        with contextlib.suppress(OSError):
            self.socket.close()
        check(not self.wrong, f"{self.wrong[:5]}")
