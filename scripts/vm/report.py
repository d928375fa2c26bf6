"""What the operator sees: one line of progress that changes, lines that stay, a table at the end."""
import sys
import time

MIB = 1024 * 1024


class Progress:
    def __init__(self):
        self.terminal = sys.stderr.isatty()
        self.shown = 0.0
        self.width = 0

    def line(self, text):
        """Replaces the line before, on a terminal; elsewhere one line every few seconds."""
        now = time.monotonic()
        if self.terminal:
            print("\r" + text.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width = len(text)
        elif now - self.shown >= 5:
            print(text, file=sys.stderr, flush=True)
            self.shown = now

    def say(self, text):
        """A line that stays."""
        if self.terminal and self.width:
            print("\r" + " " * self.width + "\r", end="", file=sys.stderr)
            self.width = 0
        print(text, file=sys.stderr, flush=True)
        self.shown = 0.0


def bytes_text(count):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def milliseconds(seconds):
    return "unknown" if seconds is None else f"{seconds * 1000:.1f} ms"


def table(rows):
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}   {value}" for name, value in rows)
