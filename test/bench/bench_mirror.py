"""The mirror under load, side by side with QEMU's (qemu-storage-daemon, both copy modes), each with
the same guest and, unless it is said otherwise, the same nbdkit as its target: mirror_cases.py and
mirror_pivots.py say what is tried.

A guest's latency counts from when a write was due (but see mirror_cases.py for one that is slowed
on purpose). Committed means that the target serves, by pivot; what the guest knows that it wrote
must then be there. The time on the wire is that of all bytes, the mirrored ones too, at the full
1 Gb/s. While it runs no processor ever halts (peers.awake): a virtual one is woken up milliseconds
late at times, and there are more of these wake-ups to wait for during a migration than before it.

Environment: MIRROR_CASES, names with commas between (all); MIRROR_SVG, where the plot of the case
`link` goes.
"""
import contextlib
import os
import pathlib

import latency_plot
from measure import say
from mirror_cases import CONTENDERS, LOOPBACK, Far, Hang, Link, Outrun, Tmpfs
from mirror_pivots import Pivots
from peers import awake, link

HOSTS = {"link", "outrun", "hang", "far"}  # what runs on two of them
NAMES = ("link", "tmpfs", "outrun", "hang", "far", "pivots")


def wanted(names):
    names = names or [name for name in os.environ.get("MIRROR_CASES", "").split(",") if name] or NAMES
    unknown = set(names) - set(NAMES)
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}; there are "
                         f"{', '.join(NAMES)}")
    if os.geteuid() != 0 and HOSTS & set(names):
        say(f"mirror: left out, as network namespaces need root: {', '.join(sorted(HOSTS & set(names)))}")
        names = [name for name in names if name not in HOSTS]
    return names


def plan(names):
    """[(case, a context that yields its prefixes)]"""
    loopback = contextlib.nullcontext(LOOPBACK)

    def wire():
        """Without a limit."""
        return link(rate=None)

    cases = {"link": [(Link("50ms"), link), (Link("5ms"), lambda: link("5ms"))],
             "tmpfs": [(Tmpfs("tmpfs", own_target=True), lambda: loopback),
                       (Tmpfs("tmpfs to nbdkit", own_target=False), lambda: loopback)],
             "outrun": [(Outrun(), link)],
             "hang": [(Hang(), wire)],
             "far": [(Far(), wire)]}
    return [entry for name in names for entry in cases.get(name, [])]


def bench(runs, names=()):
    """names: the cases; without: as the environment says."""
    names = wanted(names)
    cases = plan(names)
    pivots = Pivots()
    with awake():
        for run in range(runs):
            say(f"mirror: run {run + 1}/{runs}")
            for case, place in cases:
                with place() as prefixes:
                    case.run(run, prefixes)
            if "pivots" in names:
                pivots.run(runs)
    if "link" in names:
        plot(cases[[type(case) for case, _ in cases].index(Link)][0])
    for case, _ in cases:
        yield from case.results()
    if "pivots" in names:
        yield from pivots.results()


def plot(case):
    """Of the last run."""
    path = pathlib.Path(os.environ["MIRROR_SVG"])
    series = {name: (case.rows[name][-1]["windows"], case.rows[name][-1]["seconds"])
              for name in CONTENDERS}
    path.write_text(latency_plot.draw(
        "1 GiB over 1 Gb/s (queue of 50 ms) under 2,000 random writes of 4 KiB a second", series),
        encoding="utf-8")
    say(f"mirror: {path} shows the case link of the last run")
