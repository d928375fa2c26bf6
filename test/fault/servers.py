"""The targets of the fault matrix: each can be started, stopped and asked how many connections it has.

A target is made by a function of (world); `world` has scratch, image (the target's file) and size.
"""
import os
import pathlib
import signal
import sys

import ferry
import nbd
from ferry import wait_until

QEMU_NBD = ["qemu-nbd", "-t", "-e", "16", "-f", "raw", "-x", "", "--discard=unmap"]
HERE = pathlib.Path(__file__).parent


class Server:
    """A process that serves, at a TCP port or a unix socket that stay the same when it is restarted."""

    def __init__(self, world, command, uri, address, name):
        self.scratch, self.command, self.uri, self.address = world.scratch, command, uri, address
        self.name = name
        self.process = None
        self.start()

    def start(self):
        if isinstance(self.address, str) and os.path.exists(self.address):
            os.unlink(self.address)
        self.process = self.scratch.start(self.name, self.command)
        wait_until(lambda: ferry.accepts(self.address), f"{self.name} answers")

    def kill(self):
        self.scratch.stop(self.process, signal.SIGKILL)

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def fired(self):
        return True


class Scripted(Server):
    def __init__(self, world, faults, single):
        self.scratch, self.name = world.scratch, "scripted"
        arguments = [word for fault in faults for word in ("--fault", fault)]
        self.command = [sys.executable, str(HERE / "scripted_server.py"), world.image, *arguments,
                        *(["--single"] if single else [])]
        self.process = self.scratch.start(self.name, self.command)
        wait_until(lambda: "port " in self.lines("port "), "the scripted server")
        self.port = int(self.lines("port ").split()[1])
        self.uri = f"nbd://127.0.0.1:{self.port}/"

    def lines(self, beginning):
        return "\n".join(line for line in self.scratch.log(self.name).splitlines()
                         if line.startswith(beginning))

    def count(self, beginning):
        return len(self.lines(beginning).splitlines())

    def fired(self):
        return self.count("fault ") > 0

    def connections(self):
        return self.count("open") - self.count("closed")


def scripted(*faults, single=False):
    return lambda world: Scripted(world, faults, single)


def nobody(world):
    """A port at which nobody listens, until it is started."""
    class Nobody(Server):
        def start(self):
            if self.process is None:
                self.process = "not yet"
                return
            super().start()
    return tcp_nbdkit(world, ["file", world.image], Nobody)


def tcp_nbdkit(world, arguments, kind=Server, name="nbdkit"):
    port = ferry.free_port()
    return kind(world, ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), *arguments],
                f"nbd://127.0.0.1:{port}/", ("127.0.0.1", port), name)


class Failing(Server):
    """nbdkit's filters, that fail while a file exists."""

    def __init__(self, world, command, *more):
        self.switch = world.scratch.file("fail")
        super().__init__(world, [word.replace("@switch", self.switch) for word in command], *more)

    def fail(self):
        pathlib.Path(self.switch).touch()

    def heal(self):
        os.unlink(self.switch)


def failing(command, error):
    """nbdkit over the target's file; all such commands fail after fail()."""
    def make(world):
        return tcp_nbdkit(world, ["--filter=error", "file", world.image, f"error-{command}={error}",
                                  f"error-{command}-rate=100%", f"error-{command}-file=@switch"],
                          Failing)
    return make


def filtered(filters, *parameters):
    def make(world):
        return tcp_nbdkit(world, [*(f"--filter={f}" for f in filters), "file", world.image,
                                  *parameters])
    return make


def nbdkit(world):
    return tcp_nbdkit(world, ["file", world.image])


def volatile(world):
    """nbdkit with a cache that only a flush writes to the target's file: killed, it has lost the rest."""
    class Volatile(Server):
        lost = 0  # bytes

        def kill(self):
            length = world.size // 2
            connection, _size = nbd.dial(self.address, 20)
            with connection:
                connection.sendall(nbd.request(0, 1, 0, length))
                held = nbd.receive(connection, 16 + length)[16:]
            super().kill()
            left = pathlib.Path(world.image).read_bytes()
            self.lost += sum(4096 for at in range(0, length, 4096)
                             if held[at:at + 4096] != left[at:at + 4096])

        def fired(self):
            return self.lost > 0

    return tcp_nbdkit(world, ["--filter=cache", "file", world.image], Volatile, "volatile")


def qemu_nbd(world):
    path = world.scratch.file("qemu.sock")
    return Server(world, [*QEMU_NBD, "-k", path, world.image], ferry.unix_uri(path), path, "qemu")


def full_disk(world):
    """nbdkit on a file system that has room for a third of the disk."""
    folder = world.scratch.file("small")
    os.mkdir(folder)
    ferry.run_ok(["mount", "-t", "tmpfs", "-o", f"size={world.size // 3}", "fault", folder])
    world.at_end.append(lambda: ferry.run_ok(["umount", folder]))
    image = folder + "/target.img"
    pathlib.Path(image).touch()
    os.truncate(image, world.size)
    server = tcp_nbdkit(world, ["file", image])
    world.at_end.append(server.kill)
    return server


def far_away(world):
    """qemu-nbd in another network namespace; it lives as long as its process."""
    end = f"fa{world.number}"
    holder = world.scratch.start("holder", ["unshare", "--net", "sleep", "600"])
    own = os.readlink("/proc/self/ns/net")
    wait_until(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != own, "a network namespace")
    inside = ["nsenter", "--net", "-t", str(holder.pid)]
    ferry.run_ok(["ip", "link", "add", end, "type", "veth", "peer", "name", "there", "netns",
                  str(holder.pid)])
    network = f"10.79.{world.number}"
    ferry.run_ok(["ip", "addr", "add", f"{network}.1/24", "dev", end])
    ferry.run_ok(["ip", "link", "set", end, "up"])
    ferry.run_ok([*inside, "ip", "addr", "add", f"{network}.2/24", "dev", "there"])
    ferry.run_ok([*inside, "ip", "link", "set", "there", "up"])

    class Far(Server):
        def link(self, state):
            ferry.run_ok([*inside, "ip", "link", "set", "there", state])

    return Far(world, [*inside, *QEMU_NBD, "-p", "10809", world.image], f"nbd://{network}.2/",
               (f"{network}.2", 10809), "far")


def wait_until_fired(server):
    wait_until(server.fired, "the fault: without it the case proves nothing", 10)
