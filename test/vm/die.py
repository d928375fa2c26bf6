"""Runs migrate-vm.sh's program, and kills it without warning (SIGKILL) when it reaches a step:

    die.py before|after STEP ARGUMENT...

Steps are the methods of move.Move that a move goes through, or of a disk's (disk.METHOD), or commands
to a QEMU (qmp.COMMAND). The program itself knows nothing of this.
"""
import os
import pathlib
import runpy
import signal
import sys

VM = pathlib.Path(__file__).resolve().parents[2] / "scripts/vm"
sys.path.insert(0, str(VM))
import move  # noqa: E402  (it needs the path)
import qmp  # noqa: E402

when, step, *arguments = sys.argv[1:]


def die():
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


kind, _, name = step.rpartition(".")
owner = {"": move.Move, "disk": move.DiskMove, "qmp": qmp.Qmp}[kind]


def deadly(original):
    def run(*positional, **named):
        meant = kind != "qmp" or positional[1] == name  # after self: the command
        if meant and when == "before":
            die()
        result = original(*positional, **named)
        if meant and when == "after":
            die()
        return result
    return run


method = "call" if kind == "qmp" else name
setattr(owner, method, deadly(getattr(owner, method)))
sys.argv = ["migrate-vm.sh", *arguments]
runpy.run_path(str(VM / "migrate.py"), run_name="__main__")
