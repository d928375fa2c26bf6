"""A host of the soak: a copy of the disk, what serves it at the moment, the operator's commands to
it, and the path by which others reach it. Whatever serves is at the same unix socket, so the path
stays."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import ferry
from ferry import check, run, wait_until

# nbdkit 1.32, when a client vanishes at the wrong moment.
NBDKIT_BUG = "raw_send_socket: Assertion"
HERE = os.path.dirname(os.path.abspath(__file__))


class Host:
    def __init__(self, soak, name):
        self.soak, self.name = soak, name
        self.disk = soak.scratch.file(name + ".img")
        self.socket, self.control = self.disk + ".sock", self.disk + ".ctl"
        self.kind = self.process = None
        self.incoming = False
        self.meant_to_run = False
        self.path = subprocess.Popen(
            [sys.executable, os.path.join(HERE, "path.py"), self.socket],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        soak.scratch.processes.append(self.path)
        self.uri = f"nbd://127.0.0.1:{self.path.stdout.readline().strip()}/"

    # --- what serves ---

    def serve(self, kind="nbdferry", incoming=False):
        self.kind, self.incoming = kind, incoming
        self.start()

    def command(self):
        if self.kind == "qemu-nbd":
            return ["qemu-nbd", "-t", "-e", "16", "-f", "raw", "-x", "", "--discard=unmap", "-k",
                    self.socket, self.disk]
        if self.kind == "nbdkit":
            # Killed, it has lost what was not flushed.
            return ["nbdkit", "-f", "-U", self.socket, "--filter=cache", "file", self.disk]
        return [ferry.NBDFERRY, "serve", "--state", os.path.join(self.soak.state, self.name),
                *(["--incoming"] if self.incoming else []), self.disk]

    def start(self):
        """As it was started last. A promoted disk can't be served as incoming any more."""
        if self.kind != "nbdferry":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.socket)
        log = self.soak.scratch.file(self.name + ".log")
        before = os.path.getsize(log) if os.path.exists(log) else 0
        self.process = self.soak.scratch.start(self.name, self.command())
        self.meant_to_run = True
        wait_until(lambda: self.process.poll() is not None or self.ready(before),
                   f"{self.name} serves", 30)
        ended = self.process.poll() is not None
        if ended and self.kind == "qemu-nbd" and "lock" in self.said(before):
            # A killed nbdferry can have it for some milliseconds after its process is gone.
            self.soak.note(f"{self.name} is still locked")
            time.sleep(0.05)
            self.start()
        elif ended and self.incoming and "this disk counts" in self.said(before):
            self.soak.note(f"{self.name} has been promoted already")
            self.incoming = False
            self.start()
        check(self.process.poll() is None, f"{self.name} ended at once: {self.said(before)}")

    def said(self, begin):
        with open(self.soak.scratch.file(self.name + ".log"), "rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace")

    def ready(self, begin):
        if self.kind != "nbdferry":
            return ferry.accepts(self.socket)
        return f"serving {self.disk}" in self.said(begin) and ferry.accepts(self.control)

    def kill(self):
        self.meant_to_run = False
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        """SIGTERM: it finishes what it has, and exits with 0."""
        self.meant_to_run = False
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout=60 if self.kind == "nbdferry" else 5)
        except subprocess.TimeoutExpired:
            check(self.kind != "nbdferry", f"{self.name} did not end within 60 s of SIGTERM")
            self.soak.note(f"{self.kind} does not end")
            self.kill()
            return
        check(code == 0, f"{self.name} ({self.kind}) ended with {code} after SIGTERM")

    def freeze(self, seconds):
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)

    def check(self):
        if not self.meant_to_run or self.process.poll() is None:
            return
        code = self.process.poll()
        if self.kind == "nbdkit" and NBDKIT_BUG in self.said(0)[-400:]:
            self.soak.faults["nbdkit's own assertion"] += 1
            self.soak.note("nbdkit died by its own assertion: started again")
            self.start()
            return
        check(False, f"{self.name} ({self.kind}) ended by itself, with {code}")

    # --- the operator ---

    def ask(self, *words, seconds=90):
        """(done, what it said); it may fail, for it may be killed meanwhile."""
        command, *more = words
        result = run([ferry.NBDFERRY, command, "--control", self.control, *more], seconds)
        if command != "status":
            self.soak.note(f"{self.name}: {' '.join(words)}: {result.returncode} "
                           f"{result.stderr.strip()}")
        return result.returncode == 0, result.stdout if command == "status" else result.stderr

    def ask_in_background(self, *words):
        self.soak.note(f"{self.name}: {' '.join(words)}, and meanwhile:")
        return self.soak.scratch.start("operator", [ferry.NBDFERRY, words[0], "--control",
                                                    self.control, *words[1:]])

    def status(self):
        done, text = self.ask("status", "--json")
        check(done or self.process.poll() is not None, f"{self.name} gives no status: {text}")
        return json.loads(text) if done else None

    # --- the way to it ---

    def way(self, word):
        self.path.stdin.write(word + "\n")
        self.path.stdin.flush()
        self.path.stdout.readline()
