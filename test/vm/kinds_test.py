"""The kinds of move, each with a real guest of its own: by ssh, qcow2 above our export, a scratch disk,
memory that changes all the time, memory only, disk only."""
import contextlib
import os
import pathlib
import shutil
import sys

import guest
from hosts import MIGRATE, NAME, ferry, migrate_ok
from world import World, chosen, on_two_hosts

SSH_PORT = 2222
# Not installed for the tests' sake: that would open a port of this machine to the world.
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin")


def moved(world, *options):
    """There and back."""
    for _ in range(2):
        world.wait_there()
        print(migrate_ok(world.here, world.there, *options).stdout, flush=True)
        world.arrived()


@contextlib.contextmanager
def ssh_server(scratch, host):
    """On `host`; yields the ssh command that reaches it. Keys of its own, nothing of this machine's."""
    keys = pathlib.Path(scratch.file("ssh"))
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        ferry.run_ok(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)])
    address = host.memory_address
    shutil.copy(keys / "user.pub", keys / "authorized")
    (keys / "known").write_text(
        f"[{address}]:{SSH_PORT} " + " ".join((keys / "host.pub").read_text().split()[:2]) + "\n")
    (keys / "sshd").write_text(f"""ListenAddress {address}:{SSH_PORT}
HostKey {keys}/host
AuthorizedKeysFile {keys}/authorized
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
""")
    # Where privilege separation wants it, and a machine without a running sshd has none.
    made = not os.path.isdir("/run/sshd")
    os.makedirs("/run/sshd", exist_ok=True)
    try:
        server = scratch.start("sshd", [*host.prefix, SSHD, "-D", "-e", "-f", str(keys / "sshd")])
        yield (f"ssh -p {SSH_PORT} -i {keys}/user -o IdentitiesOnly=yes "
               f"-o UserKnownHostsFile={keys}/known")
        scratch.stop(server)
    finally:
        if made:
            os.rmdir("/run/sshd")


def by_ssh(scratch, hosts):
    if SSHD is None:
        print("SKIPPED: by_ssh: openssh-server is not installed", file=sys.stderr, flush=True)
        return
    world = World(scratch, hosts)
    world.wait_there()
    with ssh_server(scratch, world.there) as ssh:
        def command(*options):
            return [*world.here.prefix, MIGRATE, NAME, f"root@{world.there.memory_address}",
                    "--ssh", ssh, "--dir", world.here.vm_folder, "--to-dir",
                    world.there.vm_folder, *options]
        ferry.wait_until(lambda: ferry.run(command("--dry-run")).returncode == 0, "sshd")
        print(ferry.run_ok(command(), 120), flush=True)
        world.arrived()
        world.end()


def qcow2(scratch, hosts):
    """The format driver above our export writes when QEMU lets go of its disks."""
    def convert(image):
        ferry.run_ok(["qemu-img", "convert", "-O", "qcow2", image, image + ".new"])
        os.truncate(image + ".new", os.path.getsize(image) + 64 * ferry.MIB)  # room to grow
        os.rename(image + ".new", image)
    world = World(scratch, hosts, more=",format=qcow2", prepare=convert)
    moved(world)
    raw = []
    for image in world.stop():
        ferry.run_ok(["qemu-img", "check", "-f", "qcow2", image])
        ferry.run_ok(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, image + ".raw"])
        raw.append(image + ".raw")
    guest.check_disks(*raw, world.console)


def scratch_disk(scratch, hosts):
    """It does not travel; it is there, and empty."""
    world = World(scratch, hosts, extra=("64M",))
    with open(world.here.disk(2), "r+b") as swap:
        swap.write(os.urandom(ferry.MIB))
    moved(world, "--scratch", "disk2")
    for host in hosts:
        ferry.check(os.path.getsize(host.disk(2)) == 64 * ferry.MIB, "the scratch disk's size")
        ferry.run_ok(["cmp", "-n", str(64 * ferry.MIB), host.disk(2), "/dev/zero"])
    world.end()


def busy_memory(scratch, hosts):
    """The guest writes to the same 16 MiB of its memory over and over. (Not more: QEMU 7.2's TCG loses
    stores in a move of many rounds, with disks that have nothing to do with us, too: README.md.)"""
    world = World(scratch, hosts, dirty_mib=16)
    moved(world)
    world.end()


def memory_only(scratch, hosts):
    """Both hosts reach the same disks."""
    class Shared(World):
        def disks(self, _):
            return self.uris

        def start(self):
            self.uris = []
            for number in (0, 1):
                port = 10900 + number
                disk, address = self.here.disk(number), self.here.disk_address
                server = self.scratch.start(f"shared{number}", [
                    *self.here.prefix, ferry.NBDFERRY, "serve", "--listen", f"{address}:{port}",
                    disk])
                ferry.wait_until(lambda n=number: "serving" in scratch.log(f"shared{n}"), "serve")
                self.servers.append(server)
                self.uris.append(f"nbd://{address}:{port}/")
            super().start()

        servers = []

    first = hosts[0]
    world = Shared(scratch, hosts)
    moved(world, "--memory-only")
    world.stop()
    for server in Shared.servers:
        ferry.check(scratch.stop(server) == 0, "a disk's server failed")
    guest.check_disks(first.disk(0), first.disk(1), world.console)


def disk_only(scratch, hosts):
    """The guest stays, one of its disks goes to another file, under its writes."""
    world = World(scratch, hosts)
    here = world.here
    new = os.path.join(here.folder, "new.img")
    print(ferry.run_ok([*here.prefix, MIGRATE, NAME, "--dir", here.vm_folder, "--disk-only",
                        f"disk1={new}"]), flush=True)
    server = next(pid for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
                  if new.encode() in command_line(pid))
    world.goes_on()
    result = ferry.run([*here.prefix, MIGRATE, NAME, "--dir", here.vm_folder, "--disk-only",
                        f"disk1={new}2"])
    ferry.check(result.returncode == 1 and "pivoted" in result.stderr, result.stderr)
    old, _ = world.stop()
    ferry.run_ok(["kill", str(server)])
    ferry.wait_until(lambda: not command_line(server), "the new file's server to end")
    guest.check_disks(old, new, world.console)


def command_line(pid):
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def main():
    for scene in chosen((by_ssh, qcow2, scratch_disk, busy_memory, memory_only, disk_only)):
        on_two_hosts(scene)


main()
