"""A QEMU monitor (QMP) over a unix socket: calls, and the events that come in between.

Events keep the time at which QEMU sent them (its host's clock), since a guest's blackout is the time
from one QEMU's STOP to the other's RESUME.
"""
import collections
import json
import select
import socket
import time

from common import Problem

CALL_SECONDS = 20


class QmpError(Problem):
    """QEMU refused a call, or is gone."""


class Qmp:
    def __init__(self, path, what):
        self.what = what  # for messages: "the source's QEMU"
        self.events = collections.deque(maxlen=1000)
        self._input = b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(CALL_SECONDS)
        try:
            self._socket.connect(path)
            # One client at a time: a second one is not greeted.
            self._read(lambda message: "QMP" in message)
            self.call("qmp_capabilities")
        except (OSError, QmpError) as e:
            self._socket.close()
            raise QmpError(f"cannot talk to {what} at {path}: {e}") from e

    def call(self, command, seconds=CALL_SECONDS, **arguments):
        """Returns the answer. Arguments are named with underscores for QMP's hyphens."""
        message = {"execute": command}
        if arguments:
            message["arguments"] = {key.replace("_", "-"): value
                                    for key, value in arguments.items()}
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as e:
            raise QmpError(f"{self.what} is gone: {e}") from e
        answer = self._read(lambda m: "return" in m or "error" in m, seconds)
        if "error" in answer:
            raise QmpError(f"{self.what}: {message['execute']}: {answer['error']['desc']}")
        return answer["return"]

    def status(self):
        """The run state: running, paused, inmigrate, postmigrate, ..."""
        return self.call("query-status")["status"]

    def migration(self):
        """What query-migrate says; status "none" if there was none."""
        answer = self.call("query-migrate")
        return {"status": "none", **answer}

    def wait(self, condition, seconds, step=0.05):
        """Until condition() is true; asked again at each event, and each `step`. True if it was."""
        end = time.monotonic() + seconds
        while not condition():
            left = end - time.monotonic()
            if left <= 0:
                return False
            self.pump(min(step, left))
        return True

    def pump(self, seconds):
        """Takes in events, for at most `seconds` or until one has come."""
        if b"\n" not in self._input and not select.select([self._socket], [], [], seconds)[0]:
            return
        self._read(lambda message: "event" in message)

    def time_of(self, event, after=0.0):
        """When QEMU last sent this event, in seconds of its host's clock; None if it did not."""
        for name, when in reversed(self.events):
            if name == event and when >= after:
                return when
        return None

    def close(self):
        self._socket.close()

    def _read(self, wanted, seconds=CALL_SECONDS):
        end = time.monotonic() + seconds
        while True:
            while b"\n" in self._input:
                line, self._input = self._input.split(b"\n", 1)
                message = json.loads(line)
                if "event" in message:
                    stamp = message["timestamp"]
                    self.events.append((message["event"],
                                        stamp["seconds"] + stamp["microseconds"] / 1e6))
                if wanted(message):
                    return message
            left = end - time.monotonic()
            if left <= 0:
                raise QmpError(f"{self.what} does not answer")
            self._socket.settimeout(left)
            try:
                more = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError as e:
                raise QmpError(f"{self.what} is gone: {e}") from e
            if not more:
                raise QmpError(f"{self.what} has closed its monitor")
            self._input += more
