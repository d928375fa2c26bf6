"""The two hosts of a move: this one, and the other one by ssh. Of the other one everything is reached
through unix sockets here: ssh carries them (one connection for all of it, no start of a program per
step, so that nothing of it adds to the guest's blackout).
"""
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile

from common import Problem

CONNECT_SECONDS = 20


class Local:
    """This machine (or, in tests, one more host of network namespaces on it)."""

    def __init__(self, label="here"):
        self.label = label

    def read(self, path):
        with open(path) as f:
            return f.read()

    def touch(self, path):
        with open(path, "w"):
            pass

    def socket(self, path):
        """A path here by which the unix socket there is reached."""
        return path

    def close(self):
        pass


class Ssh:
    def __init__(self, host, command="ssh"):
        self.label = f"at {host}"
        self.host = host
        self.directory = tempfile.mkdtemp(prefix="nbdferry-ssh-")
        self.master = [*shlex.split(command), "-S", os.path.join(self.directory, "ssh")]
        self.forwarded = 0
        try:
            # BatchMode: a question in the middle of a move helps nobody.
            self._run([*self.master, "-M", "-fN", "-o", "BatchMode=yes", "-o",
                       f"ConnectTimeout={CONNECT_SECONDS}", "-o", "ServerAliveInterval=5",
                       "-o", "StreamLocalBindUnlink=yes", host], "cannot reach it by ssh")
        except Problem:
            shutil.rmtree(self.directory)
            raise

    def read(self, path):
        return self._run([*self.master, self.host, "cat " + shlex.quote(path)],
                         f"cannot read {path}")

    def touch(self, path):
        self._run([*self.master, self.host, "touch " + shlex.quote(path)], f"cannot create {path}")

    def socket(self, path):
        self.forwarded += 1
        here = os.path.join(self.directory, str(self.forwarded))
        self._run([*self.master, "-O", "forward", "-L", f"{here}:{path}", self.host],
                  f"cannot forward {path}")
        return here

    def close(self):
        with contextlib.suppress(Problem):
            self._run([*self.master, "-O", "exit", self.host], "cannot end ssh")
        shutil.rmtree(self.directory, ignore_errors=True)

    def _run(self, command, what):
        # The master keeps its standard error open: a file, so that nobody waits for its end.
        with tempfile.TemporaryFile("w+") as errors:
            try:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                      stderr=errors, text=True, timeout=2 * CONNECT_SECONDS)
            except (OSError, subprocess.TimeoutExpired) as e:
                raise Problem(f"{self.host}: {what}: {e}") from e
            errors.seek(0)
            if done.returncode != 0:
                raise Problem(f"{self.host}: {what}: {errors.read().strip() or 'ssh failed'}")
        return done.stdout


def read_vm(host, directory):
    """vm.json there. Raises Problem where no VM runs."""
    path = os.path.join(directory, "vm.json")
    try:
        return json.loads(host.read(path))
    except (OSError, Problem) as e:
        raise Problem(f"no VM {host.label}: {path}: {getattr(e, 'strerror', None) or e}: start it "
                      "with attach-vm.sh") from e
    except ValueError as e:
        raise Problem(f"{path} {host.label} is damaged: {e}") from e
