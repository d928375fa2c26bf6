#!/usr/bin/env python3
"""Runs the benches that are named and prints what they found: a table, and a line of JSON for each
result. Started by scripts/bench.sh, which builds what is measured.

usage: bench.py [--runs N] copy|link|mirror|transport|memory|front|vm...

`link` is the first case of `mirror`, alone.
"""
import argparse
import importlib
import json
import os
import signal
import sys
import time

import bench_mirror
from measure import print_table, say


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=positive, default=10)
    parser.add_argument("names", nargs="+", choices=[
        "copy", "link", "mirror", "transport", "memory", "front", "vm"])
    arguments = parser.parse_args()
    # So that processes, namespaces and files go in every case.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = []
    for name in arguments.names:
        begin = time.monotonic()
        say(f"{name}: {arguments.runs} runs; load of the machine "
            f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
        if name == "link":
            results += bench_mirror.bench(arguments.runs, ("link",))
        else:
            results += importlib.import_module("bench_" + name).bench(arguments.runs)
        say(f"{name}: took {time.monotonic() - begin:.0f} s")
    print_table(results)
    print()
    for result in results:
        print(json.dumps(result.summary()))


main()
