#!/usr/bin/env python3
"""Who gets in, and what the program needs. usage: security.py access|unprivileged|device|unit|confined

Exit 77: it could not be tried here, and why.
"""
import contextlib
import json
import os
import pathlib
import shutil
import stat
import sys

import confine
import ferry
from ferry import MIB, NBDFERRY, check, check_error, run, run_ok

NOBODY = 65534
UNIT = pathlib.Path(__file__).parents[2] / "scripts" / "nbdferry@.service"


def skip(why):
    print(f"SKIPPED: {why}")
    sys.exit(77)


def as_nobody(*groups):
    """The start of a command that runs as an ordinary user; of whoever runs the tests, without root."""
    if os.getuid() != 0:
        return []
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}",
            f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"]


def open_to_nobody(scratch):
    """A folder of that user's, and a program that it can run: where it was built is root's."""
    program = shutil.copy(NBDFERRY, scratch.file("nbdferry"))
    os.chmod(scratch.path, 0o755)
    folder = scratch.file("nobody")
    os.mkdir(folder, 0o700)
    if os.getuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    return folder, program


def give_to_nobody(path):
    if os.getuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    return path


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def access(scratch):
    """Sockets are their user's; --socket-mode and a folder let a guest of another user in, and only
    as a guest."""
    if os.getuid() != 0:
        skip("only root can try what other users may do")
    _, program = open_to_nobody(scratch)
    disk = ferry.Ferry(scratch, scratch.disk("disk.img", MIB))
    check(mode(disk.socket) == mode(disk.control) == 0o600, "default modes")
    result = run([*as_nobody(), "nbdinfo", disk.uri])
    check(result.returncode != 0, "another user is a guest")
    disk.stop()

    # As proxy/README.md says it.
    group = 4242
    shared = scratch.file("shared")
    run_ok(["install", "-d", "-g", str(group), "-m", "2750", shared])
    disk = ferry.Ferry(scratch, disk.disk, "--socket", f"{shared}/s", "--socket-mode", "0660",
                       name="shared")
    disk.socket = f"{shared}/s"
    disk.uri = ferry.unix_uri(disk.socket)
    check(mode(disk.socket) == 0o660 and mode(disk.control) == 0o600, "--socket-mode")
    check(os.lstat(disk.socket).st_gid == group, "the folder's group")
    check(run([*as_nobody(), "nbdinfo", disk.uri]).returncode != 0, "a stranger is a guest")
    run_ok([*as_nobody(group), "nbdinfo", disk.uri])
    command = [*as_nobody(group), program, "status", "--control", disk.control]
    check_error(run(command), because=[disk.control, "ermission denied"])
    # Whatever becomes of the file: they don't control it.
    os.chmod(disk.control, 0o666)
    for name in ("status", "pause", "unfence"):
        command[command.index(program) + 1] = name
        check_error(run(command), because="only root and the user that runs nbdferry")
    answer = run_ok([*as_nobody(), "curl", "-s", "-w", "%{http_code}", "--unix-socket",
                     disk.control, "http://x/status"])
    check(answer.endswith("403") and "error" in json.loads(answer[:-3]), answer)
    check(disk.status()["role"] == "owner", "root goes on")
    disk.stop()


def unprivileged(scratch):
    """An ordinary user serves, migrates and switches a disk of its own with all defaults."""
    if os.getuid() != 0:
        print("not root: as the user that runs the tests")
    folder, program = open_to_nobody(scratch)
    image = give_to_nobody(scratch.disk("nobody/disk.img"))
    target = give_to_nobody(scratch.disk("nobody/target.img", seed=2))
    disk = ferry.Ferry(scratch, image, before=as_nobody(), program=program)
    incoming = ferry.Ferry(scratch, target, "--incoming", before=as_nobody(), program=program,
                           name="incoming")
    run_ok([*as_nobody(), program, "status", "--control", disk.control])
    check(disk.status()["role"] == "owner", "root may, too")
    command = [*as_nobody(), program, "migrate", "--control", disk.control, "--wait",
               "--switch", "release", incoming.uri]
    run_ok(command)
    run_ok([*as_nobody(), program, "promote", "--control", incoming.control])
    check(disk.status()["role"] == "retired", "it has handed the disk over")
    check(incoming.status()["role"] == "owner", "it has taken the disk over")
    check("ownership record" not in scratch.log("ferry"), scratch.log("ferry"))
    disk.stop()
    incoming.stop()
    ferry.same(image, target, "the copy")
    left = sorted(os.listdir(folder))
    check(left == ["disk.img", "disk.img.owner", "target.img", "target.img.owner"], str(left))
    for name in left:
        found = os.lstat(os.path.join(folder, name))
        check(found.st_uid == (NOBODY if os.getuid() == 0 else os.getuid()), name)
        check(not name.endswith(".owner") or stat.S_IMODE(found.st_mode) == 0o600, name)
    created = scratch.file("nobody/new.img")
    new = ferry.Ferry(scratch, created, "--create", "1M", before=as_nobody(), program=program,
                      name="new")
    check(mode(created) == 0o600, "a new disk is its user's")
    new.stop()


def device(scratch):
    """A device that the user may use, but no place for its record: it hears of that at the start."""
    if os.getuid() != 0:
        skip("only root can make a loop device")
    if os.path.exists("/var/lib/nbdferry") and os.stat("/var/lib/nbdferry").st_mode & 0o002:
        skip("/var/lib/nbdferry is everybody's here")
    _, program = open_to_nobody(scratch)
    made = run(["losetup", "--find", "--show", scratch.disk("backing", MIB)])
    if made.returncode != 0:
        skip(f"no loop device: {made.stderr}")
    path = made.stdout.strip()
    before = os.stat(path)
    try:
        os.chown(path, NOBODY, NOBODY)
        os.chmod(path, 0o600)
        elsewhere = ["--socket", scratch.file("nobody/s"), "--control", scratch.file("nobody/c")]
        process = scratch.start("device", [*as_nobody(), program, "serve", *elsewhere, path])
        ferry.wait_until(lambda: f"serving {path}" in scratch.log("device"), "it serves")
        for part in ("ownership record '/var/lib/nbdferry/", "no migration could be committed",
                     f"-o {NOBODY} /var/lib/nbdferry" if not os.path.exists("/var/lib/nbdferry")
                     else f"let uid {NOBODY} write to its folder"):
            check(part in scratch.log("device"), f"{part!r}: {scratch.log('device')}")
        check(scratch.stop(process) == 0, "it ends well")
        # Incoming needs its record at once.
        check_error(run([*as_nobody(), program, "serve", "--incoming", *elsewhere, path]),
                    because=["/var/lib/nbdferry/", "can't be created", str(NOBODY)])
    finally:
        os.chown(path, before.st_uid, before.st_gid)
        os.chmod(path, stat.S_IMODE(before.st_mode))
        run_ok(["losetup", "--detach", path])


def need_systemd_analyze():
    if shutil.which("systemd-analyze") is None:
        skip("systemd-analyze is not installed (apt-get install systemd)")


def unit(scratch):
    """The unit says what systemd understands, and leaves little open."""
    need_systemd_analyze()
    text = UNIT.read_text()
    installed = "/usr/local/bin/nbdferry"
    check(f"ExecStart={installed} serve " in text, "ExecStart")
    path = scratch.file("nbdferry@web.service")
    pathlib.Path(path).write_text(text.replace(installed, NBDFERRY))
    result = run(["systemd-analyze", "verify", "--man=no", path])
    complaints = [line for line in result.stderr.splitlines() if path in line or "nbdferry" in line]
    check(result.returncode == 0 and not complaints, f"verify: {result.stderr}")
    result = run(["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager",
                  path])
    if "unrecognized option" in result.stderr:
        skip("this systemd-analyze is too old to judge a file")
    last = (result.stdout.strip().splitlines() or [""])[-1]
    check(result.returncode == 0, f"exposed: {last} {result.stderr}")
    print(last)


def uses_io_uring(process):
    links = []
    for entry in os.scandir(f"/proc/{process.pid}/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(entry.path))
    return any("io_uring" in link for link in links)


def confined(scratch):
    """All of a migration, both sides under what the unit allows: nothing else is needed."""
    if os.getuid() != 0:
        skip("only root can confine a program like that")
    need_systemd_analyze()
    folder, program = open_to_nobody(scratch)
    before = [sys.executable, confine.__file__, str(UNIT), folder]
    for attempt, what in ((["/usr/bin/touch", "/tmp/x"], "Read-only file system"),
                          (["/usr/bin/chown", "0", folder], "not permitted"),
                          (["/usr/bin/unshare", "-m", "true"], "not permitted")):
        result = run([*before, *attempt])
        check(what in result.stderr, f"{attempt}: {result.stderr}")
    image = give_to_nobody(scratch.disk("nobody/disk.img"))
    target = scratch.file("nobody/target.img")
    free = uses_io_uring_outside(scratch, program)
    port = ferry.free_port()
    disk = ferry.Ferry(scratch, image, before=before, program=program)
    incoming = ferry.Ferry(scratch, target, "--incoming", "--create", "64M", "--listen",
                           f"localhost:{port}", "--socket", target + ".sock", "--socket-mode",
                           "0660", before=before, program=program, name="incoming")
    check(mode(incoming.socket) == 0o660, "--socket-mode, whatever the umask")
    check(uses_io_uring(disk.process) == free, "io_uring is allowed")
    load = ferry.Load(scratch, disk.uri, image)
    disk.ok("migrate", "--wait", f"nbd://localhost:{port}/")
    load.running()
    load.end()
    disk.ok("switch", "--release")
    incoming.ok("promote")
    check(disk.status()["role"] == "retired", "released")
    disk.stop()
    incoming.stop()
    ferry.same(image, target, "the copy")
    check(sorted(os.listdir(folder)) == ["disk.img", "disk.img.owner", "target.img",
                                         "target.img.owner"], str(os.listdir(folder)))


def uses_io_uring_outside(scratch, program):
    """Whether this machine has io_uring at all, for that user."""
    image = give_to_nobody(scratch.disk("nobody/probe.img", MIB))
    disk = ferry.Ferry(scratch, image, before=as_nobody(), program=program, name="probe")
    found = uses_io_uring(disk.process)
    disk.stop()
    os.remove(image)
    return found


def main(what):
    with ferry.Scratch() as scratch:
        {"access": access, "unprivileged": unprivileged, "device": device, "unit": unit,
         "confined": confined}[what](scratch)


main(*sys.argv[1:])
