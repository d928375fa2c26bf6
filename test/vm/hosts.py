"""Two hosts of network namespaces with two links, one for the disks and one for the memory, and VMs on
them, attached and moved by the very scripts that users run."""
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

TREE = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TREE / "test/interop"))
import ferry  # noqa: E402  (it needs the path)

ATTACH = str(TREE / "scripts/attach-vm.sh")
MIGRATE = str(TREE / "scripts/migrate-vm.sh")
NAME = "guest"
RATE = "1gbit"


class Host:
    """One side: its namespace, its addresses, its folder."""

    def __init__(self, scratch, number):
        self.scratch, self.number = scratch, number
        self.namespace = f"nbdferry-vm{number}-{os.getpid()}"
        self.prefix = ["ip", "netns", "exec", self.namespace]
        self.disk_address, self.memory_address = f"10.78.1.{number}", f"10.78.2.{number}"
        self.folder = scratch.file(f"host{number}")
        os.mkdir(self.folder)
        self.vm_folder = os.path.join(self.folder, "vm")
        self.attached = None
        self.lives = 0

    def disk(self, number):
        return os.path.join(self.folder, f"disk{number}.img")

    def attach(self, disks, qemu, *options, incoming=False):
        """Starts attach-vm.sh; disks: what each --disk says. Waits for vm.json."""
        self.lives += 1
        self.log = f"attach{self.number}.{self.lives}"
        command = [*self.prefix, ATTACH, "--name", NAME, "--dir", self.vm_folder, *options]
        for disk in disks:
            command += ["--disk", disk]
        if incoming:
            command += ["--incoming", "--address", self.disk_address,
                        "--memory-address", self.memory_address]
        self.attached = self.scratch.start(self.log, [*command, "--", *qemu])
        self.wait_described()

    def wait_described(self):
        path = os.path.join(self.vm_folder, "vm.json")
        ferry.wait_until(lambda: self.attached.poll() is not None or os.path.exists(path),
                         "attach-vm.sh")
        ferry.check(self.attached.poll() is None,
                    "attach-vm.sh ended: " + self.scratch.log(self.log))

    def wait_end(self, seconds=20):
        """attach-vm.sh ends by itself, when QEMU has ended."""
        code = self.attached.wait(timeout=seconds)
        ferry.check(code == 0, f"attach-vm.sh ended with {code}: {self.scratch.log(self.log)}")

    def stop(self):
        if self.attached and self.attached.poll() is None:
            ferry.check(self.scratch.stop(self.attached) == 0,
                        "attach-vm.sh: " + self.scratch.log(self.log))

    def server_pid(self, disk):
        """Of the `nbdferry serve` of a disk: a child of attach-vm.sh."""
        control = f"{self.vm_folder}/disk{disk}.ctl"
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                words = pathlib.Path(f"/proc/{int(name)}/cmdline").read_bytes().split(b"\0")
                if b"serve" in words and control.encode() in words:
                    return int(name)
        raise AssertionError(f"nobody serves {control}")

    def status(self, disk):
        return json.loads(ferry.run_ok([ferry.NBDFERRY, "status", "--json", "--control",
                                        f"{self.vm_folder}/disk{disk}.ctl"]))


@contextlib.contextmanager
def two_hosts(rate=RATE):
    """Yields (scratch, [host, host])."""
    with ferry.Scratch() as scratch:
        hosts = [Host(scratch, 1), Host(scratch, 2)]
        try:
            for host in hosts:
                ferry.run_ok(["ip", "netns", "add", host.namespace])
            for link in (1, 2):
                ends = [f"nv{link}{side}{os.getpid()}" for side in "ab"]
                ferry.wire([host.namespace for host in hosts], ends,
                           [f"10.78.{link}.{host.number}/24" for host in hosts])
                for host, end in zip(hosts, ends):
                    ferry.limit_rate(host.namespace, end, rate)
            yield scratch, hosts
        finally:
            for host in hosts:
                # Orderly, so that it takes its QEMU and its servers with it.
                if host.attached and host.attached.poll() is None:
                    host.attached.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        host.attached.wait(timeout=20)
            for host in hosts:
                ferry.run(["ip", "netns", "del", host.namespace])


def migrate_command(source, target, *options):
    return [*source.prefix, MIGRATE, NAME, "--local", "--dir", source.vm_folder, "--to-dir",
            target.vm_folder, *options]


def migrate(source, target, *options, seconds=180):
    """Runs migrate-vm.sh to its end."""
    return ferry.run(migrate_command(source, target, *options), seconds)


def migrate_ok(source, target, *options, seconds=180):
    result = migrate(source, target, *options, seconds=seconds)
    ferry.check(result.returncode == 0, f"migrate-vm.sh: exit {result.returncode}: "
                f"{result.stderr}{result.stdout}")
    return result


def wait_for(condition, what, process, seconds=120):
    """Until condition(), while `process` still runs."""
    end = time.monotonic() + seconds
    while not condition():
        ferry.check(process.poll() is None, f"it ended before {what}")
        ferry.check(time.monotonic() < end, f"waited {seconds} s in vain: {what}")
        time.sleep(0.02)
