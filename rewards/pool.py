"""Worker processes with a deadline that always holds: SIGKILL from outside, by the wall clock.

No `signal.alarm` and no thread that cannot be stopped, so it works from any thread, asyncio (`asyncio.to_thread`), Ray
actors and processes that have loaded torch: the workers are forked by a fresh interpreter (worker.py), not by the
caller. multiprocessing's own ways do not do: "fork" copies the locks of other threads, "spawn" and "forkserver" run the
caller's `__main__` again, and a task of its pools cannot be killed alone.

Covered: a function that hangs, in C code too; that dies, exits or takes more memory than the limit; what it started
(unless that moved to a session of its own). It is replaced; other calls do not wait for it.
Not covered: hostile code. A worker has the caller's rights, files and network, and its results are unpickled.

Usage: `with WorkerPool(4) as pool: outcome = pool.call(math.factorial, 10, timeout_s=1.0)`.
"""

import functools
import itertools
import logging
import os
import pickle
import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rewards.portable import pack
from rewards.server import Server, exchange, is_quiet
from rewards.worker import CALL, DONE, LAST, LOAD

_KNOWN_FUNCTIONS = 256
_LOGGER = logging.getLogger(__name__)


class CallStatus(StrEnum):
    """How a call ended."""

    OK = "ok"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of one call."""

    status: CallStatus
    """Whether the function returned."""
    value: Any = None
    """What it returned; None unless the status is OK."""
    error: str = ""
    """The traceback in the worker, or what happened to the worker; empty if the status is OK."""
    seconds: float
    """Wall time from sending the call to the result or the kill, without waiting for a free worker."""
    exception: BaseException | None = None
    """The exception itself, where the function ran in this process (call.py)."""
    has_died: bool = False
    """Whether the worker was gone before it answered."""


@dataclass(slots=True)
class _Worker:
    """A place in the pool, with or without a living process."""

    pid: int = 0
    """0 = no process yet, or no more."""
    sock: socket.socket | None = None
    loaded: set[int] = field(default_factory=set)
    """Numbers of the functions it has."""


class WorkerPool:
    """Processes that run functions one at a time each; any number of threads may call at once."""

    def __init__(
        self,
        num_workers: int,
        *,
        memory_limit_mib: int = 0,
        preload: Sequence[str] = (),
        load_timeout_s: float = 120.0,
    ) -> None:
        """Starts nothing: the first call does, or `start`.

        `memory_limit_mib` is the address space of one worker, 0 for no limit. `preload` names modules that the server
        imports once for all workers. A worker that does not have a function yet may take `load_timeout_s` to import
        it, which does not count as the call's time.
        """
        if num_workers < 1:
            raise ValueError(f"num_workers must be >= 1, got {num_workers}")
        if memory_limit_mib < 0:
            raise ValueError(f"memory_limit_mib must be >= 0, 0 for no limit, got {memory_limit_mib}")
        self.num_workers, self.memory_limit_mib = num_workers, memory_limit_mib
        self.preload, self.load_timeout_s = tuple(preload), load_timeout_s
        self._closed = False
        self._counter = itertools.count()
        self._numbered = functools.lru_cache(_KNOWN_FUNCTIONS)(self._number)
        self._reset()
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: (pool := reference()) and pool._reset())

    def _reset(self) -> None:
        """Begin without processes; in a forked copy of the caller too, since they belong to the original."""
        self._lock = threading.Lock()  # of the server
        self._server: Server | None = None
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()  # the last used first: its caches are warm
        for _ in range(self.num_workers):
            self._free.put(_Worker())

    def start(self) -> None:
        """Start the server and all workers now, so that the first calls do not wait for them."""
        workers = [self._take() for _ in range(self.num_workers)]
        try:
            for worker in workers:
                self._ensure_process(worker)
        finally:
            for worker in workers:
                self._free.put(worker)

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float, **kwargs: Any) -> Outcome:
        """Run `function` in a free worker (waiting for one first), for at most `timeout_s`.

        Whatever the function does is an `Outcome`; ValueError is for a function that cannot reach a worker. Pass what
        changes from call to call as arguments: every new `partial` is sent, and kept, as a new function.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be > 0, got {timeout_s}")
        number, packed = self._numbered(function) if isinstance(function, Hashable) else self._number(function)
        try:
            request = pack((args, kwargs))
        except ValueError as error:
            return Outcome(status=CallStatus.ERROR, error=f"the arguments: {error}", seconds=0.0)
        worker = self._take()
        try:
            return self._run(worker, number, packed, request, timeout_s)
        except BaseException:  # an interrupt: a result that nobody has read must not meet the next call
            self._discard(worker)
            raise
        finally:
            self._free.put(worker)

    def map(self, function: Callable[..., Any], items: Sequence[Any], *, timeout_s: float) -> list[Outcome]:
        """Call `function` on every item, all workers at once; outcomes in the items' order."""
        with ThreadPoolExecutor(min(self.num_workers, len(items) or 1)) as threads:
            return list(threads.map(lambda item: self.call(function, item, timeout_s=timeout_s), items))

    def close(self) -> None:
        """Kill all processes; calls under way end with an error. Twice does no harm."""
        self._closed = True
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.stop()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has the same settings and processes of its own."""
        return _make_pool, (self.num_workers, self.memory_limit_mib, self.preload, self.load_timeout_s)

    def _number(self, function: Callable[..., Any]) -> tuple[int, bytes]:
        return next(self._counter), pack(function)

    def _take(self) -> _Worker:
        if self._closed:
            raise ValueError("the WorkerPool is closed; make a new one")
        return self._free.get()

    def _run(self, worker: _Worker, number: int, packed: bytes, request: bytes, timeout_s: float) -> Outcome:
        """A call whose worker dies is begun once more: killed from outside it shall not cost a sample, and a function
        that ends its process does so again.
        """
        outcome = self._attempt(worker, number, packed, request, timeout_s)
        if outcome.has_died and not self._closed:
            _LOGGER.warning("%s; its call is begun again", outcome.error)
            outcome = self._attempt(worker, number, packed, request, timeout_s)
        return outcome

    def _attempt(self, worker: _Worker, number: int, packed: bytes, request: bytes, timeout_s: float) -> Outcome:
        started = time.perf_counter()
        loading = False
        try:
            sock = self._ensure_process(worker)
            if number not in worker.loaded:
                loading = True
                kind, _, reply = exchange(sock, LOAD, number, packed, self.load_timeout_s)
                if kind != DONE:
                    error = reply.decode(errors="replace")
                    return Outcome(status=CallStatus.ERROR, error=error, seconds=time.perf_counter() - started)
                worker.loaded.add(number)
                loading = False
            started = time.perf_counter()
            kind, _, reply = exchange(sock, CALL, number, request, timeout_s)
        except TimeoutError:
            self._discard(worker)
            what, limit = ("loading the function", self.load_timeout_s) if loading else ("the call", timeout_s)
            seconds = time.perf_counter() - started
            error = f"{what} took longer than {limit:g} s; the worker was killed"
            return Outcome(status=CallStatus.TIMEOUT, error=error, seconds=seconds)
        except (EOFError, OSError) as problem:
            self._discard(worker)
            error = f"the worker died ({problem}): killed from outside, out of memory, a crash, or os._exit"
            seconds = time.perf_counter() - started
            return Outcome(status=CallStatus.ERROR, error=error, seconds=seconds, has_died=True)
        seconds = time.perf_counter() - started
        if kind == LAST:
            self._discard(worker)
        if kind != DONE:
            return Outcome(status=CallStatus.ERROR, error=reply.decode(errors="replace"), seconds=seconds)
        try:
            return Outcome(status=CallStatus.OK, value=pickle.loads(reply), seconds=seconds)
        except Exception as error:  # a class that can be written but not read back, for example an exception
            text = f"the result cannot be read: {type(error).__name__}: {error}"
            return Outcome(status=CallStatus.ERROR, error=text, seconds=seconds)

    def _ensure_process(self, worker: _Worker) -> socket.socket:
        if worker.sock is not None:
            if is_quiet(worker.sock):
                return worker.sock
            self._discard(worker)  # it died while nobody asked it anything
        with self._lock:
            if self._closed:
                raise OSError("the WorkerPool was closed")
            if self._server is not None and not self._server.is_alive():
                self._server.stop()
                self._server = None
            if self._server is None:
                self._server = Server(self.memory_limit_mib, self.preload)
            worker.pid, worker.sock = self._server.fork()
        worker.loaded.clear()
        return worker.sock

    def _discard(self, worker: _Worker) -> None:
        """Kill the worker's process; the next call that gets this place starts another."""
        pid, sock, worker.pid, worker.sock = worker.pid, worker.sock, 0, None
        worker.loaded.clear()
        if sock is not None:
            sock.close()
        with self._lock:
            if pid and self._server is not None:
                self._server.kill(pid)


@functools.cache
def shared_pool(num_workers: int, *, memory_limit_mib: int = 0, preload: tuple[str, ...] = ()) -> WorkerPool:
    """One pool per process and setting, closed when Python exits; for rewards, which have no lifetime of their own."""
    return WorkerPool(num_workers, memory_limit_mib=memory_limit_mib, preload=preload)


def _make_pool(num_workers: int, memory_limit_mib: int, preload: tuple[str, ...], load_timeout_s: float) -> WorkerPool:
    return WorkerPool(num_workers, memory_limit_mib=memory_limit_mib, preload=preload, load_timeout_s=load_timeout_s)
