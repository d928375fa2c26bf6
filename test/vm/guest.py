"""A real guest for the VM tests: its kernel and initramfs, QEMU's arguments, its disks. See README.md.

The kernel is Debian's cloud kernel, downloaded with apt-get and unpacked, never installed; the
initramfs is `guest_writer`, which is init, and the modules that reach a virtio disk.
"""
import collections
import fcntl
import lzma
import pathlib
import re
import subprocess
import sys
import tempfile

from guest_check import (Wrong, check_disks, file_content,  # noqa: F401 (offered from here)
                         raw_content)
from guest_console import Console, GuestError  # noqa: F401

META_PACKAGE = "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_blk", "ext4")  # and what they need, as far as it is not built in
COMMAND_LINE = ("console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off "
                "nokaslr no_timer_check 8250.nr_uarts=1 audit=0 cryptomgr.notests")
MIB = 1024 * 1024

# QEMU before 9.0 loses stores of a TCG guest that is being moved: where a memory block is a multiple of
# 256 KiB, sync'ing its dirty bitmap leaves the TLB's "already dirty" as it was. 8 KiB more, and it
# takes the other way, which is right: 5 panics in 410 moves without, none in 560 with it.
ODD_KIB = 8

Boot = collections.namedtuple("Boot", "kernel initrd")
Disks = collections.namedtuple("Disks", "a b seed")


class Unavailable(Exception):
    """The guest can't be had on this machine, and why."""


def skip(why):
    """Ends a test that can't run here, so that nobody takes it for one that passed."""
    print(f"SKIPPED: no guest on this machine: {why}", file=sys.stderr, flush=True)
    sys.exit(77)


def run(command, **more):
    try:
        done = subprocess.run(command, capture_output=True, timeout=300, check=False,
                              stdin=subprocess.DEVNULL, **more)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise Unavailable(f"{' '.join(map(str, command))}: {done.stderr.decode()[-300:].strip()}")
    return done.stdout.decode(errors="replace")


def kernel_package():
    depends = run(["apt-cache", "depends", META_PACKAGE])
    found = re.search(r"Depends: (linux-image-\S+-cloud-amd64)", depends)
    if not found:
        raise Unavailable(f"{META_PACKAGE} names no kernel package (apt-get update?)")
    return found.group(1)


def unpack_kernel(cache):
    """The kernel and its modules, as .../boot and .../lib: downloaded once."""
    tree = cache / "kernel"
    if tree.exists():
        return tree
    run(["apt-get", "download", "-q", kernel_package()], cwd=cache)
    package, = cache.glob("*.deb")
    half = cache / "kernel.part"
    run(["dpkg-deb", "-x", package, half])
    package.unlink()
    half.rename(tree)
    return tree


def cpio_entry(name, mode, data=b"", device=(0, 0)):
    """One file of an initramfs, in the kernel's `newc` format."""
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def modules(tree):
    """(name, content) of each module, what it needs before it."""
    found = {}
    built_in = next(tree.glob("**/modules.builtin")).read_text()

    def add(name):
        if f"/{name}.ko\n" in built_in:
            return
        path = next(tree.glob(f"**/kernel/**/{name}.ko*"), None)
        if path is None:
            raise Unavailable(f"the kernel package has no module {name}")
        data = path.read_bytes()
        if path.suffix == ".xz":  # from Debian 13 on
            data = lzma.decompress(data)
        needs = re.search(rb"\0depends=([^\0]*)\0", data).group(1).decode()
        for other in filter(None, needs.split(",")):
            if other not in found:
                add(other)
        found[name] = data

    for wanted in MODULES:
        add(wanted)
    return found.items()


def initramfs(tree, writer):
    parts = [cpio_entry("dev", 0o040755), cpio_entry("dev/console", 0o020600, device=(5, 1)),
             cpio_entry("modules", 0o040755)]
    for number, (name, data) in enumerate(modules(tree)):
        parts.append(cpio_entry(f"modules/{number:02}-{name}.ko", 0o100644, data))
    parts.append(cpio_entry("init", 0o100755, pathlib.Path(writer).read_bytes()))
    parts.append(cpio_entry("TRAILER!!!", 0))
    return b"".join(parts)


def build(cache_dir, writer):
    """Boot(kernel, initrd) in `cache_dir`, where what was made before is used again."""
    run(["qemu-system-x86_64", "--version"])
    cache = pathlib.Path(cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tree = unpack_kernel(cache)
        kernel, = tree.glob("boot/vmlinuz-*")
        initrd = cache / "initramfs"
        made = initramfs(tree, writer)
        # A guest that is just being started keeps what it has.
        if not initrd.exists() or initrd.read_bytes() != made:
            (cache / "initramfs.part").write_bytes(made)
            (cache / "initramfs.part").rename(initrd)
    return Boot(str(kernel), str(initrd))


def qemu_arguments(boot, console, memory_mib=256, cpus=1, **options):
    """The machine, the same for each QEMU that the guest is in: all but disks, QMP and -incoming.
    `console` is what Console.listen gave; `options` are the writer's: seed (of the disks), pause_us,
    dirty_mib."""
    words = "".join(f" guest.{key}={value}" for key, value in options.items())
    return ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", "pc", "-accel", "tcg", "-m", f"{memory_mib * 1024 + ODD_KIB}K",
            "-smp", str(cpus),
            "-kernel", boot.kernel, "-initrd", boot.initrd, "-append", COMMAND_LINE + words,
            "-chardev", f"socket,id=console,path={console},logfile={console}.log",
            "-serial", "chardev:console"]


def make_disks(directory, a_mib=256, b_mib=128, seed=1):
    """Disk A: ext4 with a few files; disk B: two thirds chance, one third never written."""
    directory = pathlib.Path(directory)
    a, b = directory / "a.img", directory / "b.img"
    with open(b, "wb") as f:
        f.truncate(b_mib * MIB)
        for offset, data in raw_content(b_mib * MIB, seed):
            f.seek(offset)
            f.write(data)
    with tempfile.TemporaryDirectory(dir=directory) as tree:
        for name, data in file_content(seed):
            pathlib.Path(tree, name).write_bytes(data)
        with open(a, "wb") as f:
            f.truncate(a_mib * MIB)
        run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", tree,
             str(a)])
    return Disks(str(a), str(b), seed)
