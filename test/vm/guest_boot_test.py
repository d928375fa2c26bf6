#!/usr/bin/env python3
"""ctest vm.guest: the guest, two QEMUs on the same plain files, and a move between them: without
nbdferry, so that what fails here is the guest's or QEMU's. Then a guest whose QEMU is killed, and one
whose disk is scribbled on.

Skipped (exit code 77) where QEMU or the kernel's package can't be had.
"""
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import guest


class Machine:
    """One QEMU, and its QMP connection."""

    def __init__(self, directory, name, arguments, disks, *more):
        qmp = str(pathlib.Path(directory, name + ".qmp"))
        command = ["qemu-system-x86_64", *arguments, "-qmp", f"unix:{qmp},server=on,wait=off", *more]
        for number, path in enumerate((disks.a, disks.b)):
            # The other QEMU has it open, too: only one of them runs.
            command += ["-blockdev", json.dumps({
                "node-name": f"disk{number}", "driver": "raw", "discard": "unmap",
                "cache": {"direct": True},
                "file": {"driver": "file", "filename": path, "locking": "off", "discard": "unmap",
                         "cache": {"direct": True}}})]
            command += ["-device", f"virtio-blk-pci,drive=disk{number},addr={4 + number}"]
        self.log = open(pathlib.Path(directory, name + ".log"), "wb")  # pylint: disable=R1732
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log,
                                        stderr=self.log)
        end = time.monotonic() + 20
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        while self.socket.connect_ex(qmp) != 0:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} did not start: " + pathlib.Path(self.log.name).read_text())
            time.sleep(0.02)
        self.stream = self.socket.makefile("rw")
        self.events = []
        self.stream.readline()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command, **arguments):
        self.stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.stream.flush()
        while True:
            answer = json.loads(self.stream.readline())
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def time_of(self, event):
        """When it was: seconds since 1970. Events come before the next command's answer."""
        self.execute("query-status")
        stamp = next(e["timestamp"] for e in self.events if e["event"] == event)
        return stamp["seconds"] + stamp["microseconds"] / 1e6

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.stream.close()
        self.socket.close()
        self.log.close()


def migrate(source, target, path):
    target.execute("migrate-incoming", uri=f"unix:{path}")
    source.execute("migrate", uri=f"unix:{path}")
    end = time.monotonic() + 40
    while (state := source.execute("query-migrate"))["status"] != "completed":
        if state["status"] in ("failed", "cancelled") or time.monotonic() > end:
            raise RuntimeError(f"the migration ended with {state}")
        time.sleep(0.05)
    while target.execute("query-status")["status"] != "running":
        if time.monotonic() > end:
            raise RuntimeError("the destination does not run")
        time.sleep(0.02)


def moved(boot, directory):
    """It is moved while it writes, and notices nothing."""
    disks = guest.make_disks(directory)
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(guest.Console(seed=disks.seed))

        def start(name, *more):
            arguments = guest.qemu_arguments(boot, console.listen(f"{directory}/{name}"))
            return stack.enter_context(contextlib.closing(
                Machine(directory, name, arguments, disks, *more)))

        begin = time.monotonic()
        source = start("source")
        console.wait_up()
        print(f"up after {time.monotonic() - begin:.1f} s")
        console.wait_progress(records=300)
        target = start("target", "-incoming", "defer")
        before = time.monotonic()
        migrate(source, target, f"{directory}/migration")
        stopped = target.time_of("RESUME") - source.time_of("STOP")
        source.close()
        console.wait_progress(records=300)
        last = console.stop()
        target.process.wait(timeout=20)
        seen = console.longest_stop(before)
        print(f"stopped for {1e3 * stopped:.0f} ms, from the console {1e3 * seen:.0f} ms; longest gap "
              f"{1e3 * console.longest_gap(before):.0f} ms; records {last}")
        if abs(seen - stopped) > 0.1:
            raise AssertionError("the console's idea of the stop is not QEMU's")
        guest.check_disks(disks.a, disks.b, console)


def killed(boot, directory):
    """QEMU is killed in the middle: what was synced is there, and the log says no more than that."""
    disks = guest.make_disks(directory, a_mib=64, b_mib=16, seed=2)
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(guest.Console(seed=disks.seed))
        arguments = guest.qemu_arguments(boot, console.listen(f"{directory}/killed"), seed=2,
                                         pause_us=0)
        machine = stack.enter_context(contextlib.closing(
            Machine(directory, "killed", arguments, disks)))
        console.wait_up()
        console.wait_progress(records=1000)
        machine.process.send_signal(signal.SIGKILL)
        machine.process.wait()
        console.wait_end()
        guest.check_disks(disks.a, disks.b, console, ending="killed")
        print(f"killed after records {console.last.a} and {console.last.b}")


def scribbled(boot, directory):
    """Somebody else writes to disk B: the guest must see it, or its silence means nothing."""
    disks = guest.make_disks(directory, a_mib=64, b_mib=16, seed=3)
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(guest.Console(seed=disks.seed))
        arguments = guest.qemu_arguments(boot, console.listen(f"{directory}/scribbled"), seed=3)
        stack.enter_context(contextlib.closing(Machine(directory, "scribbled", arguments, disks)))
        console.wait_up()
        console.wait_progress(records=300)
        with open(disks.b, "r+b") as f:
            f.write(b"\x5a" * 16 * guest.MIB)
        try:
            console.wait_progress(records=1000)
        except guest.GuestError as error:
            print(f"scribbled on: {error}")
            return
        raise AssertionError("the guest did not notice that its disk was overwritten")


def main():
    with tempfile.TemporaryDirectory(prefix="nbdferry-test-") as directory:
        try:
            boot = guest.build(os.environ["GUEST_CACHE"], os.environ["GUEST_WRITER"])
        except guest.Unavailable as why:
            guest.skip(why)
        moved(boot, directory)
        killed(boot, directory)
        scribbled(boot, directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
