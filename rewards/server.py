"""The process that forks workers, seen from the pool, and one exchange of messages with a worker.

Not thread-safe: pool.py holds a lock. The other side is worker.py.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence

from rewards.worker import DONE, FORK, HEADER, KILL, receive, send

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 5.0
_SERVER = (
    "import json, sys; fd, parent, memory, preload, sys.path[:] = json.loads(sys.argv[1]); "
    "from rewards.worker import serve; serve(fd, parent, memory, preload)"
)


def exchange(sock: socket.socket, kind: bytes, number: int, data: bytes, timeout_s: float) -> tuple[bytes, int, bytes]:
    deadline = time.monotonic() + timeout_s
    sock.settimeout(timeout_s)
    send(sock, kind, number, data)
    return receive(sock, deadline)


def is_quiet(sock: socket.socket) -> bool:
    """Whether a worker that has nothing to do is alive: neither at its end nor talking unasked."""
    sock.setblocking(False)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


class Server:
    """The process that forks workers (worker.serve)."""

    def __init__(self, memory_limit_mib: int, preload: Sequence[str]) -> None:
        control, theirs = socket.socketpair()
        with theirs:
            setup = [theirs.fileno(), os.getpid(), memory_limit_mib, list(preload), [str(path) for path in sys.path]]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVER, json.dumps(setup)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._control = control
        self.stop = weakref.finalize(self, _stop, control, self._process, os.getpid())  # also when Python exits
        try:
            kind, _, reply = receive(control, time.monotonic() + _START_TIMEOUT_S)
        except (EOFError, OSError) as error:
            self.stop()
            raise RuntimeError(f"the worker server did not start ({error}); what it printed says why") from None
        if kind != DONE:
            self.stop()
            raise ValueError(f"preloading {', '.join(preload)} in the worker server failed: {reply.decode()}")
        control.settimeout(_START_TIMEOUT_S)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self) -> tuple[int, socket.socket]:
        """Start a worker; its process id and the socket to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [HEADER.pack(FORK, 0, 0)], [theirs.fileno()])
        _, pid, _ = receive(self._control)
        return pid, ours

    def kill(self, pid: int) -> None:
        """Kill a worker and what it started."""
        with contextlib.suppress(EOFError, OSError):  # a server that has gone has taken its workers along
            send(self._control, KILL, pid)
            receive(self._control)


def _stop(control: socket.socket, process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked copy: the processes belong to the original
    with contextlib.suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)  # reaches the server even if a forked copy holds the socket open
    control.close()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # its workers die with it
        process.wait()
