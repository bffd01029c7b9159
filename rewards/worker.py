"""The other side of pool.py: a server process that forks workers, and the loop of a worker.

The server is a fresh interpreter with one thread, so that forking is safe whatever the training process has loaded
(torch, CUDA, Ray, threads), and so that modules it has preloaded cost a new worker nothing. Server and workers sit in
sessions of their own: Ctrl-C in a terminal does not reach them.

Nobody outlives its parent: the server ends when its control socket closes or its parent is another process than the
one that started it (PDEATHSIG would fire when the *thread* that started it ends), and kills its workers with all they
started; a worker gets SIGKILL from the kernel when the server dies.
"""

import asyncio
import contextlib
import ctypes
import gc
import importlib
import inspect
import os
import pickle
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

HEADER = struct.Struct("!cIQ")
"""Kind, number, size of what follows. To a worker: LOAD and CALL, number = which function. To the server: FORK, KILL,
number = process id. Replies: DONE, FAILED, or LAST, which is a failure after which the worker
ends."""
LOAD, CALL, FORK, KILL, DONE, FAILED, LAST = b"L", b"C", b"F", b"K", b"D", b"X", b"Z"
MAX_MESSAGE_BYTES = 256 * 2**20
_PARENT_CHECK_S = 1.0
_PR_SET_PDEATHSIG = 1


def send(sock: socket.socket, kind: bytes, number: int = 0, data: bytes = b"") -> None:
    """Write one message."""
    sock.sendall(HEADER.pack(kind, number, len(data)) + data)


def receive(sock: socket.socket, deadline: float | None = None) -> tuple[bytes, int, bytes]:
    """Read one message, until `deadline` on the clock `time.monotonic`. Raises EOFError where the other side has gone,
    TimeoutError at the deadline.
    """
    kind, number, size = HEADER.unpack(_receive_bytes(sock, HEADER.size, deadline))
    return kind, number, _receive_bytes(sock, size, deadline) if size else b""


def _receive_bytes(sock: socket.socket, size: int, deadline: float | None) -> bytes:
    buffer = b""
    while len(buffer) < size:
        if deadline is not None:
            sock.settimeout(max(deadline - time.monotonic(), 1e-6))  # 0 would mean "do not wait"
        data = sock.recv(size - len(buffer))
        if not data:
            raise EOFError("the other side has gone")
        buffer = buffer + data if buffer else data
    return buffer


def serve(control_fd: int, parent_pid: int, memory_limit_mib: int, preload: list[str]) -> None:
    """Fork a worker for every FORK message with a socket, until the parent is gone; the main loop of the server."""
    control = socket.socket(fileno=control_fd)
    workers: set[int] = set()
    killed: set[int] = set()
    try:
        try:
            for module in preload:
                importlib.import_module(module)
        except Exception:  # reported to the process that asked for it
            send(control, FAILED, 0, traceback.format_exc().encode())
            return
        gc.freeze()  # a collection in a worker must not copy the shared pages
        send(control, DONE)
        while os.getppid() == parent_pid:
            killed = {pid for pid in killed if os.waitpid(pid, os.WNOHANG) == (0, 0)}
            if not select.select([control], [], [], _PARENT_CHECK_S)[0]:
                continue
            header, fds, _, _ = socket.recv_fds(control, HEADER.size, 1)
            if not header:
                return
            kind, pid, _ = HEADER.unpack(header)
            if kind == FORK:
                pid = os.fork()
                if pid == 0:
                    control.close()
                    _work(socket.socket(fileno=fds[0]), memory_limit_mib)
                os.close(fds[0])
                workers.add(pid)
            else:
                _kill_group(pid)
                workers.discard(pid)
                killed.add(pid)
            send(control, DONE, pid)
    except OSError:
        pass  # the parent went while it was being answered
    finally:
        for pid in workers:
            _kill_group(pid)
        for pid in workers | killed:
            os.waitpid(pid, 0)


def _kill_group(pid: int) -> None:
    """Kill a worker, and what it started. Its id cannot have been given away: only the server reaps it."""
    for kill in (os.killpg, os.kill):  # a worker that has just been forked leads no group yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _work(sock: socket.socket, memory_limit_mib: int) -> None:
    """Answer LOAD and CALL messages until the other side goes; never returns."""
    server = os.getppid()
    try:
        os.setsid()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory_limit_mib:
            limit = memory_limit_mib * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        random.seed()  # else all workers would draw the server's numbers
        functions: dict[int, Callable[..., Any]] = {}
        while True:
            kind, number, data = receive(sock)
            try:
                if kind == LOAD:
                    functions[number] = pickle.loads(data)
                    reply = b""
                else:
                    args, kwargs = pickle.loads(data)
                    value = functions[number](*args, **kwargs)
                    if inspect.iscoroutine(value):
                        value = asyncio.run(value)
                    reply = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
                if len(reply) > MAX_MESSAGE_BYTES:
                    raise ValueError(f"the result has {len(reply)} bytes, more than {MAX_MESSAGE_BYTES}")
                send(sock, DONE, 0, reply)
            except MemoryError:
                send(sock, LAST, 0, f"MemoryError, limit {memory_limit_mib or 'none'} MiB".encode())
                os._exit(1)  # what is left of the heap is not worth keeping
            except BaseException:  # SystemExit too: the caller is told, the worker stays
                send(sock, FAILED, 0, traceback.format_exc().encode(errors="backslashreplace"))
            sys.stdout.flush()
    except (EOFError, OSError):
        os._exit(0)
    finally:
        os._exit(1)
