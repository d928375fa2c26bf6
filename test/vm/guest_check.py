"""The guest's disks against what the guest said: every record that must be there is, whole, the newest
in its place. Standard library and e2fsprogs only; the images, raw, are not written to.

Computes again what guest_record.hpp says of each record: change one, change both.

Of disk B each sector is looked at by itself: what the records up to a *floor* (the last that must have
survived) put there is what it must hold. After a clean stop that is all of it. After a crash a sector may
also hold a later record, one that belongs there; never an earlier one. After a discard, zeroes or what
was there before (virtio and NBD promise no more; that it then stays so, the guest checks itself).
"""
import array
import functools
import math
import pathlib
import random
import re
import struct
import subprocess
import tempfile
import zlib

MIB = 1024 * 1024
MASK = (1 << 64) - 1
SECTOR, SLOT_SECTORS = 512, 128
SLOT = SECTOR * SLOT_SECTORS
SECTOR_MAGIC, FILE_MAGIC = 0x314345525942444e, 0x31454c4659424446
LANES, FILE_RECORDS, FILES_KEPT = 4, 64, 8
FILE_HEADER = struct.Struct("<QQQII")
SECTOR_HEADER = struct.Struct("<QQQIHH")
NEVER_WRITTEN = bytes(MIB)
SHOWN = 5  # findings, of each kind


class Wrong(Exception):
    """The disks are not what they must be."""


# What guest_record.hpp computes.

def mix(x):
    x = (x + 0x9e3779b97f4a7c15) & MASK
    x = ((x ^ (x >> 30)) * 0xbf58476d1ce4e5b9) & MASK
    x = ((x ^ (x >> 27)) * 0x94d049bb133111eb) & MASK
    return x ^ (x >> 31)


def raw_plan(seed_mixed, record):
    """(frees its slot, sectors that it writes)"""
    dice = mix(seed_mixed ^ record)
    return (dice >> 1) % 32 == 0, 1 + (dice >> 16) % (8 if dice & 1 else SLOT_SECTORS)


def file_bytes(seed, record):
    dice = mix(mix(seed + 1) ^ record)
    return 64 + (dice >> 16) % (1024 if dice & 1 else 16384)


def slot_step(slots):
    step = slots * 5 // 8 + 1
    while math.gcd(step, slots) != 1:
        step += 1
    return step


# What the disks hold before the guest starts: chance, and the same each time.

def raw_content(size, seed):
    """(offset, bytes) of disk B; the rest was never written."""
    dice = random.Random(f"disk b {seed}")
    for offset in range(0, size, MIB):
        if dice.randrange(3):
            yield offset, dice.randbytes(min(MIB, size - offset))


@functools.lru_cache(maxsize=2)
def file_content(seed):
    """(name, bytes) of disk A's files."""
    dice = random.Random(f"disk a {seed}")
    return [(f"before-{number}", dice.randbytes(dice.randrange(1, 2 * MIB)))
            for number in range(12)]


class RawDisk:
    """What disk B must hold when the records up to `floor` must be there."""

    def __init__(self, size, seed, floor):
        self.slots = size // SLOT
        self.seed, self.floor = seed, floor
        self.mixed = mix(seed)
        self.step = slot_step(self.slots)
        sectors = self.slots * SLOT_SECTORS
        self.newest = array.array("Q", bytes(8 * sectors))  # record by sector, 0: from before
        self.freed = bytearray(sectors)
        for record in range(1, floor + 1):
            freed, count = raw_plan(self.mixed, record)
            at = record * self.step % self.slots * SLOT_SECTORS
            if freed:
                self.freed[at:at + SLOT_SECTORS] = b"\1" * SLOT_SECTORS
            else:
                self.newest[at:at + count] = array.array("Q", [record]) * count
                self.freed[at:at + count] = bytes(count)
        self.before = dict(raw_content(size, seed))

    def belongs(self, record, index):
        """`record` could have been written, and puts something into this sector."""
        if not record or record * self.step % self.slots != index // SLOT_SECTORS:
            return False
        freed, count = raw_plan(self.mixed, record)
        return not freed and index % SLOT_SECTORS < count

    def record_of(self, index, data):
        """The record that a sector holds; None when it holds none, or it is damaged."""
        magic, record, seed, slot, at, count = SECTOR_HEADER.unpack_from(data)
        sound = (magic == SECTOR_MAGIC and seed == self.seed
                 and slot * SLOT_SECTORS + at == index and at < count
                 and zlib.crc32(data[:508]) == int.from_bytes(data[508:], "little"))
        return record if sound and self.belongs(record, index) else None

    def from_before(self, index):
        piece, at = divmod(index * SECTOR, MIB)
        return self.before.get(piece * MIB, NEVER_WRITTEN)[at:at + SECTOR]

    def may_free_later(self, index, ahead):
        """One of the `ahead` records after the floor frees this sector's slot."""
        slot = index // SLOT_SECTORS
        first = self.floor + 1
        # The first record from there on whose slot it is.
        first += (slot * pow(self.step, -1, self.slots) - first) % self.slots
        return any(raw_plan(self.mixed, record)[0]
                   for record in range(first, self.floor + ahead + 1, self.slots))

    def fault(self, index, data, ahead):
        """What is wrong with a sector, or None. `ahead`: so many records after the floor may be
        there, too."""
        expected = self.newest[index]
        if expected == 0 and data == self.from_before(index):
            return None
        record = self.record_of(index, data)
        if record is not None and (record == expected
                                   or self.floor < record <= self.floor + ahead):
            return None
        if not any(data) and (self.freed[index] or (ahead and self.may_free_later(index, ahead))):
            return None
        if record is not None:
            found = f"record {record}, " + ("older" if record < expected else "newer")
        else:
            found = "zeroes" if not any(data) else "damaged or foreign bytes"
        return f"record {expected}" if expected else "what was there before", found


def check_raw(path, seed, floor, ahead=0):
    """Disk B. Raises Wrong."""
    faults = {}  # (slot, expected): [(sector, found)]
    with open(path, "rb") as f:
        disk = RawDisk(f.seek(0, 2), seed, floor)
        f.seek(0)
        for slot in range(disk.slots):
            data = f.read(SLOT)
            for i in range(SLOT_SECTORS):
                index = slot * SLOT_SECTORS + i
                fault = disk.fault(index, data[i * SECTOR:(i + 1) * SECTOR], ahead)
                if fault:
                    expected, found = fault
                    faults.setdefault((slot, expected), []).append((i, found))
    if faults:
        shown = [f"slot {slot}, {len(at)} sectors from {at[0][0]} to {at[-1][0]}: expected "
                 f"{expected}, found {' and '.join(list(dict.fromkeys(f for _, f in at))[:SHOWN])}"
                 for (slot, expected), at in list(faults.items())[:SHOWN]]
        raise Wrong(f"disk B, records up to {floor} must be there, {len(faults)} places are wrong:\n"
                    + "\n".join(shown))


def records_in(data):
    """(record, whole) of each record in a file's bytes; (None, False) when there is none."""
    at = 0
    while at < len(data):
        head = data[at:at + FILE_HEADER.size]
        if len(head) < FILE_HEADER.size:
            yield None, False
            return
        magic, record, seed, size, crc = FILE_HEADER.unpack(head)
        body = data[at:at + size]
        whole = (magic == FILE_MAGIC and len(body) == size >= FILE_HEADER.size
                 and zlib.crc32(head[:28] + bytes(4) + body[32:]) == crc)
        yield (record, seed, size) if whole else None, whole
        if not whole:
            return
        at += size


def check_file(name, data, seed, floor, exact):
    """A file of records: from its first, in order, at least up to the floor; exactly, if `exact`."""
    lane, number = map(int, name.removesuffix(".open").split("-"))
    first = 1 + lane + LANES * number * FILE_RECORDS
    due = [first + LANES * i for i in range(FILE_RECORDS) if first + LANES * i <= floor]
    found = []
    for expected, (record, whole) in zip(range(first, first + LANES * (FILE_RECORDS + 1), LANES),
                                         records_in(data)):
        if not whole:
            # Behind the floor a crash may have cut one off.
            if exact or expected <= floor:
                raise Wrong(f"disk A, {name}: record {expected} is damaged or cut off")
            break
        if record != (expected, seed, file_bytes(seed, expected)):
            raise Wrong(f"disk A, {name}: record {expected} expected, found {record[0]}")
        found.append(expected)
    if len(found) < len(due):
        raise Wrong(f"disk A, {name}: ends with record {found[-1] if found else 'none'}, "
                    f"{due[-1]} must be there")
    if (exact and found != due) or len(found) > FILE_RECORDS:
        raise Wrong(f"disk A, {name}: has record {found[-1]}, which was never acknowledged")


def file_names(floor):
    """Those that there are after record `floor`."""
    names = set()
    for lane in range(LANES):
        records = max(0, (floor - lane - 1) // LANES + 1)
        ended, more = divmod(records, FILE_RECORDS)
        names |= {f"{lane}-{n}" for n in range(max(0, ended - FILES_KEPT), ended)}
        if more:
            names.add(f"{lane}-{ended}.open")
    return names


def check_files(tree, seed, floor, exact):
    """Disk A's files, below `tree`. Raises Wrong."""
    for name, data in file_content(seed):
        path = tree / name
        if not path.exists() or path.read_bytes() != data:
            raise Wrong(f"disk A, {name}: not what it was before the guest started")
    files = {path.name: path for path in (tree / "records").glob("*")}
    names = file_names(floor)
    if exact and set(files) != names:
        raise Wrong(f"disk A: files missing: {sorted(names - set(files))}, "
                    f"too many: {sorted(set(files) - names)}")
    for name in names:
        # Later records may have let it be renamed, or removed for being old.
        ended = name.removesuffix(".open")
        lane, number = map(int, ended.split("-"))
        newer = f"{lane}-{number + FILES_KEPT}"
        if not {name, ended, newer} & set(files):
            raise Wrong(f"disk A: {name} is missing, records up to {floor} must be there")
    for name, path in files.items():
        check_file(name, path.read_bytes(), seed, floor, exact)


# What e2fsck may put right after a crash: the journal's replay leaves these to it.
HARMLESS = re.compile(
    r"recovering journal|Clearing orphaned inode|Setting free (blocks|inodes) count|"
    r"Free (blocks|inodes) count wrong|^Fix\? yes|^Pass \d|^e2fsck |^\S+: (\*+ FILE SYSTEM|\d+/)|^$")


def repaired_copy(image, directory):
    """A copy after the journal's replay; raises when there was more to do than that."""
    copy = pathlib.Path(directory) / "a.img"
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)
    done = subprocess.run(["e2fsck", "-fy", copy], capture_output=True, text=True, check=False)
    odd = [line for line in (done.stdout + done.stderr).splitlines() if not HARMLESS.search(line)]
    if done.returncode > 1 or odd:
        raise Wrong(f"disk A: e2fsck after a crash (exit {done.returncode}): " + "; ".join(odd))
    return copy


def check_image(image, seed, floor, exact):
    """Disk A. Raises Wrong."""
    with tempfile.TemporaryDirectory(prefix="nbdferry-test-") as scratch:
        if not exact:
            image = repaired_copy(image, scratch)
        done = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Wrong(f"disk A: e2fsck (exit {done.returncode}): {done.stdout[-1000:]}")
        tree = pathlib.Path(scratch, "tree")
        tree.mkdir()
        subprocess.run(["debugfs", "-R", f"rdump / {tree}", image], capture_output=True, check=True)
        check_files(tree, seed, floor, exact)


def check_disks(a, b, console, ending="clean"):
    """Both disks. `ending`: clean (the guest said `done`), killed (QEMU or the server was), crashed
    (the host was). Raises Wrong, or what Console raises for errors that the guest saw."""
    console.raise_errors()
    if ending == "clean":
        if console.done is None:
            raise Wrong("the guest has not said that it is done")
        a_floor, b_floor = console.done
        ahead = 0
    else:
        if console.last is None:
            raise Wrong("the guest never said anything")
        last = console.last
        a_floor = last.a.synced
        b_floor = last.b.acknowledged if ending == "killed" else last.b.synced
        # What it wrote between its last line and its end, and what it had not synced.
        ahead = last.b.acknowledged - b_floor + 5000
    check_image(a, console.seed, a_floor, exact=ending == "clean")
    check_raw(b, console.seed, b_floor, ahead)
