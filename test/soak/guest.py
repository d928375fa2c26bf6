"""A guest that outlives its server, and knows what its disk may hold.

What must hold: each 4 KiB block has a list of versions that a read may find: the last acknowledged
write, and any later one that was never answered. Requests in flight never overlap. When the
connection breaks, the guest connects again and sends again what was unanswered, in the old order,
as QEMU does; after a kill it gives up some of it instead, as a program that died with its machine
would. A read that finds one of several versions settles the matter: the others must never be seen
again.

A request that is answered ESHUTDOWN has not been done: the disk has been released, and the guest
waits until it is told where to go on. Every other error is a finding.
"""
import collections
import contextlib
import random
import select
import socket
import struct
import threading
import time

import nbd
from ferry import check, wait_until

READ, WRITE, FLUSH, TRIM, ZEROES = 0, 1, 3, 4, 6
NAMES = {READ: "read", WRITE: "write", FLUSH: "flush", TRIM: "trim", ZEROES: "zero"}
FUA, ESHUTDOWN = 1, 108
BLOCK, SECTOR = 4096, 512
DEPTH = 8
ANSWER_SECONDS = 45  # longer than whatever the soak does, --reconnect-delay included
ZERO = bytes(BLOCK)
POOL = random.Random(1).randbytes(64 * 1024 + BLOCK)


class Slot:
    def __init__(self, command, offset=0, length=0):
        self.command, self.offset, self.length = command, offset, length
        self.blocks = range(offset // BLOCK, -(-(offset + length) // BLOCK))
        self.data, self.flags, self.version, self.flush = b"", 0, None, None
        self.since = time.monotonic()

    def writes(self):
        return self.command in (WRITE, TRIM, ZEROES)


class Guest:
    def __init__(self, size, seed, rate):
        self.size, self.rate, self.dice = size, rate, random.Random(seed)
        self.patched = {}  # version: content, where a write covered a part of a block
        self.last_version = 1
        self.known = [[0] for _ in range(size // BLOCK)]
        self.pending = collections.OrderedDict()  # cookie: slot, oldest first
        self.busy = set()  # their blocks
        self.cookie = 0
        self.place = self.socket = None
        self.quiet = self.over = self.gives_up = self.drop = False
        self.may_be_released = True  # else ESHUTDOWN is an error like any other
        self.flush_asked = self.flush_done = 0
        self.since_flush = 0
        self.longest = 0.0  # answer, on the connection that brought it
        self.next_due = time.monotonic()
        self.wrong = []
        self.counts = collections.Counter()
        self.thread = threading.Thread(target=self.run, daemon=True)

    # --- contents ---

    def content(self, block, version):
        if version == 0:
            return ZERO
        if version in self.patched:
            return self.patched[version]
        at = (version * 48 + block * 16) % (64 * 1024)
        return struct.pack("<QQ", block, version) + POOL[at:at + BLOCK - 16]

    def create(self, path):
        """What the disk holds at first: data, zeroes and holes, in 256 KiB pieces."""
        piece = 64
        with open(path, "wb") as f:
            f.truncate(self.size)
            for first in range(0, len(self.known), piece):
                what = self.dice.randrange(3)
                f.seek(first * BLOCK)
                for block in range(first, first + piece if what != 2 else first):
                    self.known[block] = [1 - what]
                    f.write(self.content(block, 1 - what))

    def check_block(self, block, got, allowed, where):
        for version in allowed:
            if got == self.content(block, version):
                return version
        found = "zeroes" if got == ZERO else "block %d version %d" % struct.unpack("<QQ", got[:16])
        self.wrong.append(f"{where}: block {block} (byte {block * BLOCK}) holds {found}, "
                          f"not version {allowed}; the last one is {self.last_version}")
        return None

    def compare(self, path, what):
        """The whole disk, while the guest is quiet or waits."""
        waiting = collections.defaultdict(list)
        for slot in list(self.pending.values()):
            for block in slot.blocks if slot.writes() else ():
                waiting[block].append(slot.version)
        with open(path, "rb") as f:
            for block, allowed in enumerate(self.known):
                self.check_block(block, f.read(BLOCK), allowed + waiting[block], what)
        self.check()

    # --- requests ---

    def choose(self):
        dice = self.dice
        command = dice.choices([READ, WRITE, ZEROES, TRIM], [25, 66, 6, 3])[0]
        for _ in range(20):
            # A fifth goes to a few blocks, again and again.
            end = 64 if dice.randrange(5) == 0 else len(self.known)
            first, count = dice.randrange(end), dice.randrange(1, 9)
            blocks = range(first, min(first + count, len(self.known)))
            if self.busy.isdisjoint(blocks):
                break
        else:
            return None
        slot = Slot(command, first * BLOCK, len(blocks) * BLOCK)
        if slot.writes():
            slot.flags = FUA if dice.randrange(20) == 0 else 0
            self.last_version += 1
            slot.version = self.last_version if command == WRITE else 0
        if command == WRITE and len(self.known[first]) == 1 and dice.randrange(5) == 0:
            self.patch(slot)
        elif command == WRITE:
            slot.data = b"".join(self.content(block, slot.version) for block in blocks)
        return slot

    def patch(self, slot):
        """Some sectors of the first block."""
        first = slot.blocks[0]
        begin = SECTOR * self.dice.randrange(8)
        end = SECTOR * self.dice.randrange(begin // SECTOR + 1, 9)
        old, new = self.content(first, self.known[first][0]), self.content(first, slot.version)
        self.patched[slot.version] = old[:begin] + new[begin:end] + old[end:]
        slot.blocks = range(first, first + 1)
        slot.offset, slot.length = first * BLOCK + begin, end - begin
        slot.data = new[begin:end]

    def issue(self):
        while len(self.pending) < DEPTH and time.monotonic() >= self.next_due:
            asked = self.flush_asked
            if asked > self.flush_done and not any(s.flush for s in self.pending.values()):
                slot = Slot(FLUSH)
                slot.flush = asked
            elif self.quiet:
                return
            elif self.since_flush >= 100:
                self.since_flush = 0
                slot = Slot(FLUSH)
            else:
                slot = self.choose()
            if slot is None:
                return
            self.next_due = max(self.next_due + 1 / self.rate, time.monotonic() - 0.05)
            self.since_flush += slot.writes()
            self.cookie += 1
            self.pending[self.cookie] = slot
            self.busy.update(slot.blocks)
            self.send(self.cookie, slot)

    def send(self, cookie, slot):
        self.socket.sendall(nbd.request(slot.command, cookie, slot.offset, slot.length, slot.data,
                                        slot.flags))

    def settle(self, cookie, data):
        slot = self.pending.pop(cookie)
        self.busy.difference_update(slot.blocks)
        self.counts[NAMES[slot.command]] += 1
        self.longest = max(self.longest, time.monotonic() - slot.since)
        if slot.flush:
            self.flush_done = slot.flush
        if slot.writes():
            self.counts["bytes"] += slot.length
            for block in slot.blocks:
                if slot.command == TRIM:  # zeroes, or nothing has changed; a read will tell
                    self.known[block].append(0)
                else:
                    self.now_holds(block, slot.version)
        elif slot.command == READ:
            for i, block in enumerate(slot.blocks):
                got = data[i * BLOCK:(i + 1) * BLOCK]
                version = self.check_block(block, got, self.known[block], "read")
                if version is not None:
                    self.now_holds(block, version)

    def now_holds(self, block, version):
        for old in self.known[block]:
            if old != version:
                self.patched.pop(old, None)
        self.known[block] = [version]

    # --- the connection ---

    def receive(self, length):
        return nbd.receive(self.socket, length)

    def connect(self):
        self.socket, size = nbd.dial(self.place, ANSWER_SECONDS)
        if size != self.size:
            self.wrong.append(f"the disk has {size} bytes now")
        self.counts["connections"] += 1
        for cookie, slot in self.pending.items():
            slot.since = time.monotonic()
            self.send(cookie, slot)

    def lost(self):
        if self.socket is not None:
            self.socket.close()
        self.socket = None
        if self.gives_up:
            self.gives_up = False
            for cookie, slot in list(self.pending.items()):
                if slot.writes() and self.dice.randrange(4) == 0:
                    del self.pending[cookie]
                    self.busy.difference_update(slot.blocks)
                    self.counts["given up"] += 1
                    for block in slot.blocks:
                        self.known[block].append(slot.version)

    def answer(self):
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        slot = self.pending.get(cookie)
        if magic != 0x67446698 or slot is None:
            raise ConnectionError(f"an answer that nobody waits for: {magic:#x} {cookie}")
        if error == ESHUTDOWN and self.may_be_released:
            self.place = None
            raise ConnectionError("released")
        if error:
            self.wrong.append(f"{NAMES[slot.command]} of {slot.length} bytes at {slot.offset}: "
                              f"error {error}")
            self.over = True
            return
        self.settle(cookie, self.receive(slot.length) if slot.command == READ else b"")

    def run(self):
        while not self.over:
            try:
                if self.place is None:
                    if self.socket is not None:
                        raise ConnectionError("told to wait")
                    time.sleep(0.01)
                    continue
                if self.socket is None:
                    self.connect()
                if self.drop:
                    self.drop = False
                    raise ConnectionError("told to")
                self.issue()
                for _ in range(DEPTH):
                    if not select.select([self.socket], [], [], 0.005)[0]:
                        break
                    self.answer()
            except TimeoutError as error:
                self.wrong.append(f"no answer in time: {error!r}")
            except OSError:
                self.lost()
                time.sleep(0.03)
            except Exception as error:  # the thread's end would go unnoticed
                self.wrong.append(f"the guest's own mistake: {error!r}")
                raise

    # --- for the soak's own thread ---

    def go_to(self, place):
        self.place = place

    def check(self):
        check(not self.wrong, "; ".join(self.wrong[:5]))
        check(self.over or self.thread.is_alive(), "the guest has ended")
        if self.place is not None and self.socket is not None:
            oldest = next(iter(list(self.pending.values())), None)
            check(oldest is None or time.monotonic() - oldest.since < ANSWER_SECONDS,
                  f"a {oldest and NAMES[oldest.command]} has waited for {ANSWER_SECONDS} s")

    def flush(self, tend):
        """A flush that is submitted after this call, answered."""
        self.flush_asked += 1
        asked = self.flush_asked
        wait_until(lambda: tend() or self.flush_done >= asked, "a flush of the guest's", 60)

    def drain(self, tend):
        self.quiet = True
        wait_until(lambda: tend() or not self.pending, "the guest's last answers", 60)

    def go_on(self):
        self.quiet = False

    def end(self):
        self.over = True
        self.thread.join(timeout=ANSWER_SECONDS)
        with contextlib.suppress(AttributeError, OSError):
            self.socket.close()
