"""What the guest says on its serial console, and when it came: one guest, any number of QEMUs, one
after the other. Standard library only.

Each QEMU connects to its own socket. A later one continues the text of the earlier one where that
stopped, in the middle of a line perhaps: the serial port moves with the guest. One thread reads all,
at once, and stamps each line with the host's clock: the guest's own stands still while the guest is
stopped, so the jump between the two is how long it was.
"""
import collections
import contextlib
import math
import os
import re
import selectors
import socket
import statistics
import threading
import time

Progress = collections.namedtuple("Progress", "acknowledged synced")
Status = collections.namedtuple(
    "Status", "host t_ms a b gap_us write_a sync_a write_b sync_b")
Qemu = collections.namedtuple("Qemu", "number listener connected")
STATUS = re.compile(r"t=(\d+) a=(\d+),(\d+) b=(\d+),(\d+) gap_us=(\d+)"
                    r" write_a=([\d,]+) sync_a=([\d,]+) write_b=([\d,]+) sync_b=([\d,]+)")
WINDOW = 4  # status lines: the least delayed of so many counts


class GuestError(Exception):
    """The guest found something wrong, or is gone."""


def parse(line, host):
    found = STATUS.fullmatch(line)
    if not found:
        return None
    t, a, a_synced, b, b_synced, gap = map(int, found.groups()[:6])
    latencies = (tuple(map(int, text.split(","))) for text in found.groups()[6:])
    return Status(host, t, Progress(a, a_synced), Progress(b, b_synced), gap, *latencies)


class Console:
    def __init__(self, seed=1):
        self.seed = seed
        self.lines = []  # (host time, text), whole ones
        self.statuses = []
        self.errors = []
        self.done = None  # (last record on A, on B) after a clean stop
        self._partial = b""
        self._live = None  # the connection that spoke last
        self._open, self._ended = 0, 0  # QEMUs that may still speak, and that no longer will
        self._silent = set()  # connections over which nothing has come yet
        self._changed = threading.Condition()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._running = True
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._running = False
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def listen(self, path):
        """The socket for one more QEMU, to be listened on before that is started. Its path."""
        path = str(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        with self._changed:
            self._open += 1
            number = self._open + self._ended
        self._selector.register(listener, selectors.EVENT_READ, Qemu(number, listener, False))
        return path

    def _read(self):
        while self._running:
            # In the order in which they came: the earlier QEMU's last bytes go before the later's.
            ready = sorted((key for key, _ in self._selector.select(timeout=0.1)),
                           key=lambda key: key.data.number)
            for key in ready:
                if not key.data.connected:
                    connection, _ = key.fileobj.accept()
                    self._silent.add(connection)
                    self._selector.unregister(key.fileobj)
                    self._selector.register(connection, selectors.EVENT_READ,
                                            key.data._replace(connected=True))
                    continue
                try:
                    data = key.fileobj.recv(65536)
                except OSError:
                    data = b""
                if data:
                    self._take(key.fileobj, data, time.monotonic())
                else:
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()
                    if key.fileobj in self._silent:
                        # The guest never ran there: another QEMU may come in its place.
                        self._silent.remove(key.fileobj)
                        self._selector.register(key.data.listener, selectors.EVENT_READ,
                                                key.data._replace(connected=False))
                        continue
                    key.data.listener.close()
                    with self._changed:
                        self._open, self._ended = self._open - 1, self._ended + 1
                        if self._live is key.fileobj:
                            self._live = None
                        self._changed.notify_all()

    def _take(self, connection, data, host):
        with self._changed:
            self._live = connection
            self._silent.discard(connection)
            *lines, self._partial = (self._partial + data).split(b"\n")
            for line in lines:
                self.take_line(line.decode(errors="replace").strip("\r"), host)
            self._changed.notify_all()

    def take_line(self, line, host):
        self.lines.append((host, line))
        status = parse(line, host)
        if status:
            self.statuses.append(status)
        elif line.startswith("error ") or "Kernel panic" in line:
            self.errors.append(line)
        elif (found := re.match(r"up seed=(\d+)", line)) and int(found.group(1)) != self.seed:
            self.errors.append(f"{line}: but its disks were made with seed {self.seed}")
        elif found := re.fullmatch(r"done a=(\d+) b=(\d+)", line):
            self.done = tuple(map(int, found.groups()))

    @property
    def last(self):
        return self.statuses[-1] if self.statuses else None

    @property
    def text(self):
        return "\n".join(line for _, line in self.lines)

    def raise_errors(self):
        if self.errors:
            raise GuestError("the guest says: " + "; ".join(self.errors[:5]))

    def wait(self, condition, what, seconds):
        """Until `condition()`; raises on an error of the guest's, and when the time is over."""
        end = time.monotonic() + seconds
        with self._changed:
            while not condition():
                self.raise_errors()
                left = end - time.monotonic()
                gone = self._ended and not self._open
                if gone or left <= 0:
                    why = "its QEMU has ended" if gone else f"waited {seconds} s"
                    said = "\n".join(line for _, line in self.lines[-15:])
                    raise GuestError(f"in vain for {what}: {why}; the guest said last:\n{said}")
                self._changed.wait(min(left, 0.5))
            self.raise_errors()

    def wait_up(self, seconds=60):
        self.wait(lambda: self.statuses, "the guest to come up", seconds)

    def wait_progress(self, records=50, seconds=30):
        """Both disks took so many records more."""
        with self._changed:
            a, b = (self.last.a.acknowledged, self.last.b.acknowledged) if self.last else (0, 0)
        self.wait(lambda: self.last and self.last.a.acknowledged >= a + records
                  and self.last.b.acknowledged >= b + records,
                  f"{records} records more than {a} and {b}", seconds)

    def wait_for(self, pattern, seconds=30):
        """A line that has `pattern`, from the beginning on."""
        seek = re.compile(pattern)
        self.wait(lambda: any(seek.search(line) for _, line in self.lines), pattern, seconds)

    def wait_end(self, seconds=20):
        """All that its last QEMU said before it ended has been read."""
        self.wait(lambda: self._live is None, "the guest's QEMU to end", seconds)

    def stop(self, seconds=60):
        """The guest reads everything back, unmounts and powers off. (last record on A, on B)."""
        with self._changed:
            if self._live is None:
                raise GuestError("no QEMU of the guest's is connected")
            self._live.sendall(b"stop\n")
        self.wait(lambda: self.done, "the guest to stop", seconds)
        return self.done

    def _between(self, since, until):
        return [s for s in list(self.statuses) if since <= s.host <= until]

    def longest_gap(self, since=0, until=math.inf):
        """Seconds between two turns of the guest's loop, by the guest's clock."""
        return max((s.gap_us for s in self._between(since, until)), default=0) / 1e6

    def longest_stop(self, since=0, until=math.inf):
        """Seconds for which the guest's clock stood still. A line can be late, never early: the
        least difference of the clocks among a few lines is the true one, to a millisecond or so."""
        offsets = [s.host - s.t_ms / 1e3 for s in self._between(since, until)]
        # Lines before and after each place; the jump lies between the two.
        jumps = (min(offsets[i:i + WINDOW]) - min(offsets[max(0, i - WINDOW):i])
                 for i in range(1, len(offsets)))
        return max(jumps, default=0)

    def latency(self, what, since=0, until=math.inf):
        """(count, median, p99, max) in microseconds of write_a, sync_a, write_b or sync_b: the
        periods' counts added up, the median of their medians, the worst p99 and maximum."""
        found = [getattr(s, what) for s in self._between(since, until) if getattr(s, what)[0]]
        if not found:
            return (0, 0, 0, 0)
        counts, medians, p99s, most = zip(*found)
        return (sum(counts), int(statistics.median(medians)), max(p99s), max(most))

    def rate(self, disk, since=0, until=math.inf):
        """Records a second on disk "a" or "b", by the host's clock: stops count."""
        found = self._between(since, until)
        if len(found) < 2:
            return 0
        records = getattr(found[-1], disk).acknowledged - getattr(found[0], disk).acknowledged
        return records / (found[-1].host - found[0].host)
