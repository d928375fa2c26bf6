"""migrate-vm.sh: the command line. What happens is in move.py and storage.py."""
import argparse
import os
import signal
import sys

from common import Problem, Usage, directory_of, locked, run_main
from hosts import Local, Ssh, read_vm
from move import Move
from qmp import Qmp
from report import Progress
from storage import move_storage

DESCRIPTION = """Moves a running VM that attach-vm.sh has started: its disks first, then its memory;
it runs at one place at any time. At the other host it has to wait: attach-vm.sh --incoming, with the
same disks and QEMU arguments. Whatever fails or ends this script before the disks are handed over
leaves the VM running here (after a kill -9 in the last moments: stopped, until this is run again or
--abort is). After that it belongs there, and running this again finishes what is left."""


def parse(arguments):
    p = argparse.ArgumentParser(prog="migrate-vm.sh", description=DESCRIPTION, allow_abbrev=False)
    add = p.add_argument
    add("name", metavar="NAME", help="the VM, as given to attach-vm.sh")
    add("host", metavar="HOST", nargs="?", help="where to: an ssh destination")
    add("--local", action="store_true",
        help="the other host is this one as well (another network namespace)")
    add("--ssh", metavar="COMMAND", default="ssh",
        help="how ssh is called, for example 'ssh -p 2222' (default: ssh)")
    add("--dir", help="attach-vm.sh's --dir here")
    add("--to-dir", metavar="DIR", help="attach-vm.sh's --dir there (default: as for NAME)")
    kinds = p.add_mutually_exclusive_group()
    kinds.add_argument("--memory-only", action="store_true",
                       help="both sides reach the same disks (attach-vm.sh --disk URI): move none")
    kinds.add_argument("--disk-only", metavar="[DISK=]URI|FILE", action="append",
                       help="the VM stays; its disk goes to an NBD server, or to a FILE here, and "
                            "is served from there (DISK: disk0, disk1, ...)")
    add("--scratch", metavar="DISK", action="append", default=[],
        help="do not copy this disk (disk0, disk1, ...): the VM finds it empty there")
    add("--memory-bandwidth", metavar="MIB", type=int, default=0,
        help="most MiB/s for the memory (default: what the link carries)")
    add("--downtime-limit", metavar="MS", type=int, default=300,
        help="for QEMU: stop the VM when the rest of the memory takes less than this (default: 300)")
    add("--before-cont", metavar="COMMAND",
        help="run this shell command here after the disks have been handed over and before the VM "
             "runs there (routes, firewalls); if it fails the VM runs there all the same")
    add("--keep-source", action="store_true", help="leave the stopped QEMU here alive at the end")
    add("--json", action="store_true", help="what it took as one JSON object instead of a table")
    add("--dry-run", action="store_true", help="name every obstacle; move nothing")
    add("--abort", action="store_true",
        help="undo what an earlier run has begun; the VM goes on here")
    options = p.parse_args(arguments)
    if options.disk_only:
        if options.host or options.local or options.abort or options.scratch:
            raise Usage("--disk-only goes with no HOST, --local, --scratch, --abort: the VM stays")
    elif bool(options.host) == options.local:
        raise Usage("where to? Name a HOST for ssh, or --local")
    options.dir = os.path.abspath(options.dir or directory_of(options.name))
    options.to_dir = options.to_dir or directory_of(options.name)
    if options.local and os.path.realpath(options.to_dir) == os.path.realpath(options.dir):
        raise Usage("--local needs --to-dir: the VM that waits has a directory of its own")
    return options


def interrupted(*_):
    raise KeyboardInterrupt


def nothing_left(options, other):
    """An earlier run has ended between its last step and saying so."""
    if os.path.exists(os.path.join(options.dir, "vm.json")):
        return False
    try:
        qemu = Qmp(other.socket(read_vm(other, options.to_dir)["qmp"]), f"QEMU {other.label}")
    except Problem:
        return False
    try:
        return qemu.status() == "running"
    finally:
        qemu.close()


def main():
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGHUP, interrupted)
    if not os.path.isdir(options.dir):
        raise Problem(f"no VM here: {options.dir} does not exist: start it with attach-vm.sh")
    with locked(os.path.join(options.dir, "move.lock"),
                "another migrate-vm.sh is at work on this VM"):
        if options.disk_only:
            return move_storage(options, read_vm(Local(), options.dir), Progress())
        other = Local("there") if options.local else Ssh(options.host, options.ssh)
        try:
            if nothing_left(options, other):
                print(f"{options.name} runs {other.label} already: nothing is left to do")
                return 0
            with Move(options, other, Progress()) as move:
                if options.abort:
                    return move.abort_earlier()
                return move.run()
        finally:
            other.close()


run_main("migrate-vm.sh", main)
