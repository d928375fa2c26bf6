#!/usr/bin/env python3
"""No zombie write (DESIGN.md, rule 8): what was on its way to a target when its connection ended arrives
late, and the guest has written there since. In the end the target holds what the guest wrote last.

usage: zombie.py [CASE]...

Each case that a quarantine covers runs once more without one: then the target must end up wrong, or the
case would prove nothing.

 - server: the connection of a write is reset, and the server does that write 0.7 s later
 - socket: nbdferry is killed while a relay on the way does not read. Its kernel drops what it has not sent;
   what the relay's kernel has taken in arrives, after the next nbdferry has sent that again
 - fence: the same with a nbdferry as target. It lets go of old connections when it learns of a newer life
   of the source: no quarantine is needed, and nothing arrives
"""
import concurrent.futures
import contextlib
import functools
import os
import pathlib
import random
import socket
import sys
import threading
import time
import types

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "interop"))
sys.dont_write_bytecode = True
import ferry  # noqa: E402
import nbd  # noqa: E402
import sandbox  # noqa: E402
import servers  # noqa: E402
import witness  # noqa: E402
from ferry import MIB, check, wait_until  # noqa: E402

SIZE = 16 * MIB
QUARANTINE, NONE = "3s", "0s"
WRITE = 1
TRIES = 3  # of what must go wrong: a machine that stands still may be too late for it


class Relay(witness.Relay):
    """hold(): it stops reading what comes by the connections there are; let_go(): it goes on."""
    # Of its kernel, for what it has not read; Linux takes it twice. Two writes of the copier fit in.
    buffer_bytes = 208 * 1024

    def __init__(self, path):
        self.gate, self.held = threading.Event(), threading.Event()
        self.gate.set()
        self.pumps, self.late_bytes, self.late_sent = [], 0, 0
        super().__init__(path)

    def open(self):
        super().open()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.buffer_bytes)

    def hold(self):
        self.held, self.gate = self.gate, threading.Event()
        self.held.clear()
        self.gate.set()

    def let_go(self):
        """Returns when all of it has gone on, or could not."""
        self.held.set()
        for thread, gate in list(self.pumps):
            if gate is self.held:
                thread.join(timeout=20)
                check(not thread.is_alive(), "a held connection has not ended")

    def pump(self, source, sink):
        gate = self.gate
        self.pumps.append((threading.current_thread(), gate))
        up = sink.family == socket.AF_UNIX
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                gate.wait()
                late = len(data) if up and gate is self.held else 0
                self.late_bytes += late
                sink.sendall(data)
                self.late_sent += late
        # Not the source: an answer that nobody takes any more must not stop what is late.
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


class World:
    """A disk of random data, and a guest that overwrites all of it."""

    def __init__(self, scratch, name):
        self.scratch, self.size = scratch, SIZE
        self.source, self.image = scratch.file("source.img"), scratch.garbage("target.img", SIZE)
        self.dice = random.Random(name)
        pathlib.Path(self.source).write_bytes(self.dice.randbytes(SIZE))
        self.lives = 0
        self.disk = None

    def serve(self):
        self.lives += 1
        self.disk = ferry.Ferry(self.scratch, self.source, "--state", self.scratch.file("state"),
                                name=f"ferry{self.lives}")

    def kill(self):
        self.disk.process.kill()
        self.disk.process.wait()

    def migrate(self, uri, quarantine, *options):
        self.disk.ok("migrate", "--trust-target", "--quarantine", quarantine, *options, uri)

    def overwrite(self):
        self.contents = self.dice.randbytes(SIZE)
        connection, _size = nbd.dial(self.disk.socket, 20)
        with connection:
            for at in range(0, SIZE, MIB):
                connection.sendall(nbd.request(WRITE, 1, at, MIB, self.contents[at:at + MIB]))
                check(nbd.receive(connection, 16)[4:8] == bytes(4), "the guest saw an error")

    def wait_for(self, condition, what):
        wait_until(lambda: condition(self.disk.status()), what)

    def all_but_suspects(self):
        """The target has everything that it may get already."""
        self.wait_for(lambda s: s["stale_bytes"] + s["copying_bytes"] + s["buffered_bytes"] <=
                      s["suspects"] and s["phase"] in ("copying", "in_sync"), "all but the suspects")

    def right(self):
        """Once released: is the target what the guest wrote?"""
        self.wait_for(lambda s: s["in_sync"], "in sync")
        self.disk.ok("switch", "--release")
        self.disk.stop()
        check(pathlib.Path(self.source).read_bytes() == self.contents, "the source")
        return pathlib.Path(self.image).read_bytes() == self.contents


def server(world, quarantine):
    target = servers.scripted("write:zombie:1:4")(world)
    world.serve()
    world.migrate(target.uri, quarantine, "--answer-timeout", "1s")
    servers.wait_until_fired(target)
    world.overwrite()
    wait_until(lambda: target.count("zombie"), "the late write")
    return world.right(), "done 0.7 s after its connection's end"


def killed(world, path, quarantine):
    """Until the relay has let go."""
    relay = Relay(path)
    world.serve()
    world.migrate(f"nbd://127.0.0.1:{relay.port}/", quarantine, "--connections", "1", "--bandwidth", "8M")
    world.wait_for(lambda s: s["copied_bytes"] > 2 * MIB, "some of it is copied")
    relay.hold()
    world.disk.ok("set", "--bandwidth", "0")
    time.sleep(0.3)
    under_way = world.disk.status()["copying_bytes"]
    world.kill()
    world.serve()
    world.overwrite()
    world.all_but_suspects()
    suspects = world.disk.status()["suspects"]
    relay.let_go()
    return relay, types.SimpleNamespace(under_way=under_way, suspects=suspects)


def socket_(world, quarantine):
    target = ferry.qemu_nbd(world.scratch, world.image)
    relay, seen = killed(world, target.split("socket=")[1], quarantine)
    check(0 < relay.late_sent, "nothing came late: that proves nothing")
    check(relay.late_bytes <= 3 * Relay.buffer_bytes < seen.under_way,
          f"{relay.late_bytes} bytes came late of {seen.under_way}: more than the relay's kernel had")
    check(quarantine == NONE or seen.suspects > 0, "suspects")
    return world.right(), (f"{relay.late_sent} bytes came late of {seen.under_way} under way, "
                           f"{seen.suspects} were suspects")


def fence(world, quarantine):
    os.unlink(world.image)
    target = ferry.Ferry(world.scratch, world.image, "--incoming", "--create", str(SIZE), "--state",
                         world.scratch.file("state"), name="target")
    relay, seen = killed(world, target.socket, quarantine)
    check(seen.suspects == 0, "the fence makes the quarantine needless")
    check(relay.late_sent == 0 < relay.late_bytes, f"{relay.late_sent} bytes got past the fence")
    right = world.right()
    target.ok("promote")
    target.stop()
    return right, f"{relay.late_bytes} bytes came late, to a closed door"


# name: (what happens, quarantine, is the target right?)
CASES = {
    "server": (server, QUARANTINE, True),
    "server, without a quarantine": (server, NONE, False),
    "socket": (socket_, QUARANTINE, True),
    "socket, without a quarantine": (socket_, NONE, False),
    "fence": (fence, "600s", True),
}


def run_case(name):
    case, quarantine, wanted = CASES[name]
    begun = time.monotonic()
    for _ in range(1 if wanted else TRIES):
        with ferry.Scratch() as scratch:
            right, text = case(World(scratch, name), quarantine)
        if right == wanted:
            break
    check(right == wanted, f"the target is {'right' if right else 'wrong'}: {text}")
    return f"{text}; {time.monotonic() - begun:.1f} s"


def main(*names):
    sandbox.enter()
    names = names or CASES
    failed = []
    with concurrent.futures.ThreadPoolExecutor(len(CASES)) as pool:
        runs = {name: pool.submit(functools.partial(run_case, name)) for name in names}
        for name, run in runs.items():
            try:
                print(f"{name}: {run.result()}", flush=True)
            except Exception as error:  # the other cases go on
                failed.append(name)
                print(f"{name}: FAILED: {error!r}", flush=True)
    check(not failed, f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
