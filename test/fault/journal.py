"""A pivoted disk and its target die together: what was acknowledged is there afterwards. Cases of
switchover.py.

The target is nbdkit with a cache that is written to its disk by a flush only: killed, it has lost the rest,
as a host that loses power has.
"""
import contextlib
import os
import pathlib
import types

import ferry
import nbd
import switchover
import witness
from ferry import check, wait_until
from guest import BLOCK, FLUSH, READ, WRITE


class Volatile:
    def __init__(self, world):
        self.world, self.name = world, "volatile"
        self.disk, self.socket = (str(world.folder / f"volatile.{end}") for end in ("img", "sock"))
        pathlib.Path(self.disk).write_bytes(bytes(switchover.SIZE))
        self.start()

    def start(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket)
        self.process = self.world.scratch.start(
            "volatile", ["nbdkit", "-f", "-U", self.socket, "--filter=cache", "file", self.disk])
        wait_until(lambda: ferry.accepts(self.socket), "nbdkit")

    def kill(self):
        self.process.kill()
        self.process.wait()


class Writer(witness.Witness):
    """It never flushes."""

    def request(self, command, *more):
        return (0, b"") if command == FLUSH else super().request(command, *more)


def ask(host, command, offset=0, length=0, data=b""):
    """One request; a client that flushes when it ends would spoil it."""
    connection, _size = nbd.dial(host.ferry.socket, 20)
    with connection:
        connection.sendall(nbd.request(command, 1, offset, length, data))
        reply = nbd.receive(connection, 16)
        check(reply[4:8] == bytes(4), f"the request failed: {reply}")
        return nbd.receive(connection, length) if command == READ else b""


def pivoted(world):
    target = Volatile(world)
    world.relay = witness.Relay(target.socket)
    world.source.start()
    half = switchover.SIZE // 2
    world.guests = [Writer(world.source.ferry.socket, world.contents, 65536, half, 1),
                    Writer(world.source.ferry.socket, world.contents, half, switchover.SIZE, 2)]
    world.begin()
    world.migrate()
    world.repeat(world.source, "switch", "--pivot")
    wait_for_writes(world, 60)
    return target


def wait_for_writes(world, count):
    before = sum(one.acknowledged for one in world.guests)
    wait_until(lambda: world.written(before + count), "the guests' writes")


def both_die(world, target, order):
    """And come back; between that nobody flushes."""
    for name in order:
        (world.source if name == "source" else target).kill()
    world.end()
    target.start()
    world.source.start()
    check("has not flushed is lost" not in world.source.log(), world.source.log())
    world.begin()


def all_there(world, target):
    """Through the source, and, once flushed, on the target's medium."""
    world.end()
    copy = types.SimpleNamespace(name="through the source", disk=str(world.folder / "copy.img"))
    ferry.run_ok(["nbdcopy", world.source.ferry.uri, copy.disk])
    world.same(copy)
    ask(world.source, FLUSH)
    target.kill()
    world.same(target)


def dies_with_its_target(world, order):
    target = pivoted(world)
    both_die(world, target, order)
    all_there(world, target)


def again_and_again(world):
    target = pivoted(world)
    for order in (("source", "target"), ("target", "source"), ("source",), ("target", "source")):
        both_die(world, target, order)
        wait_for_writes(world, 20)
    all_there(world, target)


def in_the_quarantine(world):
    """The target was lost with requests unanswered, and both die before these can't land any more."""
    target = pivoted(world)
    world.relay.cut()
    world.relay.open()
    wait_for_writes(world, 20)
    both_die(world, target, ("source", "target"))
    wait_until(lambda: world.source.ferry.status()["suspects"] == 0, "the quarantine's end")
    all_there(world, target)


def stops_in_order(world):
    """An upgrade: everything is flushed, nothing is left to write again, nor much memory taken."""
    target = pivoted(world)
    world.source.ferry.stop()
    world.end()
    (state,) = pathlib.Path(world.state).glob("*.state")
    check(state.stat().st_size < ferry.MIB, f"it takes {state.stat().st_size} bytes")
    target.kill()
    world.same(target)
    target.start()
    world.source.start()
    world.begin()
    all_there(world, target)


def an_old_journal(world):
    """It lies where an earlier process kept it; others have written since."""
    pivoted(world)
    world.end()
    for byte, options in ((1, ()), (2, ("--state", str(world.folder / "another-state"))), (3, ()),
                          (4, ("--state", "/proc/nbdferry")), (5, ())):
        world.source.kill()
        world.source.start(*options)
        if byte > 1:
            got = ask(world.source, READ, 0, BLOCK)
            check(got == bytes([byte - 1]) * BLOCK, f"life {byte} reads {got[:1]}")
        ask(world.source, WRITE, 0, BLOCK, bytes([byte]) * BLOCK)


CASES = {
    "source, then target": lambda w: dies_with_its_target(w, ("source", "target")),
    "target, then source": lambda w: dies_with_its_target(w, ("target", "source")),
    "again and again": again_and_again,
    "in the quarantine": in_the_quarantine,
    "stops in order": stops_in_order,
    "an old journal": an_old_journal,
}
