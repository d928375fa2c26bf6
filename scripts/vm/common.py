"""What both commands share: their errors, and where things lie."""
import contextlib
import fcntl
import os
import pathlib
import shutil
import sys


class Problem(Exception):
    """Something that the operator has to know; each line says what, why and what to do."""


class Usage(Exception):
    """A wrong command line."""


def directory_of(name):
    """Where a VM's sockets and its vm.json lie if nothing else is said."""
    if os.geteuid() == 0:
        return f"/run/nbdferry/{name}"
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR", "/tmp"), "nbdferry", name)


def nbdferry_program():
    """$NBDFERRY, or what this tree has built, or what is installed."""
    built = pathlib.Path(__file__).resolve().parents[2] / "build/proxy/nbdferry"
    return os.environ.get("NBDFERRY") or (str(built) if built.exists() else "nbdferry")


@contextlib.contextmanager
def locked(path, taken):
    """Holds the lock at `path`; raises Problem(taken) when somebody else does."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise Problem(taken) from e
        yield


def need_program(program):
    if shutil.which(program) is None:
        raise Problem(f"{program} is not installed")


def run_main(program, main):
    """Runs main(); errors are a line each, in the way of nbdferry: exit 1, wrong usage 2."""
    try:
        sys.exit(main())
    except Usage as e:
        print(f"{program}: {e} (see --help)", file=sys.stderr)
        sys.exit(2)
    except Problem as e:
        for line in str(e).splitlines():
            print(f"{program}: {line}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
