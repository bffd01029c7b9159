"""Inside a sandbox: install the seccomp filter that the launcher could not.

bubblewrap installs the filter itself. For the other tiers it lies beside the runner, and the runner installs it right
before the first statement of the program under test.

Usage: `install_filter(folder_of_the_runner)`.
"""

from __future__ import annotations

import os

INSTALLED_FILTER = "install.bpf"
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2


def install_filter(folder: str) -> None:
    """Install the filter if there is one; RuntimeError if the kernel refuses."""
    path = os.path.join(folder, INSTALLED_FILTER)
    if not os.path.exists(path):
        return
    import ctypes  # half a start of the interpreter: only where it is needed

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    with open(path, "rb") as file:
        instructions = file.read()
    program = Program(len(instructions) // 8, instructions)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0):
        raise RuntimeError(f"the kernel refused the seccomp filter, errno {ctypes.get_errno()}")
