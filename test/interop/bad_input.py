#!/usr/bin/env python3
"""Bad input gets a clear error, and nothing is lost. usage: bad_input.py disk|sockets|target|guest"""
import contextlib
import os
import pathlib
import shutil
import signal
import socket
import struct
import sys
import threading
import time

import ferry
from ferry import MIB, NBDFERRY, check, check_error, run


def serve_fails(disk, *options, because):
    """serve refuses, at once, and leaves no socket behind."""
    result = run([NBDFERRY, "serve", *options, disk], seconds=20)
    check_error(result, because)
    for suffix in (".sock", ".ctl"):
        path = pathlib.Path(disk + suffix)
        check(not path.is_socket() or options or ferry.accepts(str(path)), f"{path} is left behind")


def disks(scratch):
    serve_fails(scratch.file("absent.img"), because=["absent.img", "no such file"])
    empty = scratch.file("empty.img")
    pathlib.Path(empty).touch()
    serve_fails(empty, because=["empty.img", "empty"])
    serve_fails(str(scratch.path), because="directory")
    serve_fails("/dev/null", because="/dev/null")
    unreadable(scratch)
    locked(scratch)
    looks_like_qcow2(scratch)


def unreadable(scratch):
    image = scratch.disk("secret.img", MIB)
    os.chmod(image, 0)
    os.chmod(scratch.path, 0o777)
    command = [NBDFERRY, "serve", image]
    if os.getuid() == 0:
        # A copy that nobody may execute may lie where only root gets.
        program = shutil.copy(NBDFERRY, scratch.file("nbdferry"))
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", program, "serve",
                   image]
    check_error(run(command), because=["secret.img", "ermission denied"])


def locked(scratch):
    image = scratch.disk("shared.img", MIB)
    first = ferry.Ferry(scratch, image)
    elsewhere = ["--socket", scratch.file("b.sock"), "--control", scratch.file("b.ctl")]
    serve_fails(image, *elsewhere, because=["shared.img", "locked"])
    check(first.status()["role"] == "owner", "the first goes on")
    first.stop()
    # QEMU has it.
    ferry.qemu_nbd(scratch, image, "qemu")
    serve_fails(image, because=["shared.img", "locked"])


def looks_like_qcow2(scratch):
    image = scratch.file("image.qcow2")
    ferry.run_ok(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"])
    size = os.path.getsize(image)
    size += -size % 4096
    os.truncate(image, size)
    disk = ferry.Ferry(scratch, image, name="qcow2")
    notes = [line for line in scratch.log("qcow2").splitlines() if "qcow2" in line and "raw" in line]
    check(len(notes) == 1, f"one note: {scratch.log('qcow2')}")
    check(disk.status()["size_bytes"] == size, "its raw bytes are served")
    copy = scratch.file("copy")
    ferry.run_ok(["nbdcopy", disk.uri, copy])
    disk.stop()
    ferry.same(image, copy, "raw bytes")


def sockets(scratch):
    a, b = scratch.disk("a.img", MIB), scratch.disk("b.img", MIB, seed=2)
    first = ferry.Ferry(scratch, a)
    serve_fails(b, "--control", first.control, because=[first.control, "in use"])
    serve_fails(b, "--socket", first.socket, because=[first.socket, "in use"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        serve_fails(b, "--listen", f"127.0.0.1:{port}", because=[str(port), "in use"])
    precious = scratch.file("precious")
    pathlib.Path(precious).write_text("precious")
    serve_fails(b, "--control", precious, because=[precious, "not a socket"])
    serve_fails(b, "--socket", precious, because=[precious, "not a socket"])
    check(pathlib.Path(precious).read_text() == "precious", "a file was overwritten")
    check(first.status()["role"] == "owner", "the first goes on")
    # Killed: its sockets are stale.
    scratch.stop(first.process, signal.SIGKILL)
    check(os.path.exists(first.control) and os.path.exists(first.socket), "stale sockets")
    first.fails("status", because="is nbdferry serve running?")
    second = ferry.Ferry(scratch, a, name="second")
    check(second.status()["role"] == "owner", "stale sockets are replaced")
    check(os.stat(second.control).st_mode & 0o777 == 0o600, "the control socket is its owner's")
    second.stop()
    check_error(run([NBDFERRY, "status", "--control", scratch.file("none.ctl")]),
                because=["none.ctl", "is nbdferry serve running?"])
    check_error(run([NBDFERRY, "serve", "--nonsense", a]), because="--nonsense", code=2)


def targets(scratch):
    image = scratch.disk("source.img")
    disk = ferry.Ferry(scratch, image)
    load = ferry.Load(scratch, disk.uri, image, "--rate", "500", "--compare")
    blank = scratch.garbage("blank.img")
    small = scratch.garbage("small.img", 32 * MIB)

    def refused(uri, *because):
        disk.fails("migrate", "--wait", uri, because=because)
        load.running()
        check(disk.status()["serving"] == "source", "who serves has changed")

    refused(ferry.unix_uri(scratch.file("nobody.sock")), "nobody.sock", "cannot connect")
    refused(f"nbd://127.0.0.1:{ferry.free_port()}", "refused")
    refused("nbd://no.such.host.invalid/", "no.such.host.invalid")
    for malformed in ("", "nbd:/x", "http://host/", "nbd://host:99999/", "nbd://host/%zz",
                      "nbd+unix:///x", "nbd://host/?fast=1", "just words"):
        disk.fails("migrate", "--wait", malformed, because="")
    with not_nbd(scratch) as uri:
        refused(uri, "handshake")
    refused(ferry.nbdkit(scratch, "-r", "file", blank, name="readonly"), "read-only")
    refused(ferry.nbdkit(scratch, "file", small, name="small"), "smaller")
    qemu = ferry.qemu_nbd(scratch, blank, "blank")
    refused(qemu.replace("nbd+unix:///", "nbd+unix:///elsewhere"), "elsewhere")
    orders(scratch, disk, load)
    load.end()
    disk.stop()
    ferry.same(load.shadow, image, "the source against what the guest wrote")


@contextlib.contextmanager
def not_nbd(scratch):
    """A server that speaks something else."""
    path = scratch.file("http.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def answer():
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listener.accept()
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 20)
                peer.close()

    threading.Thread(target=answer, daemon=True).start()
    yield ferry.unix_uri(path)
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def orders(scratch, disk, load):
    """Commands at the wrong time."""
    disk.fails("switch", "--pivot", because="no migration is running")
    for command in (["pause"], ["resume"], ["cancel"], ["verify"], ["switch", "--prepare"],
                    ["set", "--mode", "sync"]):
        disk.fails(*command, because="no migration is running")
    slow = ferry.nbdkit(scratch, "--filter=rate", "memory", str(64 * MIB), "rate=20M", name="slow")
    disk.ok("migrate", slow)
    disk.fails("migrate", slow, because=["cannot migrate", "a migration is running"])
    disk.fails("switch", "--pivot", because="not in sync")
    disk.fails("switch", "--release", because="not in sync")
    disk.fails("switch", "--seal", because="not prepared")
    disk.fails("switch", "--commit", "release", because="not sealed")
    load.running()
    disk.ok("cancel")
    ferry.wait_until(lambda: disk.status()["phase"] == "cancelled", "cancelled")
    disk.fails("promote", "--export", "other", because="no such export")


# --- guests that misbehave ------------------------------------------------------------------------

OPT_EXPORT_NAME = 1
READ, WRITE = 0, 1


class RawGuest:
    """As much of NBD as it takes to break its rules."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(path)

    def negotiate(self):
        self.receive(18)
        self.socket.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, OPT_EXPORT_NAME, 0))
        size, _flags = struct.unpack(">QH", self.receive(10))
        return size

    def receive(self, length):
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            check(piece, "the server hung up")
            data += piece
        return data

    def send(self, kind, offset, length, data=b""):
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 7, offset, length) + data)

    def error(self):
        _magic, error, _cookie = struct.unpack(">IIQ", self.receive(16))
        return error

    def hung_up(self):
        try:
            while self.socket.recv(65536):
                pass
            return True
        except ConnectionError:
            return True


def guests(scratch):
    image = scratch.disk("disk.img")
    before = shutil.copyfile(image, scratch.file("before.img"))
    disk = ferry.Ferry(scratch, image)

    for garbage in (b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096)):
        guest = RawGuest(disk.socket)
        guest.socket.sendall(garbage)
        check(guest.hung_up(), "garbage in the handshake ends it")
    guest = RawGuest(disk.socket)
    guest.negotiate()
    guest.socket.sendall(os.urandom(4096))
    check(guest.hung_up(), "garbage in the transmission ends it")

    guest = RawGuest(disk.socket)
    size = guest.negotiate()
    check(size == 64 * MIB, f"size {size}")
    guest.send(READ, size, 512)
    check(guest.error() == 22, "a read past the end is EINVAL")
    guest.send(READ, size - 512, 1024)
    check(guest.error() == 22, "a read across the end is EINVAL")
    guest.send(WRITE, size, 512, bytes(512))
    check(guest.error() == 28, "a write past the end is ENOSPC")
    guest.send(WRITE, 2**64 - 512, 1024, bytes(1024))
    check(guest.error() == 28, "offset and length that overflow")
    guest.send(99, 0, 512)
    check(guest.error() == 22, "an unknown command is EINVAL")
    guest.send(READ, 0, 512)
    check(guest.error() == 0, "and the connection goes on")
    with open(before, "rb") as f:
        check(guest.receive(512) == f.read(512), "with the disk's data")

    # In the middle of a write's payload, and of a header.
    guest.send(WRITE, 0, 4096, b"x" * 1000)
    guest.socket.close()
    guest = RawGuest(disk.socket)
    guest.negotiate()
    guest.socket.sendall(b"\x25\x60\x95")
    guest.socket.close()
    time.sleep(0.2)
    status = disk.status()
    check(status["role"] == "owner", f"the server goes on: {status}")
    ferry.wait_until(lambda: disk.status()["guest"]["connections"] == 0, "no guest is left")
    disk.stop()
    ferry.same(before, image, "half a write was applied")


def main(what):
    with ferry.Scratch() as scratch:
        {"disk": disks, "sockets": sockets, "target": targets, "guest": guests}[what](scratch)


main(*sys.argv[1:])
