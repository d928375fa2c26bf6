"""Everything that is in the way of a move is named, in one line each, before anything starts. QEMU without
a guest system: nothing of it runs."""
import os
import re
import sys

from hosts import ATTACH, MIGRATE, NAME, ferry, migrate, migrate_ok, two_hosts

QEMU = ["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-m", "32"]

OTHER = "nbd://10.78.2.2:11000/"


def lines(result, *patterns):
    """It refused, with exactly these lines."""
    ferry.check(result.returncode == 1, f"exit {result.returncode}: {result.stderr}")
    said = [line for line in result.stderr.splitlines() if line.startswith("migrate-vm.sh: ")]
    ferry.check(len(said) == len(patterns), f"{len(patterns)} lines expected: {result.stderr}")
    for pattern in patterns:
        ferry.check(any(re.search(pattern, line) for line in said),
                    f"no line with {pattern!r}: {result.stderr}")


def start(here, there, disks=("8M",), there_disks=None, qemu=(), there_qemu=None):
    here.attach([f"{here.disk(n)},size={size}" for n, size in enumerate(disks)], [*QEMU, *qemu])
    there.attach([f"{there.disk(n)},size={size}"
                  for n, size in enumerate(disks if there_disks is None else there_disks)],
                 [*QEMU, *(qemu if there_qemu is None else there_qemu)], incoming=True)


def stop(*hosts):
    for host in hosts:
        host.stop()
        for name in os.listdir(host.folder):
            if name != "vm":
                os.unlink(os.path.join(host.folder, name))


def nothing_in_the_way(here, there):
    start(here, there)
    ferry.check("nothing is in the way" in migrate_ok(here, there, "--dry-run").stderr, "dry run")
    ferry.check(here.status(0)["phase"] == "idle", "a dry run has started something")
    stop(here, there)


def shape(here, there):
    start(here, there, disks=("8M", "8M"), there_disks=("8M",))
    lines(migrate(here, there), "2 disks here and 1")
    lines(migrate(here, there, "--scratch", "disk9"), "2 disks here and 1")
    stop(here, there)
    start(here, there, disks=("8M", "8M"), there_disks=("4M", "8M"))
    lines(migrate(here, there), "disk0 .*smaller: 4194304 bytes, and here 8388608")
    lines(migrate(here, there, "--scratch", "disk9"), "there is no such disk", "smaller")
    lines(migrate(here, there, "--scratch", "disk0"), "scratch on one side only")
    lines(migrate(here, there, "--memory-only"), "disk0: --memory-only", "disk1: --memory-only")
    stop(here, there)


def machines(here, there):
    start(here, there, there_qemu=["-m", "64", "-smp", "2", "-machine", "q35"])
    lines(migrate(here, there), "the memory differs", "machine type differs",
          "number of processors differs")
    stop(here, there)


def states(here, there):
    start(here, there)
    # Both ways round: the one that waits cannot be moved, the one that runs takes no VM.
    lines(migrate(there, here), "is inmigrate, not running", "does not wait for one",
          "disk0 here is incoming", "not incoming: what it holds counts", "takes no migration")
    ferry.run_ok([ferry.NBDFERRY, "promote", "--control", f"{there.vm_folder}/disk0.ctl"])
    lines(migrate(here, there), "is owner, not incoming")
    stop(there)
    lines(migrate(here, there), "no VM there: .*vm.json: No such file")
    stop(here)
    lines(migrate(here, there), "no VM here")


def link(here, there):
    """The other host's address is not reached: its card is off."""
    start(here, there)
    ferry.run_ok(["ip", "-n", there.namespace, "addr", "del", f"{there.disk_address}/24", "dev",
                  f"nv1b{os.getpid()}"])
    lines(migrate(here, there), "cannot reach nbd://")
    ferry.run_ok(["ip", "-n", there.namespace, "addr", "add", f"{there.disk_address}/24", "dev",
                  f"nv1b{os.getpid()}"])
    stop(here, there)


def another_at_work(here, there):
    start(here, there)
    other = here.scratch.start("other", [*there.prefix, "nbdkit", "-f", "-p", "11000", "memory", "8M"])
    ferry.wait_until(lambda: ferry.run([*here.prefix, "nbdinfo", "--size", OTHER]).returncode == 0,
                     "nbdkit")
    ferry.run_ok([ferry.NBDFERRY, "migrate", "--control", f"{here.vm_folder}/disk0.ctl", OTHER])
    lines(migrate(here, there), "is on its way to nbd://.*:11000/ already: cancel that")
    ferry.run_ok([ferry.NBDFERRY, "cancel", "--control", f"{here.vm_folder}/disk0.ctl"])
    here.scratch.stop(other)
    stop(here, there)


def cannot_be_attached(here, _):
    def refused(because, *options, code=1):
        result = ferry.run([ATTACH, "--name", NAME, "--dir", here.vm_folder, *options, "--", *QEMU])
        ferry.check(result.returncode == code, f"exit {result.returncode}: {result.stderr}")
        ferry.check(because in result.stderr, f"{because!r} is not in: {result.stderr}")
    refused("no such file", "--disk", here.disk(7))
    refused("is not served: the reason is above", "--disk", here.disk(7))
    refused("none of format", "--disk", here.disk(7) + ",format=vmdk", code=2)
    refused("--incoming needs --address", "--incoming", "--disk", here.disk(7), code=2)
    refused("letters, digits", "--name", "a/b", "--disk", here.disk(7), code=2)
    here.attach([f"{here.disk(0)},size=8M"], QEMU)
    refused("runs from", "--disk", here.disk(0))
    stop(here)


def wrong_usage(here, _):
    for options in (["x"], ["x", "--local"], ["x", "host", "--local"],
                    ["x", "host", "--disk-only", "y"]):
        result = ferry.run([MIGRATE, *options, "--to-dir", here.vm_folder, "--dir",
                            here.vm_folder])
        ferry.check(result.returncode == 2, f"{options}: {result.stderr}")


def main():
    if os.geteuid() != 0:
        print("SKIPPED: network namespaces need root", file=sys.stderr)
        sys.exit(77)
    with two_hosts() as (_, hosts):
        for scene in (nothing_in_the_way, shape, machines, states, link, another_at_work,
                      cannot_be_attached, wrong_usage):
            print("---", scene.__name__, flush=True)
            scene(*hosts)


main()
