#!/usr/bin/env python3
"""Real clients at the front. usage: front.py nbdinfo|nbdcopy|qemu-img|qemu-io|fio"""
import json
import os
import sys

import ferry
from ferry import MIB, check, run_ok


def nbdinfo(scratch):
    image = scratch.disk("disk.img")
    disk = ferry.Ferry(scratch, image, "--export", "vm", "--listen", "127.0.0.1:0",
                       "--socket", image + ".sock")
    export, = json.loads(run_ok(["nbdinfo", "--json", ferry.unix_uri(disk.socket, "vm")]))["exports"]
    check(export["export-size"] == 64 * MIB, f"the size: {export}")
    for feature in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df",
                    "can_cache", "can_fast_zero"):
        check(export[feature], f"{feature} is not offered")
    check(not export["is_read_only"], "it is not read-only")
    check("base:allocation" in export["contexts"], f"contexts: {export['contexts']}")
    names = [e["export-name"] for e in
             json.loads(run_ok(["nbdinfo", "--json", "--list", disk.uri]))["exports"]]
    check(names == ["vm"], f"exports: {names}")
    # Over TCP, at the port that was chosen.
    port = scratch.log("ferry").split("127.0.0.1:")[1].split(";")[0]
    size = run_ok(["nbdinfo", "--size", f"nbd://127.0.0.1:{port}/vm"])
    check(int(size) == 64 * MIB, f"over TCP: {size}")
    extents = json.loads(run_ok(["nbdinfo", "--map", "--json", ferry.unix_uri(disk.socket, "vm")]))
    check(sum(e["length"] for e in extents) == 64 * MIB, "the map covers the disk")
    check({e["type"] for e in extents} == {0, 3}, "data and holes are told apart")
    disk.stop()


def nbdcopy(scratch):
    image = scratch.disk("disk.img")
    other = scratch.disk("other.img", seed=2)
    out = scratch.file("out.img")
    disk = ferry.Ferry(scratch, image)
    run_ok(["nbdcopy", disk.uri, out])
    ferry.same(image, out, "copied out")
    run_ok(["nbdcopy", "--flush", other, disk.uri])
    disk.stop()
    ferry.same(image, other, "copied in")


def qemu_img(scratch):
    image = scratch.disk("disk.img")
    other = scratch.disk("other.img", seed=2)
    disk = ferry.Ferry(scratch, image)
    info = json.loads(run_ok(["qemu-img", "info", "--output=json", disk.uri]))
    check(info["virtual-size"] == 64 * MIB, f"info: {info}")
    run_ok(["qemu-img", "compare", "-f", "raw", "-F", "raw", image, disk.uri])
    qcow2 = scratch.file("out.qcow2")
    run_ok(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.uri, qcow2])
    run_ok(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk.uri, qcow2])
    run_ok(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", other, disk.uri])
    check(json.loads(run_ok(["qemu-img", "map", "--output=json", "-f", "raw", disk.uri])), "a map")
    disk.stop()
    ferry.same(image, other, "converted in")


def qemu_io(scratch):
    image = scratch.disk("disk.img")
    disk = ferry.Ferry(scratch, image)

    def io(*commands):
        arguments = [word for command in commands for word in ("-c", command)]
        text = run_ok(["qemu-io", "-f", "raw", *arguments, disk.uri])
        check("rror" not in text and "failed" not in text, f"{commands}: {text}")

    io("write -P 0xab 0 1M", "read -P 0xab 0 1M", "flush")
    io("write -f -P 0xcd 4097k 3k", "read -P 0xcd 4097k 3k")
    io("aio_write -P 0x11 8M 64k", "aio_write -P 0x22 9M 64k", "aio_flush",
       "read -P 0x11 8M 64k", "read -P 0x22 9M 64k")
    io("write -z 0 512k", "read -P 0 0 512k", "read -P 0xab 512k 512k")
    io("write -z -u 512k 256k", "read -P 0 512k 256k")
    io("discard 768k 256k", "read -P 0 768k 256k")
    disk.stop()
    with open(image, "rb") as f:
        check(f.read(MIB) == bytes(MIB), "zeroed and discarded on the disk")
        f.seek(8 * MIB)
        check(f.read(65536) == b"\x11" * 65536, "written on the disk")


def fio(scratch):
    image = scratch.disk("disk.img")
    disk = ferry.Ferry(scratch, image)
    text = run_ok(["fio", "--name=verify", "--ioengine=nbd", "--uri=" + disk.uri, "--rw=randwrite",
                   "--bsrange=512-64k", "--bs_unaligned=0", "--iodepth=16", "--size=64M",
                   "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--output-format=json"],
                  seconds=120)
    job = json.loads(text[text.index("{"):])["jobs"][0]
    check(job["error"] == 0 and job["write"]["io_bytes"] == 64 * MIB, f"fio: {job['error']}")
    disk.stop()


def main(client):
    os.environ["HOME"] = "/nonexistent"  # no client's own configuration
    with ferry.Scratch() as scratch:
        os.chdir(scratch.path)
        {"nbdinfo": nbdinfo, "nbdcopy": nbdcopy, "qemu-img": qemu_img, "qemu-io": qemu_io,
         "fio": fio}[client](scratch)
        os.chdir("/")


main(*sys.argv[1:])
