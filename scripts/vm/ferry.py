"""nbdferry's control socket: HTTP with JSON over a unix socket (proxy/README.md)."""
import contextlib
import http.client
import json
import socket
import time

from common import Problem

REFUSED = (400, 404, 409)
COMMAND_SECONDS = 120  # a prepare may wait for the target
SECONDS_TO_SERVE = 20


class FerryError(Problem):
    """A command was refused, or the process did not answer."""


class FerryRefused(FerryError):
    """It answered: no. The disk is as before."""


class Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("nbdferry", timeout=COMMAND_SECONDS)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Ferry:
    """Its connection stays open: while a VM stands still, another would cost a round trip to the
    other host. For one thread at a time.
    """

    def __init__(self, path, what):
        self.path = path
        self.what = what  # for messages: "disk0 at the source"
        self.connection = None

    def status(self):
        return self._ask("GET", "/status")

    def command(self, name, **fields):
        """migrate, switch, promote, cancel, ...: returns when it is done."""
        return self._ask("POST", "/" + name, fields)

    def _ask(self, method, where, body=None):
        try:
            response, answer = self._exchange(method, where, body)
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise FerryError(f"{self.what}: its nbdferry at {self.path} does not answer: "
                             f"{e or type(e).__name__}") from e
        if response.status in REFUSED:
            raise FerryRefused(f"{self.what}: {answer.get('error', response.reason)}")
        if response.status != 200:
            raise FerryError(f"{self.what}: {where}: {response.status} {response.reason}")
        return answer

    def _exchange(self, method, where, body):
        """Commands can be repeated: one that finds the open connection dead is sent once more."""
        text = json.dumps(body) if body is not None else None
        while True:
            fresh = self.connection is None
            try:
                self.connection = self.connection or Connection(self.path)
                self.connection.request(method, where, text)
                response = self.connection.getresponse()
                return response, json.loads(response.read() or b"{}")
            except (ConnectionError, http.client.HTTPException):
                self.close()
                if fresh:
                    raise
            except (OSError, ValueError):
                self.close()
                raise

    def close(self):
        if self.connection:
            self.connection.close()
            self.connection = None


def wait_served(control, file, server):
    """Until `server`, an `nbdferry serve` that has just been started, answers. Raises Problem."""
    end = time.monotonic() + SECONDS_TO_SERVE
    while True:
        try:
            with contextlib.closing(Ferry(control, file)) as ferry:
                ferry.status()
            return
        except FerryError as e:
            if server.poll() is not None:
                raise Problem(f"{file} is not served: the reason is above") from e
            if time.monotonic() > end:
                raise Problem(f"{file}: no answer from its server in {SECONDS_TO_SERVE} s") from e
        time.sleep(0.02)
