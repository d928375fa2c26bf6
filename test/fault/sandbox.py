"""Where the fault tests run: as root, in namespaces of their own (processes, mounts, network), with a
tmpfs for their files. When the test ends, in whatever way, the kernel removes all of it."""
import os
import sys
import tempfile

ROOM = "/mnt"  # there is one everywhere; what is seen in it elsewhere does not change
SKIPPED = 77


def enter():
    """Starts this program once more, in there. Without root: stays outside, and returns False."""
    if os.environ.get("FAULT_SANDBOX") == "1":
        tempfile.tempdir = ROOM
        os.system("ip link set lo up")
        return True
    if os.geteuid() != 0:
        return False
    os.environ["FAULT_SANDBOX"] = "1"
    mount = f'mount -t tmpfs -o mode=700 fault {ROOM} && exec "$@"'
    os.execvp("unshare", ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child",
                          "--mount-proc", "sh", "-c", mount, "sh", sys.executable, *sys.argv])
    return True


def skip(why):
    print(f"SKIPPED: {why}", file=sys.stderr)
    sys.exit(SKIPPED)
