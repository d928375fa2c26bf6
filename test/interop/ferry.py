"""What the interop tests share: a scratch directory, processes that end with the test, nbdferry
itself, and the target servers. Standard library only.

Every process is ended by its own handle, every file lies in the scratch directory, every wait has a
bound. The programs under test come from the environment: NBDFERRY, NBD_LOAD.
"""
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

NBDFERRY = os.environ["NBDFERRY"]
NBD_LOAD = os.environ["NBD_LOAD"]
MIB = 1024 * 1024


def check(condition, what):
    if not condition:
        raise AssertionError(what)


def wait_until(condition, what, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        check(time.monotonic() < end, f"waited {seconds} s in vain: {what}")
        time.sleep(0.02)


def unix_uri(path, export=""):
    return f"nbd+unix:///{export}?socket={path}"


def accepts(address):
    """True if somebody answers at a unix path or a (host, port)."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.connect(address)
            return True
        except OSError:
            return False


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Scratch:
    """A directory, and the processes that were started for it; both gone at the end."""

    def __init__(self):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="nbdferry-test-"))
        self.processes = []
        self.daemons = []  # files with the process ids of what went to the background

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for process in reversed(self.processes):
            if process.poll() is None:
                process.kill()
            process.wait()
        for pid_file in self.daemons:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(pathlib.Path(pid_file).read_text()), signal.SIGTERM)
                # It removes the file itself, last of all.
                wait_until(lambda name=pid_file: not os.path.exists(name), "a daemon's end")
        if kind is not None:
            for log in sorted(self.path.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}")
        shutil.rmtree(self.path)

    def file(self, name):
        return str(self.path / name)

    def start(self, name, command, **more):
        """A process whose output goes to NAME.log."""
        with open(self.file(name + ".log"), "ab") as log:
            more.setdefault("stdout", log)
            more.setdefault("stderr", log)
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **more)
        self.processes.append(process)
        return process

    def stop(self, process, how=signal.SIGTERM, seconds=20):
        if process.poll() is None:
            process.send_signal(how)
        return process.wait(timeout=seconds)

    def log(self, name):
        return pathlib.Path(self.file(name + ".log")).read_text(errors="replace")

    def disk(self, name, size=64 * MIB, seed=1):
        """Random data, zeroes that are written out, and holes: a third each, in 256 KiB pieces."""
        path = self.file(name)
        piece = 256 * 1024
        dice = random.Random(seed)
        with open(path, "wb") as f:
            f.truncate(size)
            for offset in range(0, size, piece):
                what = dice.randrange(3)
                if what == 2:
                    continue
                f.seek(offset)
                f.write(dice.randbytes(piece) if what == 0 else bytes(piece))
        return path

    def garbage(self, name, size=64 * MIB):
        """A target that has been used before: nothing of it may survive."""
        path = self.file(name)
        with open(path, "wb") as f:
            f.write(b"\xa5" * size)
        return path


def run(command, seconds=60, **more):
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds,
                          stdin=subprocess.DEVNULL, **more)


def run_ok(command, seconds=60):
    result = run(command, seconds)
    check(result.returncode == 0, f"{command}: exit {result.returncode}: {result.stderr}"
          f"{result.stdout}")
    return result.stdout


def wire(namespaces, ends, addresses):
    """Two network namespaces, joined: a veth pair with these ends and addresses (with prefix)."""
    run_ok(["ip", "link", "add", ends[0], "netns", namespaces[0], "type", "veth",
            "peer", "name", ends[1], "netns", namespaces[1]])
    for namespace, end, address in zip(namespaces, ends, addresses):
        run_ok(["ip", "-n", namespace, "addr", "add", address, "dev", end])
        run_ok(["ip", "-n", namespace, "link", "set", end, "up"])
        run_ok(["ip", "-n", namespace, "link", "set", "lo", "up"])


def limit_rate(namespace, end, rate, latency="50ms"):
    """What leaves by this end, with a queue of that length."""
    run_ok(["tc", "-n", namespace, "qdisc", "add", "dev", end, "root", "tbf", "rate", rate,
            "burst", "256kb", "latency", latency])


def state_directory():
    """A folder for --state, in memory, whatever file system the scratch directory is on: `with` gives its path."""
    return tempfile.TemporaryDirectory(prefix="nbdferry-state-", dir="/dev/shm")


def same_bytes(a, b):
    return run(["cmp", "-s", a, b]).returncode == 0


def same(a, b, what):
    """Byte for byte."""
    result = run(["cmp", a, b])
    check(result.returncode == 0, f"{what}: {result.stdout}{result.stderr}")


class Ferry:
    """nbdferry serve, and its operator. `before`: a command that runs it, perhaps confined."""

    def __init__(self, scratch, disk, *options, name="ferry", sockets=None, before=(),
                 program=NBDFERRY):
        """`sockets`: how the sockets' paths begin, where that is not beside the disk."""
        self.scratch, self.disk, self.name = scratch, disk, name
        self.socket, self.control = (sockets or disk) + ".sock", (sockets or disk) + ".ctl"
        if sockets:
            options = (*options, "--socket", self.socket, "--control", self.control)
        self.uri = unix_uri(self.socket)
        self.process = scratch.start(name, [*before, program, "serve", *options, disk])
        wait_until(lambda: self.process.poll() is not None or
                   (accepts(self.control) and f"serving {disk}" in scratch.log(name)),
                   "nbdferry serve")
        check(self.process.poll() is None, "nbdferry serve ended at once")

    def run(self, command, *arguments, seconds=60):
        return run([NBDFERRY, command, "--control", self.control, *arguments], seconds)

    def ok(self, command, *arguments, seconds=60):
        result = self.run(command, *arguments, seconds=seconds)
        check(result.returncode == 0, f"{command} {arguments}: exit {result.returncode}: "
              f"{result.stderr}")
        return result.stdout

    def fails(self, command, *arguments, because, code=1):
        """One line on standard error that has all of `because`; nothing on standard output."""
        result = self.run(command, *arguments)
        check_error(result, because, code)

    def status(self):
        return json.loads(self.ok("status", "--json"))

    def stop(self):
        code = self.scratch.stop(self.process)
        check(code == 0, f"nbdferry serve ended with {code}")
        for path in (self.socket, self.control):
            check(not os.path.exists(path), f"{path} was left behind")


def check_error(result, because, code=1):
    text = result.stderr
    check(result.returncode == code, f"exit {result.returncode}, not {code}: {text}")
    errors = [line for line in text.splitlines() if line.startswith("nbdferry: ")]
    check(len(errors) == len(text.splitlines()) >= 1, f"not lines of ours: {text!r}")
    for part in [because] if isinstance(because, str) else because:
        check(part in errors[-1], f"{part!r} is not in {errors[-1]!r}")


class Load:
    """A guest that writes, checks what it reads, and keeps a shadow of what the disk must hold."""

    def __init__(self, scratch, uri, disk, *options, name="load"):
        self.scratch, self.name = scratch, name
        self.shadow = scratch.file(name + ".shadow")
        shutil.copyfile(disk, self.shadow)
        self.process = scratch.start(name, [
            NBD_LOAD, "--uri", uri, "--shadow", self.shadow, "--read-percent", "20",
            "--zero-percent", "5", "--fua-percent", "5", "--flush-every", "200", *options])

    def running(self):
        check(self.process.poll() is None, f"the load has ended: {self.scratch.log(self.name)}")

    def end(self):
        """Ends it, if it hasn't ended by itself; returns what its last phase was like."""
        code = self.scratch.stop(self.process)
        text = self.scratch.log(self.name)
        check(code == 0, f"the load failed: {text}")
        return json.loads(text.splitlines()[-1])


class Counted:
    """A way to a unix socket that counts what passes, in both directions together."""

    def __init__(self, scratch, to, name="counted"):
        self.to, self.bytes, self.lock = to, 0, threading.Lock()
        path = scratch.file(name + ".sock")
        self.uri = unix_uri(path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            near, _ = self.listener.accept()
            far = socket.socket(socket.AF_UNIX)
            far.connect(self.to)
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=(a, b), daemon=True).start()

    def pump(self, a, b):
        with contextlib.suppress(OSError):
            while data := a.recv(256 * 1024):
                with self.lock:
                    self.bytes += len(data)
                b.sendall(data)
            b.shutdown(socket.SHUT_RDWR)


# --- target servers -------------------------------------------------------------------------------

def qemu_nbd(scratch, image, name="target"):
    path = scratch.file(name + ".sock")
    scratch.start(name, ["qemu-nbd", "-t", "-e", "16", "-f", "raw", "-x", "", "--discard=unmap",
                         "-k", path, image])
    wait_until(lambda: accepts(path), "qemu-nbd")
    return unix_uri(path)


def nbdkit(scratch, *plugin, name="target"):
    path = scratch.file(name + ".sock")
    scratch.start(name, ["nbdkit", "-f", "-U", path, *plugin])
    wait_until(lambda: accepts(path), "nbdkit")
    return unix_uri(path)


def nbd_server(scratch, image, flush, name="target"):
    port = free_port()
    config = scratch.file(name + ".conf")
    with open(config, "w") as f:
        f.write(f"[generic]\nlistenaddr = 127.0.0.1\nport = {port}\nallowlist = true\n"
                f"[disk]\nexportname = {image}\nflush = {str(flush).lower()}\n"
                f"fua = {str(flush).lower()}\n")
    # It stays in the foreground only to debug one connection.
    scratch.daemons.append(scratch.file(name + ".pid"))
    run_ok(["nbd-server", "-C", config, "-p", scratch.file(name + ".pid")])
    wait_until(lambda: accepts(("127.0.0.1", port)), "nbd-server")
    return f"nbd://127.0.0.1:{port}/disk"


@contextlib.contextmanager
def target(scratch, kind, image):
    """Yields (uri, read): read() makes `image` hold what the target holds now."""
    def from_file():
        pass

    def from_server():
        run_ok(["nbdcopy", uri, image])

    if kind == "qemu-nbd":
        uri, read = qemu_nbd(scratch, image), from_file
    elif kind == "nbdkit-file":
        uri, read = nbdkit(scratch, "file", image), from_file
    elif kind == "nbdkit-memory":
        uri, read = nbdkit(scratch, "memory", str(os.path.getsize(image))), from_server
    elif kind == "nbd-server":
        uri, read = nbd_server(scratch, image, True), from_file
    elif kind == "nbd-server-noflush":
        uri, read = nbd_server(scratch, image, False), from_file
    else:
        raise ValueError(kind)
    yield uri, read
