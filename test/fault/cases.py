"""The lines of the fault matrix. What the outcomes mean, and what holds in all of them: matrix.py."""
import dataclasses
import os
from typing import Any, Callable

import servers
from servers import failing, filtered, scripted

LONG = os.environ.get("FAULT_LONG") == "1"
FROZEN_SECONDS = 30 if LONG else 5
HANG = {"--answer-timeout": "1s"}
SYNC = {"--mode": "sync"}


def nothing(_world):
    """The fault is in the server from the start."""


@dataclasses.dataclass
class Case:
    name: str
    server: Callable[[Any], Any]
    outcome: str       # recovers, refused, fails, persists, unswitchable: see matrix.py
    says: str = ""     # what the status (or `migrate`, if refused) has said
    options: dict = dataclasses.field(default_factory=dict)
    act: Callable[[Any], None] = nothing  # what happens once the migration runs
    rate: int = 150    # of the guest's requests a second
    bytes: int = 16384
    bound: float = 1.5  # seconds: the guest's longest request. Machines that do other things, too, stall
    needs_root: bool = False


# --- what happens to servers ----------------------------------------------------------------------

def when_copying(world):
    world.wait_for(lambda s: s["copied_bytes"] > 0, "some of the disk is copied")


def when_in_sync(world):
    world.wait_for(lambda s: s["in_sync"], "in sync")


def full_speed(world):
    world.disk.ok("set", "--bandwidth", "0")


def frozen(seconds, moment):
    def act(world):
        moment(world)
        world.server.freeze()
        world.pause(seconds)
        world.server.thaw()
        if moment is not nothing:
            full_speed(world)
    return act


def killed(seconds, moment, twice=False):
    def act(world):
        for _ in range(2 if twice else 1):
            moment(world)
            world.server.kill()
            world.wait_for(lambda s: s["phase"] == "interrupted", "interrupted")
            world.watch.must_not_be_in_sync = True
            world.pause(seconds)
            world.watch.must_not_be_in_sync = False
            world.server.start()
        full_speed(world)
    return act


def killed_pivoted(seconds):
    def act(world):
        world.server.kill()
        world.pause(seconds)
        world.server.start()
    return act


def failing_for(seconds, moment):
    def act(world):
        moment(world)
        world.server.fail()
        world.pause(seconds)
        world.server.heal()
        full_speed(world)
    return act


def failing_for_ever(moment):
    def act(world):
        moment(world)
        world.server.fail()
        full_speed(world)
    return act


def link_down(seconds, moment):
    def act(world):
        moment(world)
        world.server.link("down")
        world.pause(seconds)
        world.server.link("up")
        full_speed(world)
    return act


SLOWLY = {"--bandwidth": "8M"}  # so that what happens during the copy does

# --- the matrix -----------------------------------------------------------------------------------

# The first connection: `migrate` says it, and a second one works.
HANDSHAKE = [
    Case("connect refused", servers.nobody, "refused", "Connection refused"),
    Case("hangs after connect", scripted("hello:hang"), "refused", "did not end within 1 s", HANG),
    Case("hangs after hello", scripted("option:hang"), "refused", "did not end within 1 s", HANG),
    Case("hangs in GO", scripted("go:hang"), "refused", "did not end within 1 s", HANG),
    Case("hangs in mid-hello", scripted("hello:half-hang"), "refused", "did not end within", HANG),
    Case("hangs in mid-GO", scripted("go:half-hang"), "refused", "did not end within 1 s", HANG),
    Case("closes after connect", scripted("hello:close"), "refused", "the NBD handshake failed"),
    Case("closes after hello", scripted("option:close"), "refused", "the NBD handshake failed"),
    Case("closes in GO", scripted("go:close"), "refused", "the NBD handshake failed"),
    Case("closes in mid-GO", scripted("go:half-close"), "refused", "the NBD handshake failed"),
    Case("resets after connect", scripted("hello:reset"), "refused", "Connection reset by peer"),
    Case("wrong magic in hello", scripted("hello:magic"), "refused", "magic"),
    Case("wrong magic in option", scripted("option:magic"), "refused", "magic"),
    Case("oversize option", scripted("option:oversize"), "refused", "the NBD handshake failed"),
    Case("oversize GO", scripted("go:oversize"), "refused", "the NBD handshake failed"),
    Case("wrong size", scripted("go:size"), "refused", "smaller than the disk"),
]

# Later connections, while the first works: made again, and the migration goes on. A handshake that
# hangs for ever costs that connection only.
LATER = [
    Case("2nd hangs after connect", scripted("hello:hang:1:1"), "recovers", options=HANG),
    Case("2nd hangs in GO", scripted("go:hang:1:1"), "recovers", options=HANG),
    Case("2nd closes after connect", scripted("hello:close:1:1"), "recovers"),
    Case("2nd closes in GO", scripted("go:close:1:1"), "recovers"),
    Case("2nd has wrong magic", scripted("hello:magic:1:1"), "recovers"),
    Case("2nd has wrong size", scripted("go:size:1:1"), "recovers"),
    Case("others hang for ever", scripted("hello:hang:0:1"), "recovers", options=HANG),
    Case("others have wrong size for ever", scripted("go:size:0:1"), "recovers"),
]

# In the transmission, at a connection that works.
HANGS = [
    Case("hangs after GO", scripted("any:hang"), "recovers", options=HANG),
    Case("hangs in a write", scripted("write:hang:1:20"), "recovers", options=HANG),
    Case("hangs in a write, sync", scripted("write:hang:1:20"), "recovers",
         options=HANG | SYNC),
    Case("hangs in a zero", scripted("zero:hang"), "recovers", options=HANG),
    Case("hangs in a flush", scripted("flush:hang"), "recovers", options=HANG),
    Case("hangs in block status", scripted("status:hang"), "recovers", options=HANG),
    Case("hangs in mid-reply", scripted("write:half-hang:1:20"), "recovers", options=HANG),
    Case("hangs in mid-reply, single", scripted("write:half-hang:1:20", single=True), "recovers",
         "the target was lost", HANG),
    Case("a write is done after its connection's end", scripted("write:zombie:3:20"), "recovers",
         options=HANG | {"--quarantine": "3s"}),
    Case("all writes hang for ever", scripted("write:hang:0:20"), "persists", "the server hangs",
         HANG),
    Case("all writes hang for ever, sync", scripted("write:hang:0:20"), "persists",
         "the server hangs", HANG | SYNC),
    Case("all flushes hang for ever", scripted("flush:hang:0"), "unswitchable", "given up", HANG),
]

CLOSES = [
    Case("closes after GO", scripted("any:close"), "recovers"),
    Case("closes after a write", scripted("write:close:1:20"), "recovers"),
    Case("closes after a write, single", scripted("write:close:1:20", single=True), "recovers",
         "the target was lost"),
    Case("closes after a zero", scripted("zero:close"), "recovers"),
    Case("closes after a flush", scripted("flush:close"), "recovers"),
    Case("closes in mid-reply", scripted("write:half-close:1:20"), "recovers"),
    Case("resets after a write", scripted("write:reset:1:20"), "recovers"),
    Case("closes after each write for ever", scripted("write:close:0:20"), "persists",
         "the target was lost"),
]

REPLIES = [
    Case("wrong magic", scripted("write:magic:1:20"), "recovers"),
    Case("wrong magic, single", scripted("write:magic:1:20", single=True), "recovers", "magic"),
    Case("wrong handle", scripted("write:handle:1:20", single=True), "recovers", "cookie"),
    Case("oversize reply", scripted("write:oversize:1:20", single=True), "recovers", "invalid"),
    Case("wrong magic for ever", scripted("write:magic:0:20"), "persists", "magic"),
    Case("wrong handle for ever", scripted("write:handle:0:20"), "persists", "cookie"),
    Case("oversize for ever", scripted("write:oversize:0:20"), "persists", "invalid"),
    Case("wrong size after a loss", scripted("write:close:1:20", "go:size:0:1", single=True),
         "fails", "smaller than the disk"),
]

ERRORS = [
    Case("a write fails once", scripted("write:EIO:1:20"), "recovers", "failed to write"),
    Case("a zero fails once", scripted("zero:EIO"), "recovers", "failed to zero"),
    Case("zeroes are not supported after all", scripted("zero:ENOTSUP:0"), "recovers",
         "failed to zero"),
    Case("a flush fails once", scripted("flush:EIO"), "recovers", "failed to flush"),
    Case("block status fails for ever", scripted("status:EIO:0"), "recovers"),
    Case("writes fail for ever", scripted("write:EIO:0:20"), "fails", "failed to write"),
    Case("zeroes fail for ever", scripted("zero:EIO:0"), "recovers", "failed to zero"),
    Case("flushes fail for ever", scripted("flush:EIO:0"), "unswitchable", "given up"),
    Case("no space in a write", scripted("write:ENOSPC:1:20"), "fails", "no space"),
    Case("not permitted", scripted("write:EPERM:1:20"), "fails", "permitted"),
    Case("shuts down once", scripted("write:ESHUTDOWN:1:20"), "recovers", "shut"),
    Case("shuts down for ever", scripted("write:ESHUTDOWN:0:20"), "persists", "shutting down"),
    Case("nbdkit fails writes for a while", failing("pwrite", "EIO"), "recovers",
         "failed to write", SLOWLY, failing_for(0.5, when_copying)),
    Case("nbdkit fails writes for ever", failing("pwrite", "EIO"), "fails", "failed to write",
         SLOWLY, failing_for_ever(when_copying)),
    Case("nbdkit fails writes when in sync", failing("pwrite", "EIO"), "fails", "failed to write",
         {}, failing_for_ever(when_in_sync)),
    Case("nbdkit fails zeroes for a while", failing("zero", "EIO"), "recovers", "failed to zero",
         SLOWLY, failing_for(0.5, when_copying)),
    Case("nbdkit fails extents for ever", failing("extents", "EIO"), "recovers", "",
         SLOWLY, failing_for_ever(nothing)),
    Case("the target's disk is full", servers.full_disk, "fails", "no space", needs_root=True),
]

SLOW = [
    Case("rate of 1 MB/s", filtered(["rate"], "rate=8M"), "recovers", rate=40, bytes=4096),
    Case("rate of 1 MB/s, sync", filtered(["rate"], "rate=8M"), "recovers", "", SYNC, rate=40,
         bytes=4096),
    Case("delay of 100 ms", filtered(["delay"], "delay-write=100ms", "delay-zero=100ms"),
         "recovers"),
    Case("delay of 100 ms, sync", filtered(["delay"], "delay-write=100ms", "delay-zero=100ms"),
         "recovers", "", SYNC, rate=50),
    Case("delay of 600 ms, sync", filtered(["delay"], "delay-write=600ms"), "unswitchable",
         "did not answer a sync write in time", SYNC, rate=20),
    Case("nbdkit stops answering", servers.nbdkit, "recovers", "has not answered", SLOWLY,
         frozen(FROZEN_SECONDS, when_copying)),
    Case("nbdkit stops answering, sync", servers.nbdkit, "recovers", "has not answered",
         SYNC, frozen(FROZEN_SECONDS, when_in_sync)),
    Case("qemu-nbd stops answering", servers.qemu_nbd, "recovers", "has not answered", SLOWLY,
         frozen(FROZEN_SECONDS, when_copying)),
    # Not nbdkit: 1.32 may abort when a connection ends under it ("Assertion `sock >= 0' failed").
    Case("qemu-nbd stops for longer than is waited", servers.qemu_nbd, "recovers",
         "has not answered", HANG | SLOWLY, frozen(4, when_copying)),
    Case("qemu-nbd stops so, one connection", servers.qemu_nbd, "recovers", "the server hangs",
         HANG | {"--connections": "1"}, frozen(4, when_in_sync)),
]

LOSSES = [
    Case("nbdkit is killed and comes back", servers.nbdkit, "recovers", "interrupted: the target was lost",
         SLOWLY, killed(1.5, when_copying)),
    Case("nbdkit is killed when in sync", servers.nbdkit, "recovers", "interrupted: the target was lost", {},
         killed(1.5, when_in_sync)),
    Case("nbdkit is killed twice", servers.nbdkit, "recovers", "interrupted: the target was lost", SLOWLY,
         killed(0.5, when_copying, twice=True)),
    Case("qemu-nbd is killed and comes back", servers.qemu_nbd, "recovers", "interrupted: the target was lost",
         SLOWLY, killed(1.5, when_copying)),
    Case("nbdkit is killed in sync mode", servers.nbdkit, "recovers", "interrupted: the target was lost",
         SYNC, killed(1.5, when_in_sync)),
    # What it had not flushed is gone (rule 7); a case in which nothing was has not fired.
    Case("nbdkit loses what was not flushed", servers.volatile, "recovers", "interrupted: the target was lost",
         SLOWLY, killed(0.2, when_copying)),
    Case("nbdkit loses it when in sync", servers.volatile, "recovers", "interrupted: the target was lost",
         {}, killed(0.2, when_in_sync)),
    Case("nbdkit loses it twice, sync", servers.volatile, "recovers", "interrupted: the target was lost",
         SYNC, killed(0.2, when_in_sync, twice=True)),
    Case("link down for 3 s", servers.far_away, "recovers", "has not answered", SLOWLY,
         link_down(3, when_copying), needs_root=True),
    Case("link down for 3 s, sync", servers.far_away, "recovers", "has not answered",
         SYNC, link_down(3, when_in_sync), needs_root=True),
    Case("link down for longer than is waited", servers.far_away, "recovers", "the target was lost",
         HANG | SLOWLY, link_down(5, when_copying), needs_root=True),
]
if LONG:
    LOSSES.append(Case("link down for 40 s", servers.far_away, "recovers", "the target was lost",
                       SLOWLY, link_down(40, when_copying), needs_root=True))

# After a pivot the guest waits for the target, up to --reconnect-delay, here 20 s.
PIVOTED = [
    Case("target is killed and comes back", servers.nbdkit, "pivoted",
         "the guest waits for the target", act=killed_pivoted(1), bound=3.5),
    Case("qemu-nbd is killed and comes back", servers.qemu_nbd, "pivoted",
         "the guest waits for the target", act=killed_pivoted(1), bound=3.5),
    Case("target stops answering", servers.nbdkit, "pivoted", act=frozen(2, nothing), bound=3.5),
    Case("qemu-nbd stops for longer than is waited", servers.qemu_nbd, "pivoted", "the server hangs",
         HANG, frozen(4, nothing), bound=7.5),
    Case("a write hangs", scripted("write:hang:1:250"), "pivoted", "", HANG, bound=5),
    Case("a read hangs", scripted("read:hang:1:20", single=True), "pivoted", "the server hangs",
         HANG, bound=5),
    Case("a read hangs in mid-reply", scripted("read:half-hang:1:20"), "pivoted", "", HANG, bound=5),
    Case("a read is oversize", scripted("read:oversize:1:20"), "pivoted", bound=5),
    Case("a read has a wrong handle", scripted("read:handle:1:20"), "pivoted", bound=5),
    Case("a connection closes in mid-reply", scripted("read:half-close:1:20"), "pivoted", bound=5),
    Case("a flush hangs", scripted("flush:hang:1:4"), "pivoted", "", HANG, bound=5),
]

MATRIX = {"handshake": HANDSHAKE, "later": LATER, "hangs": HANGS, "closes": CLOSES,
          "replies": REPLIES, "errors": ERRORS, "slow": SLOW, "losses": LOSSES,
          "pivoted": PIVOTED}
