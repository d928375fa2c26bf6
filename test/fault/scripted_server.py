#!/usr/bin/env python3
"""An NBD server over a file that misbehaves where it is told to, and is an honest one elsewhere.

usage: scripted_server.py FILE [--port N] [--single] [--fault STAGE:KIND[:TIMES[:AFTER]]]...

STAGE is the message in whose place the fault comes:
    hello     the greeting                       option    the first answer to an option
    go        the answer to GO                   write zero flush status read any
                                                           the answer to such a request
KIND is what happens there:
    hang close reset      nothing is sent, and the connection stays, ends, is reset
    half-hang half-close  half of the message first
    magic handle          the message, with a wrong magic or a wrong cookie
    oversize              the message's header, that announces 1 GiB
    size                  GO's answer: half the size (then the file's second half can't be reached)
    EIO ENOSPC EPERM EINVAL ENOTSUP ESHUTDOWN    the request is answered so, and not done
    zombie                as hang, yet a while after the client has gone the request is done (rule 8)
TIMES (default 1, 0: for ever) and AFTER (default 0: how often it goes well before) count the
messages of all connections. Requests that hang or close are not done.

Prints a line for each thing that happens: "port N", "open", "closed", "fault STAGE KIND".
"""
import argparse
import contextlib
import errno
import os
import socket
import struct
import threading
import time

GREETING, OPTION_REPLY = 0x4e42444d41474943, 0x3e889045565a9
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO = 1, 2, 3, 6, 7
OPT_STRUCTURED, OPT_LIST_CONTEXTS, OPT_SET_CONTEXTS = 8, 9, 10
ACK, SERVER, INFO, CONTEXT = 1, 2, 3, 4
ERR_UNSUP = 0x80000001
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
STAGES = {READ: "read", WRITE: "write", FLUSH: "flush", TRIM: "zero", CACHE: "cache",
          ZEROES: "zero", STATUS: "status"}
FLAGS = 0x1 | 0x4 | 0x8 | 0x20 | 0x40  # has, flush, FUA, trim, zeroes
MULTI_CONN = 0x100
NO_ZEROES = 2
ZOMBIE_SECONDS = 0.7
OVERSIZE = 1 << 30


class Plan:
    """Which messages go wrong. Shared by the connections."""

    def __init__(self, faults):
        self.lock = threading.Lock()
        self.faults = []
        for text in faults:
            stage, kind, times, after = (text.split(":") + ["1", "0"][len(text.split(":")) - 2:])[:4]
            self.faults.append({"stage": stage, "kind": kind, "after": int(after),
                                "left": int(times) or float("inf")})

    def next(self, *stages):
        """The fault for a message of these stages, or None."""
        with self.lock:
            for fault in self.faults:
                if fault["stage"] not in stages or fault["left"] == 0:
                    continue
                if fault["after"] > 0:
                    fault["after"] -= 1
                    continue
                fault["left"] -= 1
                say(f"fault {fault['stage']} {fault['kind']}")
                return fault["kind"]
        return None


output = threading.Lock()


def say(text):
    with output:
        print(text, flush=True)


class End(Exception):
    """This connection is over."""


class Connection:
    def __init__(self, peer, file, size, flags, plan):
        self.peer, self.file, self.size, self.flags, self.plan = peer, file, size, flags, plan
        self.structured = self.allocation = False
        self.optioned = False

    def receive(self, length):
        data = bytearray()
        while len(data) < length:
            piece = self.peer.recv(length - len(data))
            if not piece:
                raise End
            data += piece
        return bytes(data)

    def hang(self):
        while self.peer.recv(1 << 20):
            pass
        raise End

    def send(self, kind, message):
        """The message, or what comes in its place."""
        if kind in ("half-hang", "half-close"):
            self.peer.sendall(message[:len(message) // 2])
        if kind in ("hang", "half-hang"):
            self.hang()
        if kind == "reset":
            self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if kind in ("close", "reset", "half-close"):
            raise End
        if kind == "magic":
            message = bytes(b ^ 0xff for b in message[:4]) + message[4:]
        if kind == "handle":
            message = message[:8] + bytes(b ^ 0xff for b in message[8:16]) + message[16:]
        self.peer.sendall(message)

    # --- handshake ---

    def serve(self):
        kind = self.plan.next("hello")
        self.send(kind, struct.pack(">QQH", GREETING, 0x49484156454F5054, 3))
        no_zeroes = struct.unpack(">I", self.receive(4))[0] & NO_ZEROES
        while True:
            _magic, option, length = struct.unpack(">QII", self.receive(16))
            data = self.receive(length)
            if option == OPT_EXPORT_NAME:
                self.peer.sendall(struct.pack(">QH", self.size, self.flags) +
                                  (b"" if no_zeroes else bytes(124)))
                break
            if self.answer_option(option, data) == OPT_GO:
                break
        while True:
            self.serve_request()

    def answer_option(self, option, data):
        stages = ["go"] if option == OPT_GO else []
        if not self.optioned:
            stages.append("option")
            self.optioned = True
        kind = self.plan.next(*stages)
        size = self.size // 2 if kind == "size" else self.size
        replies = []
        if option in (OPT_GO, OPT_INFO):
            replies = [(INFO, struct.pack(">HQH", 0, size, self.flags)), (ACK, b"")]
        elif option == OPT_STRUCTURED:
            self.structured = True
            replies = [(ACK, b"")]
        elif option in (OPT_LIST_CONTEXTS, OPT_SET_CONTEXTS):
            if b"base:allocation" in data:
                self.allocation = option == OPT_SET_CONTEXTS
                replies = [(CONTEXT, struct.pack(">I", 1) + b"base:allocation")]
            replies.append((ACK, b""))
        elif option == OPT_LIST:
            replies = [(SERVER, struct.pack(">I", 0)), (ACK, b"")]
        elif option == OPT_ABORT:
            replies = [(ACK, b"")]
        else:
            replies = [(ERR_UNSUP, b"")]
        message = b"".join(struct.pack(">QIII", OPTION_REPLY, option, what,
                                       OVERSIZE if kind == "oversize" else len(text)) + text
                           for what, text in replies)
        self.send(kind, message)
        if option == OPT_ABORT:
            raise End
        return option

    # --- transmission ---

    def serve_request(self):
        _magic, _flags, command, cookie, offset, length = struct.unpack(">IHHQQI", self.receive(28))
        data = self.receive(length) if command == WRITE else b""
        if command == DISC:
            raise End
        kind = self.plan.next(STAGES.get(command, "any"), "any")
        if kind == "zombie":
            try:
                self.hang()
            except (End, OSError):
                time.sleep(ZOMBIE_SECONDS)
                self.apply(command, offset, length, data)
                say("zombie")
                raise End from None
        if kind is not None and kind.isupper():
            # The protocol has numbers of its own for two of them.
            error = {"ENOTSUP": 95, "ESHUTDOWN": 108}.get(kind) or getattr(errno, kind)
            self.peer.sendall(self.simple(cookie, error))
            return
        content = b""
        if kind not in ("hang", "close", "reset"):
            content = self.apply(command, offset, length, data)
        self.send(kind, self.reply(command, cookie, offset, length, content,
                                   OVERSIZE if kind == "oversize" else None))

    def apply(self, command, offset, length, data):
        if command == WRITE:
            os.pwrite(self.file, data, offset)
        elif command == ZEROES:
            os.pwrite(self.file, bytes(length), offset)
        elif command == FLUSH:
            os.fsync(self.file)
        elif command == READ:
            return os.pread(self.file, length, offset)
        return b""

    @staticmethod
    def chunk(cookie, what, length):
        return struct.pack(">IHHQI", 0x668e33ef, 1, what, cookie, length)

    @staticmethod
    def simple(cookie, error):
        return struct.pack(">IIQ", 0x67446698, error, cookie)

    def reply(self, command, cookie, offset, length, content, oversize):
        if oversize:
            return self.chunk(cookie, 1, oversize) + bytes(64)
        if command == READ and self.structured:
            return self.chunk(cookie, 1, 8 + len(content)) + struct.pack(">Q", offset) + content
        if command == STATUS and self.allocation:
            return self.chunk(cookie, 5, 12) + struct.pack(">III", 1, length, 0)
        return self.simple(cookie, errno.EINVAL if command == STATUS else 0) + content


def handle(peer, *more):
    say("open")
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with peer, contextlib.suppress(End, OSError):
        Connection(peer, *more).serve()
    say("closed")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--single", action="store_true")
    parser.add_argument("--fault", action="append", default=[])
    options = parser.parse_args()
    plan = Plan(options.fault)
    file = os.open(options.file, os.O_RDWR)
    size = os.fstat(file).st_size
    flags = FLAGS if options.single else FLAGS | MULTI_CONN
    with socket.create_server(("127.0.0.1", options.port)) as listener:
        say(f"port {listener.getsockname()[1]}")
        while True:
            peer, _ = listener.accept()
            threading.Thread(target=handle, args=(peer, file, size, flags, plan),
                             daemon=True).start()


if __name__ == "__main__":
    main()
