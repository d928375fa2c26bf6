"""The way to the target: several wires at once, one that is cut, a long one, a limit on the rate, and what
a mirrored write waits for beside the copy. transport_cases.py says what is tried.

Each case with wires has network namespaces of its own, with wires of a given rate (tbf) whose queue is 50 ms long.
A rate is that of the payload which the target has answered; a wire of 1 Gb/s carries at most 119 MB/s of
it, the rest is headers. `whole` counts from the start of the command until in sync, `steady` from when a
tenth of the disk was there until nine tenths were.

Environment: TRANSPORT_CASES, names with commas between (all).
"""
import contextlib
import os

from measure import say
from peers import awake, hosts
from transport_cases import CASES


def wanted():
    names = [name for name in os.environ.get("TRANSPORT_CASES", "").split(",") if name] or list(CASES)
    unknown = set(names) - set(CASES)
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    return names


def bench(runs):
    if os.geteuid() != 0:
        say("transport: left out: network namespaces need root")
        return
    cases = [CASES[name]() for name in wanted()]
    with awake():
        for run in range(runs):
            say(f"transport: run {run + 1}/{runs}")
            for case in cases:
                # Without a wire it is all on this host, and has all its processors.
                with hosts(case.rates) if case.rates else contextlib.nullcontext() as pair:
                    case.run(run, pair)
    for case in cases:
        yield from case.results()
