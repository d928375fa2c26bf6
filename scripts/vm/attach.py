"""attach-vm.sh: a QEMU guest on nbdferry disks.

One `nbdferry serve` for each disk, QEMU on their unix sockets, and vm.json, by which migrate-vm.sh
finds it all. Stays in the foreground. The end, by QEMU's or by a signal: QEMU first, then the disks,
which finish their requests and flush; exit code: QEMU's.
"""
import argparse
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

from common import Usage, directory_of, locked, nbdferry_program, need_program, run_main
from disks import Disk, in_uri
from ferry import Ferry, wait_served

DESCRIPTION = """Runs a QEMU guest on nbdferry disks, in the foreground. What is run is printed first,
so that it can be copied into a start-up of one's own. QEMU-ARGUMENTs are everything else about the
VM: -m, -accel, -smp, -nic, ... The programs are nbdferry (or $NBDFERRY) and qemu-system-x86_64 (or
$QEMU)."""
RETRIES_MAX = 5


def parse(arguments):
    p = argparse.ArgumentParser(prog="attach-vm.sh", description=DESCRIPTION, allow_abbrev=False)
    add = p.add_argument
    add("--name", required=True, help="the VM's name; migrate-vm.sh knows it by this")
    add("--disk", required=True, action="append", metavar="DISK", dest="disks",
        help="FILE[,format=raw|qcow2][,size=SIZE][,scratch=on], or the nbd:// or nbd+unix:// URI of a "
             "disk that another process serves. Repeatable; the guest sees them in this order as "
             "virtio disks. size= creates FILE, sparse, where it does not exist. scratch=on: nothing "
             "in it is worth keeping (swap): it does not move with the VM, which finds it empty")
    add("--incoming", action="store_true",
        help="wait for this VM to come from another host: give the same disks and QEMU arguments as "
             "there; files that do not exist yet need size=")
    add("--address", metavar="ADDRESS",
        help="with --incoming: the address of this host at which the disks come in")
    add("--memory-address", metavar="ADDRESS", help="and the memory (default: the same)")
    add("--port", type=int, default=10808,
        help="with --incoming: memory comes to this TCP port, the disks to those after it "
             "(default: 10808)")
    add("--dir", metavar="DIR", help="for sockets, logs and vm.json (default: /run/nbdferry/NAME)")
    add("--reconnect-delay", type=int, default=60, metavar="SECONDS",
        help="how long the guest's I/O waits for a disk's server that is gone (default: 60)")
    add("--print", action="store_true", help="say what would be run; run nothing")
    add("--print-libvirt", action="store_true",
        help="the disks as libvirt domain XML; run nothing")
    add("qemu", nargs="*", metavar="-- QEMU-ARGUMENT", help="the rest of QEMU's command line")
    options = p.parse_args(arguments)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", options.name):
        raise Usage(f"--name {options.name}: letters, digits, dots and dashes only")
    if not 0 < options.port < 65536 - len(options.disks):
        raise Usage(f"--port {options.port} leaves no room for the disks' ports after it")
    if options.incoming and not options.address:
        raise Usage("--incoming needs --address: where do the disks come in?")
    options.dir = os.path.abspath(options.dir or directory_of(options.name))
    if len(os.path.join(options.dir, "disk00.sock")) > 107:
        raise Usage(f"--dir {options.dir}: too long for the path of a unix socket")
    return options


def remove(*paths):
    for path in paths:
        pathlib.Path(path).unlink(missing_ok=True)


class Attached:
    """The processes of one VM."""

    def __init__(self, options):
        self.options = options
        self.disks = [Disk(text, number, options.dir)
                      for number, text in enumerate(options.disks)]
        self.served_here = [disk for disk in self.disks if disk.file]
        self.servers = []
        self.qemu = None
        self.qmp = os.path.join(options.dir, "qmp.sock")
        self.description = os.path.join(options.dir, "vm.json")
        self.go = os.path.join(options.dir, "go")

    def disk_address(self, disk):
        return f"{in_uri(self.options.address)}:{self.options.port + 1 + disk.number}"

    def serve_command(self, disk):
        at = self.disk_address(disk) if self.options.incoming else None
        return disk.serve_command(nbdferry_program(), at)

    def qemu_command(self):
        options = self.options
        command = [os.environ.get("QEMU", "qemu-system-x86_64"), "-name", options.name,
                   "-qmp", f"unix:{self.qmp.replace(',', ',,')},server=on,wait=off"]
        for disk in self.disks:
            command += disk.qemu_arguments(options.reconnect_delay)
        command += options.qemu
        return command + (["-S", "-incoming", "defer"] if options.incoming else [])

    def describe(self, runs=True):
        """Writes vm.json; runs: QEMU does."""
        options = self.options
        disks = [disk.describe(f"nbd://{self.disk_address(disk)}/{disk.name}"
                               if options.incoming else None) for disk in self.disks]
        memory = options.memory_address or options.address
        text = json.dumps({
            "name": options.name, "pid": os.getpid(), "disks": disks,
            "qmp": self.qmp if runs else None, "go": self.go,
            "memory": f"tcp:{in_uri(memory)}:{options.port}" if options.incoming else None,
        }, indent=2)
        with open(self.description + ".new", "w") as f:
            f.write(text + "\n")
        os.rename(self.description + ".new", self.description)

    def start_servers(self):
        for disk in self.served_here:
            if self.options.incoming and disk.scratch and os.path.isfile(disk.file):
                # Its content is worth nothing, by the operator's word: the VM finds it empty.
                size = os.path.getsize(disk.file)
                os.truncate(disk.file, 0)
                os.truncate(disk.file, size)
            # In a session of its own: Ctrl-C is for QEMU, the disks end after it.
            self.servers.append(subprocess.Popen(self.serve_command(disk), start_new_session=True,
                                                 stdin=subprocess.DEVNULL))
        for disk, server in zip(self.served_here, self.servers):
            wait_served(disk.control, disk.file, server)

    def waits_for_vm(self):
        """Nothing has arrived yet."""
        moved = [disk for disk in self.served_here if not disk.scratch]
        return self.options.incoming and any(
            Ferry(disk.control, disk.name).status()["role"] == "incoming" for disk in moved)

    def wait_for_disks(self):
        """QEMU looks into an image when it starts: of a format other than raw that has to be there.
        migrate-vm.sh says so, by a file, once the disks are in sync."""
        if not self.options.incoming or all(disk.format == "raw" for disk in self.disks):
            return
        self.describe(runs=False)
        while not os.path.exists(self.go):
            time.sleep(0.05)

    def run_qemu(self):
        """From QEMU's start to its end; its exit code."""
        remove(self.qmp, self.go)
        self.qemu = subprocess.Popen(self.qemu_command())
        while not os.path.exists(self.qmp) and self.qemu.poll() is None:
            time.sleep(0.02)
        if self.qemu.poll() is None:
            self.describe()
        code = self.qemu.wait()
        remove(self.description)
        return code

    def run(self):
        for retry in range(RETRIES_MAX + 1):
            self.wait_for_disks()
            begin = time.monotonic()
            code = self.run_qemu()
            # A VM that did not arrive takes its QEMU with it. The disks keep what they have.
            if time.monotonic() - begin < 1 or not self.waits_for_vm():
                break
            if retry < RETRIES_MAX:
                print("attach-vm.sh: QEMU ended before the VM had arrived; waiting again",
                      file=sys.stderr)
        return code if code >= 0 else 128 - code

    def stop(self):
        processes = [self.qemu] if self.qemu else []
        for group in (processes, self.servers):
            for process in group:
                if process.poll() is None:
                    process.terminate()
            for process in group:
                process.wait()
        remove(self.description, self.qmp, self.go)


class Stopped(Exception):
    """By a signal that asks for an orderly end."""


def stopped(*_):
    raise Stopped


def main():
    options = parse(sys.argv[1:])
    vm = Attached(options)
    if options.print_libvirt:
        print("\n".join(disk.libvirt_xml(options.reconnect_delay) for disk in vm.disks))
        return 0
    for command in [vm.serve_command(disk) for disk in vm.served_here] + [vm.qemu_command()]:
        print("+", shlex.join(command), flush=True)
    if options.print:
        return 0
    need_program(nbdferry_program())
    need_program(vm.qemu_command()[0])
    os.makedirs(options.dir, mode=0o700, exist_ok=True)
    with locked(os.path.join(options.dir, "lock"), f"a VM runs from {options.dir} already"):
        signal.signal(signal.SIGTERM, stopped)
        signal.signal(signal.SIGHUP, stopped)
        try:
            vm.start_servers()
            return vm.run()
        except Stopped:
            return 0
        finally:
            for end in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(end, signal.SIG_IGN)
            vm.stop()


run_main("attach-vm.sh", main)
