"""Inside a sandbox under test: try what must not be possible and report what happened.

Every attempt is bounded by itself, so that a sandbox that holds nothing back is not harmed by its own test: at most
`max_processes` + 8 sleeping children, one allocation, files of a few megabytes.

Usage: `python sandbox_probe.pyc READ_FD WRITE_FD`, started by `rewards.sandbox_selftest`.
"""

from __future__ import annotations

import _socket
import os
import signal
import sys
import time

_FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, _FOLDER)  # in the sandbox, `rewards` holds the codec only

from rewards.code_codec import receive, send  # noqa: E402
from rewards.sandbox_confine import install_filter  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def _try(attempt: Callable[..., Any], *arguments: Any) -> str:
    """The name of the exception, or "" where the attempt succeeded."""
    try:
        attempt(*arguments)
    except BaseException as error:
        return type(error).__name__
    return ""


def _fork_sleepers(most: int) -> int:
    children: list[int] = []
    try:
        while len(children) < most:
            child = os.fork()
            if child == 0:
                time.sleep(20)
                os._exit(0)
            children.append(child)
    except OSError:
        pass
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return len(children)


def _leave_daemon() -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            time.sleep(60)
        os._exit(0)


def _connect(port: int) -> None:
    connection = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    connection.settimeout(1)
    connection.connect(("127.0.0.1", port))


def _fill_tmp(most_mb: int) -> int:
    """Megabytes that could be written."""
    chunk, written, paths = bytes(1 << 20), 0, []
    try:
        for number in range(most_mb):
            paths.append(f"fill{number}")
            with open(paths[-1], "wb", 0) as file:
                written += file.write(chunk) >> 20
    except OSError:
        pass
    for path in paths:
        _try(os.unlink, path)
    return written


def _write_file(path: str) -> None:
    with open(path, "w") as file:
        file.write("x")
    os.unlink(path)


def _look(order: dict[str, Any]) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "uid": os.getuid(),
        "environment": sorted(os.environ),
        "allocate": _try(bytearray, order["memory_mb"] << 20),
        "connect": _try(_connect, order["port"]),
        "vsock": _try(_socket.socket, 40, _socket.SOCK_STREAM),
        "read_host": [_try(open, path) for path in order["host_files"]],
        "list_host": [_try(os.listdir, path) for path in order["host_folders"]],
        "write_outside": [_try(_write_file, f"{folder}/x") for folder in order["folders"]],
        "chroot": _try(os.chroot, "."),
        "become_root": _try(os.setresuid, 0, 0, 0) if os.getuid() != 0 else "",
        "memfd": _try(os.memfd_create, "x"),
        "num_forked": _fork_sleepers(order["max_processes"] + 8),
        "tmp_mb": _fill_tmp(order["tmp_mb"] + 8),
        "daemon": _try(_leave_daemon),
    }


def main() -> None:
    """Answer one order."""
    read_fd, write_fd = int(sys.argv[1]), int(sys.argv[2])
    os.write(write_fd, b"R")
    order = receive(read_fd)
    install_filter(_FOLDER)
    send(write_fd, _look(order))
    receive(read_fd)


if __name__ == "__main__":
    main()
