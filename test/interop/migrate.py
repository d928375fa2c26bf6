#!/usr/bin/env python3
"""A migration under a verified write load, to a real server, and the switchover.

usage: migrate.py SERVER MODE pivot|release
       SERVER: qemu-nbd nbdkit-file nbdkit-memory nbd-server nbd-server-noflush; MODE: async sync

Pivot: the same guest connection goes on, every read of it checked, and in the end the target equals
what the guest knows that it wrote. Release: the guest is told ESHUTDOWN, and source and target are
one and the same, and what the guest had acknowledged.
"""
import sys
import time

import ferry
from ferry import check


def pivot(disk, load, target_image, read_target):
    disk.ok("switch", "--pivot")
    time.sleep(1)  # the guest goes on, from the target
    load.running()
    status = disk.status()
    check(status["role"] == "pivoted" and status["serving"] == "target", f"after pivot: {status}")
    statistics = load.end()
    check(statistics["writes"] > 0, "the guest wrote nothing")
    disk.stop()
    read_target()
    ferry.same(load.shadow, target_image, "the target against what the guest wrote")


def release(disk, load, target_image, read_target):
    disk.ok("switch", "--release")
    ferry.wait_until(lambda: load.process.poll() is not None, "the guest learns of the release")
    load.end()
    status = disk.status()
    check(status["role"] == "retired" and status["serving"] == "nobody", f"released: {status}")
    disk.stop()
    read_target()
    ferry.same(disk.disk, target_image, "source against target")
    ferry.same(load.shadow, target_image, "the target against what the guest wrote")


def refused(disk, load):
    """A target without flush can't keep what was promised to the guest: who serves does not change."""
    disk.fails("switch", "--pivot", because=["cannot switch", "flush"])
    load.running()
    check(disk.status()["serving"] == "source", "the refusal changed who serves")


def main(server, mode, kind):
    with ferry.Scratch() as scratch:
        image = scratch.disk("source.img")
        target_image = scratch.garbage("target.img")
        disk = ferry.Ferry(scratch, image)
        more = ["--until-shutdown"] if kind == "release" else ["--compare"]
        load = ferry.Load(scratch, disk.uri, image, "--rate", "2000", "--depth", "16", *more)
        with ferry.target(scratch, server, target_image) as (uri, read_target):
            time.sleep(0.3)
            disk.ok("migrate", "--wait", "--mode", mode, uri)
            load.running()
            time.sleep(0.3)
            if server == "nbd-server-noflush" and kind == "pivot":
                refused(disk, load)
                disk.ok("cancel")
                load.end()
                disk.stop()
                ferry.same(load.shadow, image, "the source after a refused pivot")
            else:
                {"pivot": pivot, "release": release}[kind](disk, load, target_image, read_target)


main(*sys.argv[1:])
