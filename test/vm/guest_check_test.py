#!/usr/bin/env python3
"""ctest vm.guest_check: the checker of the guest's disks accepts what guest_writer left, and notices
each kind of damage. On plain files, without a guest: the writer is run on this host.

Everything is the same each time, so an older state of the same disk is had by writing fewer records.
"""
import collections
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import guest_check
import guest_console

SEED = 7
RECORDS, EARLIER = 2600, 2300  # on 64 slots: each is written many times
B_BYTES = 4 * guest_check.MIB
SLOT, SECTOR = guest_check.SLOT, guest_check.SECTOR

State = collections.namedtuple("State", "tree a b console")


def write_records(directory, records):
    """Both disks after so many records, and what the writer said."""
    directory.mkdir()
    tree, b = directory / "tree", directory / "b.img"
    (tree / "records").mkdir(parents=True)
    for name, data in guest_check.file_content(SEED):
        (tree / name).write_bytes(data)
    with open(b, "wb") as f:
        f.truncate(B_BYTES)
        for offset, data in guest_check.raw_content(B_BYTES, SEED):
            f.seek(offset)
            f.write(data)
    said = subprocess.run([os.environ["GUEST_WRITER"], f"a={tree}/records", f"b={b}", f"seed={SEED}",
                           f"records={records}", "pause_us=0"], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=50, check=True).stdout
    console = guest_console.Console(seed=SEED)
    console.close()
    for line in said.splitlines():
        console.take_line(line, 0)
    return State(tree, image_of(tree, directory / "a.img"), b, console)


def image_of(tree, image):
    """An ext4 file system with this content."""
    with contextlib.suppress(FileNotFoundError):
        image.unlink()
    with open(image, "wb") as f:
        f.truncate(64 * guest_check.MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, image], check=True, capture_output=True,
                   timeout=50)
    return image


class Damage:
    """Copies of a state, each damaged in its own way."""

    def __init__(self, directory, now, earlier):
        self.now, self.earlier = now, earlier
        self.directory = directory
        self.seen = 0

    def refused(self, what, words, a=None, b=None, ending="clean"):
        """check_disks must say no, and that with these words."""
        try:
            guest_check.check_disks(a or self.now.a, b or self.now.b, self.now.console, ending)
        except (guest_check.Wrong, guest_console.GuestError) as wrong:
            if words not in str(wrong):
                raise AssertionError(f"{what}: noticed, but as: {wrong}") from wrong
            self.seen += 1
            return
        raise AssertionError(f"{what}: not noticed")

    @contextlib.contextmanager
    def raw(self):
        """Disk B, to be damaged."""
        path = self.directory / "damaged-b.img"
        shutil.copy(self.now.b, path)
        with open(path, "r+b") as f:
            yield f, path

    def files(self, damage):
        """Disk A, with its `records` folder damaged by a function."""
        tree = self.directory / "damaged-tree"
        shutil.copytree(self.now.tree, tree)
        damage(tree / "records")
        image = image_of(tree, self.directory / "damaged-a.img")
        shutil.rmtree(tree)
        return image


def slot_of(record):
    slots = B_BYTES // SLOT
    return record * guest_check.slot_step(slots) % slots


def written(least_sectors):
    """A late record of disk B that writes so many sectors and is the last of its slot."""
    for record in range(RECORDS, RECORDS - B_BYTES // SLOT, -1):
        freed, count = guest_check.raw_plan(guest_check.mix(SEED), record)
        if not freed and count >= least_sectors:
            return record, count
    raise AssertionError("no such record")


def swap_parts(f, one, two, length):
    f.seek(one)
    first = f.read(length)
    copy_part(f, f, two, length, one)
    f.seek(two)
    f.write(first)
    f.flush()


def flip_bit(f, at):
    f.seek(at)
    bit = f.read(1)[0] ^ 1
    f.seek(at)
    f.write(bytes([bit]))
    f.flush()


def copy_part(source, target, offset, length, to=None):
    source.seek(offset)
    data = source.read(length)
    target.seek(offset if to is None else to)
    target.write(data)
    target.flush()


def check_raw_damage(damage):
    record, count = written(least_sectors=9)
    at = slot_of(record) * SLOT
    with open(damage.earlier.b, "rb") as old:
        with damage.raw() as (f, path):
            copy_part(old, f, at, count * SECTOR)
            damage.refused("a record that was dropped", f"expected record {record}, found", b=path)
        with damage.raw() as (f, path):
            copy_part(old, f, at, SLOT)
            damage.refused("an older version of a slot", "older", b=path)
        with damage.raw() as (f, path):
            copy_part(old, f, at + SECTOR, (count - 1) * SECTOR)
            damage.refused("a record torn at 512 bytes", f"{count - 1} sectors from 1 to", b=path)
        with damage.raw() as (f, path):
            copy_part(old, f, at + (count - 1) * SECTOR, SECTOR)
            damage.refused("a record without its last sector",
                           f"1 sectors from {count - 1} to", b=path)
    with damage.raw() as (f, path):
        swap_parts(f, at, (at + SLOT) % B_BYTES, SLOT)
        damage.refused("two slots swapped", "foreign", b=path)
    for what, byte in (("a bit of the payload", 300), ("a bit of the checksum", 510)):
        with damage.raw() as (f, path):
            flip_bit(f, at + byte)
            damage.refused(what, "damaged", b=path)
    with damage.raw() as (f, path):
        f.seek(at)
        f.write(bytes(count * SECTOR))
        f.flush()
        damage.refused("a record that became zeroes", "found zeroes", b=path)


def check_file_damage(damage):
    def newest(records):
        return max((p for p in records.glob("0-*")), key=lambda p: int(p.name[2:].split(".")[0]))

    def cut(records):
        path = newest(records)
        os.truncate(path, path.stat().st_size - 1)

    def drop_last(records):
        path = newest(records)
        sizes = [size for (_, _, size), _ in guest_check.records_in(path.read_bytes())]
        os.truncate(path, path.stat().st_size - sizes[-1])

    def drop_middle(records):
        path = newest(records)
        data = path.read_bytes()
        sizes = [size for (_, _, size), _ in guest_check.records_in(data)]
        path.write_bytes(data[:sizes[0]] + data[sizes[0] + sizes[1]:])

    def flip(records):
        path = newest(records)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def swap(records):
        number = newest(records).name[2:].split(".")[0]
        one, two = (records / f"{lane}-{int(number) - 1}" for lane in (0, 1))
        first = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(first)

    def older(records):
        shutil.rmtree(records)
        shutil.copytree(damage.earlier.tree / "records", records)

    for change, words in ((cut, "damaged or cut off"), (drop_last, "must be there"),
                          (drop_middle, "expected, found"), (flip, "damaged"),
                          (swap, "expected, found"), (older, "missing"),
                          (lambda records: newest(records).unlink(), "missing"),
                          (lambda records: (records / "0-0").write_bytes(b""), "too many"),
                          (lambda records: (records / "../before-3").write_bytes(b"new"),
                           "before the guest started")):
        damage.refused(change.__name__, words, a=damage.files(change))


def check_file_system_damage(damage):
    image = damage.directory / "damaged-a.img"
    for command in ("clri /records", "freeb 1000 10", "set_inode_field /records links_count 9"):
        shutil.copy(damage.now.a, image)
        subprocess.run(["debugfs", "-w", "-R", command, image], check=True, capture_output=True)
        for ending in ("clean", "crashed"):
            damage.refused(f"{command}, {ending}", "e2fsck", a=image, ending=ending)


def check_after_a_crash(now, earlier, damage):
    """The log's last line came before the last record: what came after may be there, or not."""
    check = guest_check.check_image
    for floor in (EARLIER, EARLIER - 100, RECORDS - 40):
        check(now.a, SEED, floor, exact=False)
        guest_check.check_raw(now.b, SEED, floor, ahead=RECORDS - floor)
    # It is the floor that counts, not what somebody happens to have.
    for what, action in (
            ("a crash that lost files", lambda: check(earlier.a, SEED, RECORDS, exact=False)),
            ("a crash that lost records",
             lambda: guest_check.check_raw(earlier.b, SEED, EARLIER + 5, ahead=1000)),
            ("later records after a clean end", lambda: guest_check.check_raw(now.b, SEED, EARLIER)),
            ("later files after a clean end", lambda: check(now.a, SEED, EARLIER, exact=True))):
        try:
            action()
        except guest_check.Wrong:
            damage.seen += 1
            continue
        raise AssertionError(f"{what}: not noticed")


def check_words(damage):
    """What the guest says counts, too."""
    console = damage.now.console
    for line in ("error b: write of record 9: Input/output error", "[ 1.0] Kernel panic - not syncing"):
        console.take_line(line, 0)
        damage.refused(line, line)
        console.errors.clear()
    done, console.done = console.done, None
    damage.refused("a guest that did not end", "not said that it is done")
    console.done = (done[0] + 1, done[1])
    damage.refused("an acknowledged record that isn't there", "must be there")
    console.done = done


def main():
    with tempfile.TemporaryDirectory(prefix="nbdferry-test-") as name:
        directory = pathlib.Path(name)
        earlier = write_records(directory / "earlier", EARLIER)
        now = write_records(directory / "now", RECORDS)
        for state in (earlier, now):
            guest_check.check_disks(state.a, state.b, state.console)
            guest_check.check_disks(state.a, state.b, state.console, ending="crashed")
        damage = Damage(directory, now, earlier)
        check_raw_damage(damage)
        check_file_damage(damage)
        check_file_system_damage(damage)
        check_after_a_crash(now, earlier, damage)
        check_words(damage)
        print(f"{damage.seen} kinds of damage noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
