"""The way to a target, which can be broken: `path.py SOCKET` listens at a TCP port, which it
prints, and passes on what comes to that unix socket. Commands, one a line on standard input:

    cut     every connection is reset, and so is each new one
    stall   nothing goes either way; what is sent meanwhile waits (as in a network, here or there)
    mend    all is well again

A process of its own, so that neither the guest nor the operator waits for the bytes. Ends with its
input.
"""
import contextlib
import socket
import struct
import sys
import threading

PIECE = 256 * 1024


class Path:
    def __init__(self, to):
        self.to = to
        self.whole = True
        self.flowing = threading.Event()
        self.flowing.set()
        self.pairs = set()
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def accept(self):
        while True:
            near, _ = self.listener.accept()
            # A connection that breaks is reset: nothing lingers in our kernel.
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far = socket.socket(socket.AF_UNIX)
            with self.lock:
                if not self.whole or far.connect_ex(self.to) != 0:
                    near.close()
                    far.close()
                    continue
                self.pairs.add((near, far))
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=(a, b, (near, far)), daemon=True).start()

    def pump(self, a, b, pair):
        with contextlib.suppress(OSError):
            while data := a.recv(PIECE):
                self.flowing.wait()
                b.sendall(data)
        with self.lock:
            if pair in self.pairs:  # the first of the two ends both
                self.end(pair)
            else:
                for end in pair:
                    end.close()

    def end(self, pair):
        self.pairs.discard(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def command(self, word):
        with self.lock:
            self.whole = word != "cut"
            if word == "cut":
                for pair in list(self.pairs):
                    self.end(pair)
        if word == "stall":
            self.flowing.clear()
        else:
            self.flowing.set()


def main(to):
    path = Path(to)
    print(path.listener.getsockname()[1], flush=True)
    threading.Thread(target=path.accept, daemon=True).start()
    for line in sys.stdin:
        path.command(line.strip())
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
