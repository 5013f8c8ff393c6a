"""Become a program that ends with the process that started it: `python bound.py SIGNAL PARENT FILE WORD ...`.

The kernel sends the signal when the parent dies, however that happens. A lock on the second byte of FILE stays with the
program, so that others can see whether it lives.
"""

import ctypes
import fcntl
import os
import sys

_PR_SET_PDEATHSIG = 1


def bind(number: int, parent: int, path: str) -> None:
    """Bind this process; it ends where the parent is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)
    descriptor = os.open(path, os.O_WRONLY)
    os.set_inheritable(descriptor, True)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1)
    except OSError:
        os.close(descriptor)  # a file system without locks


if __name__ == "__main__":
    bind(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    os.execv(sys.argv[4], sys.argv[4:])
