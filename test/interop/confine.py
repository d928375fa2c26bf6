#!/usr/bin/env python3
"""Runs a program as scripts/nbdferry@.service has systemd run one, as far as that can be done
without systemd: system calls, address families, capabilities, no new privileges, no memory that is
writable and executable, a file system that is read-only but for one folder, UMask, another user.
Not done: cgroups (DeviceAllow), /proc and /home hidden, kernel tunables. As root.

usage: confine.py UNIT FOLDER PROGRAM [ARGUMENT...]
"""
import ctypes
import os
import pathlib
import re
import subprocess
import sys

NOBODY = 65534
CLONE_NEWNS, MS_REC_PRIVATE, MS_BIND = 0x20000, 0x44000, 0x1000
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, NR_MOUNT_SETATTR = -100, 0x8000, 1, 442
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_MDWE, CAP_LAST = 24, 38, 65, 40
ALLOW, EPERM, EAFNOSUPPORT, COMPARE_EQUAL = 0x7FFF0000, 1, 97, 4
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}

libc = ctypes.CDLL(None, use_errno=True)


def must(result, what):
    if result < 0:
        raise OSError(ctypes.get_errno(), what)


def settings(unit):
    """Of each name all values, in their order."""
    found = {}
    for line in pathlib.Path(unit).read_text().splitlines():
        match = re.match(r"(\w+)=(.*)", line)
        if match:
            found.setdefault(match[1], []).append(match[2])
    return found


def expand(names):
    """The system calls behind names and @groups."""
    calls = set()
    for name in names:
        if not name.startswith("@"):
            calls.add(name)
            continue
        text = subprocess.run(["systemd-analyze", "syscall-filter", name], check=True,
                              capture_output=True, text=True).stdout
        members = [line.strip() for line in text.splitlines()[1:]]
        calls |= expand(m for m in members if m and not m.startswith("#"))
    return calls


class Argument(ctypes.Structure):
    _fields_ = [("number", ctypes.c_uint), ("compare", ctypes.c_int),
                ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def filter_system_calls(unit):
    """What is not allowed fails, as SystemCallErrorNumber=EPERM says."""
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    seccomp.seccomp_rule_add_array.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int,
                                               ctypes.c_uint, ctypes.POINTER(Argument)]
    seccomp.seccomp_load.argtypes = [ctypes.c_void_p]
    context = seccomp.seccomp_init(0x00050000 | EPERM)
    allowed = set()
    for value in unit["SystemCallFilter"]:
        if value.startswith("~"):
            allowed -= expand(value[1:].split())
        else:
            allowed |= expand(value.split())
    for name in sorted(allowed - {"socket"}):
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # those of other processors are negative
            must(seccomp.seccomp_rule_add_array(context, ALLOW, number, 0, None), name)
    families = [FAMILIES[name] for name in unit["RestrictAddressFamilies"][0].split()]
    for family in range(64):
        action = ALLOW if family in families else 0x00050000 | EAFNOSUPPORT
        only = Argument(0, COMPARE_EQUAL, family, 0)
        number = seccomp.seccomp_syscall_resolve_name(b"socket")
        must(seccomp.seccomp_rule_add_array(context, action, number, 1, ctypes.byref(only)), "socket")
    must(seccomp.seccomp_load(context), "seccomp_load")


def set_read_only(path, read_only, flags=0):
    attributes = (ctypes.c_uint64 * 4)(*((MOUNT_ATTR_RDONLY, 0) if read_only else
                                         (0, MOUNT_ATTR_RDONLY)), 0, 0)
    must(libc.syscall(NR_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(attributes),
                      ctypes.c_size_t(ctypes.sizeof(attributes))), f"mount_setattr {path}")


def confine(unit, folder):
    must(libc.unshare(CLONE_NEWNS), "unshare")
    must(libc.mount(None, b"/", None, MS_REC_PRIVATE, None), "mount /")
    must(libc.mount(folder.encode(), folder.encode(), None, MS_BIND, None), f"mount {folder}")
    set_read_only("/", True, AT_RECURSIVE)
    set_read_only(folder, False)
    os.umask(int(unit["UMask"][0], 8))
    for capability in range(CAP_LAST + 1):
        must(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), "PR_CAPBSET_DROP")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    libc.prctl(PR_SET_MDWE, 1, 0, 0, 0)  # since Linux 6.3
    filter_system_calls(unit)


def main(unit, folder, *command):
    confine(settings(unit), folder)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
