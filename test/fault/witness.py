"""Guests that survive their server: each writes and reads its own part of the disk, one request at a time,
knows what was acknowledged, and of a request that a kill left unanswered both things that may have come
of it. And a TCP relay that is the path to a target."""
import contextlib
import random
import socket
import struct
import threading
import time

import guest
import nbd
from ferry import check
from guest import BLOCK, FLUSH, READ, WRITE

SECTOR = 512
ESHUTDOWN = 108


class Witness(guest.Guest):
    def __init__(self, path, disk, low, high, seed):  # another start than a plain guest's
        self.path, self.shadow, self.low, self.high = path, disk, low, high
        self.dice, self.pause = random.Random(seed), 1 / 150
        self.errors, self.wrong, self.maybe = {}, [], {}  # maybe: block -> what it may hold instead
        self.acknowledged, self.longest = 0, 0.0
        self.released = self.over = False
        self.thread = None

    def connect(self):
        self.released = self.over = False
        self.socket, _size = nbd.dial(self.path, 30)

    def begin(self):
        """Goes on, perhaps after the server's end: what was left open is looked at first."""
        self.connect()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        with contextlib.suppress(OSError, struct.error):  # killed: what is open is noted
            self.settle()
            while not self.over and not self.released:
                self.step()
                time.sleep(self.pause)
        self.socket.close()

    def settle(self):
        for block in sorted(self.maybe):
            error, got = self.request(READ, block * BLOCK, BLOCK)
            if not error:
                self.judge(block, got)
                self.shadow[block * BLOCK:(block + 1) * BLOCK] = got
                del self.maybe[block]

    def step(self):
        length = BLOCK * self.dice.randrange(1, 9)
        offset = self.low + BLOCK * self.dice.randrange((self.high - self.low - length) // BLOCK + 1)
        command = self.dice.choices([WRITE, READ, FLUSH], [70, 27, 3])[0]
        blocks = range(offset // BLOCK, (offset + length) // BLOCK)
        if command == FLUSH:
            self.request(FLUSH)
        elif command == READ:
            error, got = self.request(READ, offset, length)
            for number, block in enumerate(blocks if not error else ()):
                self.judge(block, got[number * BLOCK:(number + 1) * BLOCK])
        else:
            data = self.dice.randbytes(length)
            for number, block in enumerate(blocks):
                self.maybe[block] = data[number * BLOCK:(number + 1) * BLOCK]
            error, _ = self.request(WRITE, offset, length, data)
            if not error:
                self.shadow[offset:offset + length] = data
                self.acknowledged += 1
            if not error or error == ESHUTDOWN:
                for block in blocks:
                    del self.maybe[block]

    def judge(self, block, got):
        """Sector by sector: what was told, or what is open."""
        told = self.shadow[block * BLOCK:(block + 1) * BLOCK]
        if got == told:
            return
        other = self.maybe.get(block, told)
        for at in range(0, BLOCK, SECTOR):
            part = slice(at, at + SECTOR)
            if got[part] not in (told[part], other[part]):
                self.wrong.append(f"the disk differs at byte {block * BLOCK + at}")

    def end(self):
        """None may hang, see a wrong byte, or an error other than the release."""
        self.over = True
        if self.thread is not None:
            self.thread.join(timeout=30)
            check(not self.thread.is_alive(), "a guest hangs")
        check(not self.wrong, f"{self.wrong[:5]}")
        check(not self.errors, f"errors that no guest should see: {self.errors}")


class Relay:
    """127.0.0.1:port to a unix socket. cut(): everything is reset and nobody answers, until open()."""

    def __init__(self, path):
        self.path, self.port, self.pairs, self.listener = path, 0, [], None
        self.lock = threading.Lock()
        self.open()

    def open(self):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(16)
        self.port, self.listener = listener.getsockname()[1], listener
        threading.Thread(target=self.accept, args=(listener,), daemon=True).start()

    def accept(self, listener):
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(self.path)
            except OSError:
                near.close()
                continue
            with self.lock:
                if listener is not self.listener:
                    near.close()
                    far.close()
                    return
                self.pairs.append((near, far))
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=(a, b), daemon=True).start()

    @staticmethod
    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        with self.lock:
            listener, self.listener = self.listener, None
            pairs, self.pairs = self.pairs, []
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            listener.close()
        for near, far in pairs:
            with contextlib.suppress(OSError):
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for end in (near, far):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
