"""The VM stays, its disks go: to an NBD server, or to a file here (a private `nbdferry serve`)."""
import os
import subprocess
import time

from common import Problem, Usage, nbdferry_program
from ferry import Ferry, FerryError, wait_served
from report import bytes_text, table


def move_storage(options, vm, progress):
    disks = {disk["name"]: disk for disk in vm["disks"] if "control" in disk}
    moves = [_where(text, disks) for text in options.disk_only]
    if len({name for name, _ in moves}) < len(moves):
        raise Usage("--disk-only: one place for each disk")
    ferries = {name: Ferry(disks[name]["control"], name) for name, _ in moves}
    for name, _ in moves:
        status = ferries[name].status()
        if status["role"] != "owner":
            raise Problem(f"{name} is {status['role']}: it has been moved from here already")
        if status["phase"] not in ("idle", "failed", "cancelled"):
            raise Problem(f"{name}: a migration runs already ({status['phase']}): let it end, or "
                          f"cancel it (nbdferry cancel --control {ferries[name].path})")
    if options.dry_run:
        progress.say("nothing is in the way of moving " + ", ".join(name for name, _ in moves))
        return 0
    rows = []
    for name, to in moves:
        rows += _move(options, name, to, ferries[name], progress)
    print(table(rows))
    return 0


def _where(text, disks):
    name, equals, to = text.partition("=")
    if not equals or name not in disks:
        if len(disks) != 1:
            raise Usage(f"--disk-only {text}: which disk? DISK=TO, with DISK one of "
                        + (", ".join(disks) or "none: no disk of this VM is served here"))
        name, to = next(iter(disks)), text
    return name, to


def _move(options, name, to, ferry, progress):
    begin = time.monotonic()
    server = None
    uri = to
    if "://" not in to:
        server, uri = _serve_file(options, name, os.path.abspath(to), ferry)
    try:
        ferry.command("migrate", uris=[uri], switch="pivot")
        while True:
            status = ferry.status()
            if status["phase"] == "switched":
                break
            if status["phase"] in ("failed", "cancelled"):
                raise Problem(f"{name}: {status['phase']}: {status['last_error']}; it is served from "
                              "where it was")
            done = status["size_bytes"] - status["debt_bytes"]
            progress.line(f"{name}: {100 * done / status['size_bytes']:5.1f}% of "
                          f"{bytes_text(status['size_bytes'])}, "
                          f"{bytes_text(status['bytes_per_second'])}/s")
            time.sleep(0.1)
    except BaseException:
        _go_back(ferry, server)
        raise
    progress.say(f"{name} is served from {to}")
    sent = sum(path["sent_bytes"] for path in status["paths"])
    return [(name, f"moved to {to} in {time.monotonic() - begin:.1f} s, {bytes_text(sent)} sent"),
            (f"  {name} before", f"retired: {ferry.status()['disk']}")]


def _go_back(ferry, server):
    """Not there: the server of the new file goes, unless the disk is served from it after all."""
    try:
        if ferry.status()["role"] == "owner":
            ferry.command("cancel")
        if ferry.status()["role"] == "owner" and server:
            server.terminate()
            server.wait()
    except FerryError:
        pass  # unknown: what may serve the disk is left running


def _serve_file(options, name, file, ferry):
    """Starts a server for `file` that outlives us; returns it and its URI."""
    base = os.path.join(options.dir, f"{name}-to")
    command = [nbdferry_program(), "serve", "--create", str(ferry.status()["size_bytes"]),
               "--socket", base + ".sock", "--control", base + ".ctl", file]
    with open(base + ".log", "w") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                  start_new_session=True)
    try:
        wait_served(base + ".ctl", file, server)
    except Problem as e:
        if server.poll() is None:
            server.terminate()
            raise
        with open(base + ".log") as log:
            raise Problem(log.read().strip() or str(e)) from e
    return server, f"nbd+unix:///?socket={base}.sock"
