"""Everything that can be in the way of a move, found before anything starts."""
import socket
import urllib.parse

from ferry import FerryError
from qmp import QmpError

MIDWAY = ("finish-migrate", "postmigrate")  # where an earlier run of migrate-vm.sh may have stopped
CONNECT_SECONDS = 5


def obstacles(move):
    """Lines: what, why, what to do. Empty: nothing is in the way."""
    return [*_shape(move), *_run_states(move), *machines(move),
            *(line for disk in move.disks for line in _disk(move, disk))]


def _shape(move):
    """Both descriptions speak of the same disks."""
    here, there = move.here["disks"], move.there["disks"]
    names = [disk["name"] for disk in here]
    if len(here) != len(there):
        yield (f"the VM has {len(here)} disks here and {len(there)} {move.other.label}: give "
               "attach-vm.sh the same disks on both sides")
        return
    for name in move.options.scratch:
        if name not in names:
            yield f"--scratch {name}: there is no such disk: {', '.join(names)}"
    if not move.there["memory"]:
        yield f"the VM {move.other.label} does not wait for one: start it with --incoming"
    for a, b in zip(here, there):
        name = a["name"]
        if a["format"] != b["format"]:
            yield f"{name} is {a['format']} here and {b['format']} {move.other.label}"
        if move.options.memory_only:
            if "uri" in b:
                yield (f"{name}: --memory-only, but {move.other.label} it is a disk of its own: give "
                       "attach-vm.sh there the URI of the disk that both reach")
        elif "served" in a or "served" in b:
            if a.get("served") != b.get("served"):
                yield f"{name} is served by somebody else on one side: it cannot be moved from here"
        elif (name in move.options.scratch) != b["scratch"]:
            yield (f"{name}: scratch on one side only: give migrate-vm.sh --scratch {name}, and "
                   "attach-vm.sh there scratch=on")


def _run_states(move):
    here = move.source.status()
    there = move.target.status() if move.target else "inmigrate"
    if here in MIDWAY:
        if here == "postmigrate" and there != "paused":
            yield (f"the VM has stopped here for a move, but it is not loaded {move.other.label} "
                   f"({there}): run this again with --abort, and it goes on here")
    elif here != "running":
        yield f"the VM here is {here}, not running: bring it to run first (QMP: cont)"
    elif there != "inmigrate":
        yield (f"QEMU {move.other.label} is {there}, not waiting for a VM: start attach-vm.sh "
               "--incoming there anew")
    for reason in move.source.migration().get("blocked-reasons", []):
        yield f"QEMU here cannot migrate this VM: {reason}"


def machines(move):
    """QEMU finds out itself, but only after all has been sent."""
    if not move.target:
        return  # it starts when the disks are there
    def look(qemu):
        version = qemu.call("query-version")["qemu"]
        return {
            "QEMU's version": (version["major"], version["minor"]),
            "machine type": qemu.call("qom-get", path="/machine", property="type"),
            "memory": qemu.call("query-memory-size-summary")["base-memory"],
            "number of processors": len(qemu.call("query-cpus-fast")),
        }
    try:
        here, there = look(move.source), look(move.target)
    except QmpError as e:
        yield str(e)
        return
    for what, value in here.items():
        if what == "QEMU's version":
            if there[what] < value:
                yield (f"QEMU {move.other.label} is older ({'.'.join(map(str, there[what]))}) than "
                       f"here ({'.'.join(map(str, value))}): a VM moves to the same or a newer one")
        elif there[what] != value:
            yield (f"the {what} differs: {value} here, {there[what]} {move.other.label}: give "
                   "attach-vm.sh the same QEMU arguments on both sides")


def _disk(move, disk):
    try:
        here, there = disk.source.status(), disk.target.status()
    except FerryError as e:
        yield str(e)
        return
    if here["role"] not in ("owner", "retired"):
        yield (f"{disk.name} here is {here['role']}: only the host that owns a disk can give it away"
               + (" (it is served from where it has been moved to)" if here["role"] == "pivoted"
                  else ""))
    if there["role"] != "incoming":
        yield (f"{disk.name} {move.other.label} is {there['role']}, not incoming: what it holds "
               "counts, and is not overwritten")
    if here["size_bytes"] > there["size_bytes"]:
        yield (f"{disk.name} {move.other.label} is smaller: {there['size_bytes']} bytes, and here "
               f"{here['size_bytes']}")
    if disk.uri is None:
        yield f"{disk.name} {move.other.label} takes no migration"
        return
    going = [path["uri"] for path in here["paths"]]
    if going and going != [disk.uri] and here["phase"] not in ("idle", "failed", "cancelled"):
        yield (f"{disk.name} is on its way to {going[0]} already: cancel that first (nbdferry cancel "
               f"--control {disk.source.path})")
    uri = urllib.parse.urlsplit(disk.uri)
    try:
        socket.create_connection((uri.hostname, uri.port), CONNECT_SECONDS).close()
    except OSError as e:
        yield f"{disk.name}: cannot reach {disk.uri} from here: {e.strerror or e}"
