"""Runs migrate-vm.sh's program, and kills it without warning (SIGKILL) when it reaches a step:

    die.py before|after STEP ARGUMENT...

Steps are the methods of move.Move that a move goes through. The program itself knows nothing of this.
"""
import os
import pathlib
import runpy
import signal
import sys

VM = pathlib.Path(__file__).resolve().parents[2] / "scripts/vm"
sys.path.insert(0, str(VM))
import move  # noqa: E402  (it needs the path)

when, step, *arguments = sys.argv[1:]


def die():
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(original):
    def run(*positional, **named):
        if when == "before":
            die()
        result = original(*positional, **named)
        if when == "after":
            die()
        return result
    return run


owner, name = (move.DiskMove, step.removeprefix("disk.")) if step.startswith("disk.") \
    else (move.Move, step)
setattr(owner, name, deadly(getattr(owner, name)))
sys.argv = ["migrate-vm.sh", *arguments]
runpy.run_path(str(VM / "migrate.py"), run_name="__main__")
