"""The grader's end of the tests' side: hand over a job, wait for the verdict, read it.

Covered: the verdict's pipe has one writer, the tests' process; its bytes are bounded, and so is the time.
Not covered: tests that lie (they are the data set's).

Usage: `verdict, limit = tests.run(spec, request_fd, reply_fd, deadline, check)`.
"""

import json
import os
import queue
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from rewards.code_cases import ProgramLimit
from rewards.code_task import CodeResult, CodeStatus, CodeTask
from rewards.sandbox_limits import SandboxError
from rewards.sandbox_process import WATCH_INTERVAL_S, Nursery, SandboxProcess

_MAX_VERDICT_BYTES = 4 << 20
_MAX_JOBS = 1000
_DONE_TIMEOUT_S = 0.5

Verdict = dict[str, Any]


def job_of(task: CodeTask, code: str, *, stop_at_first: bool) -> dict[str, Any]:
    """What the tests' side needs to know."""
    entry_name = task.entry_point.split("(")[0].split(".")[0].strip()
    return {
        "code": code,
        "tests": task.tests,
        "entry_point": task.entry_point,
        "prelude": task.prelude,
        "forget": [entry_name] if task.prelude and entry_name else [],
        "stop_at_first": stop_at_first,
        "is_collecting": False,
    }


class TestSide:
    """A warm tests' process."""

    __test__ = False  # not a pytest class

    def __init__(self, process: SandboxProcess) -> None:
        self._process = process
        self._socket = socket.socket(fileno=os.dup(process.request_fd))
        self._num_jobs = 0
        self._is_idle = True

    def run(
        self, job: dict[str, Any], request_fd: int, reply_fd: int, deadline: float, check: Callable[[], None]
    ) -> tuple[Verdict, ProgramLimit | None]:
        """Run one job against the solution at the two descriptors, calling `check` now and then.

        Returns what was said by the end, and the limit that ended it early, if one did.
        """
        self._num_jobs += 1
        self._is_idle = False
        job_fd = os.memfd_create("job")
        verdict_read, verdict_write = os.pipe()
        try:
            with os.fdopen(os.dup(job_fd), "wb") as file:
                file.write(json.dumps(job).encode("ascii"))
            os.lseek(job_fd, 0, os.SEEK_SET)
            socket.send_fds(self._socket, [b"J"], [job_fd, reply_fd, request_fd, verdict_write])
        except OSError as error:
            os.close(verdict_read)
            raise SandboxError(f"the tests' sandbox is gone: {error}") from None
        finally:
            os.close(job_fd)
            os.close(verdict_write)
        received, limit = bytearray(), None
        try:
            while chunk := _read_watched(verdict_read, deadline, check):
                received += chunk
                if len(received) > _MAX_VERDICT_BYTES:
                    break
        except ProgramLimit as caught:
            limit = caught
        finally:
            os.close(verdict_read)
        return _parse(bytes(received)), limit

    def is_reusable(self) -> bool:
        """Whether the last job's child has ended, so that the next can start; not after many jobs."""
        if not self._is_idle and self._num_jobs < _MAX_JOBS:
            readable, _, _ = select.select([self._socket], [], [], _DONE_TIMEOUT_S)
            self._is_idle = bool(readable) and self._socket.recv(1) == b"D"
        return self._is_idle and self._num_jobs < _MAX_JOBS

    def close(self) -> None:
        """Kill the process."""
        self._socket.close()
        self._process.kill()


class TestSides:
    """Keeps idle tests' processes for the next job."""

    __test__ = False

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._idle: queue.LifoQueue[TestSide] = queue.LifoQueue()

    def take(self) -> TestSide:
        """Return an idle process or start one; give it back after one job."""
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return TestSide(self._nursery.take())

    def give_back(self, tests: TestSide, *, is_done: bool) -> None:
        """Keep the process if its job ended by itself."""
        if is_done and tests.is_reusable():
            self._idle.put(tests)
        else:
            tests.close()

    def close(self) -> None:
        """Kill the idle ones."""
        while not self._idle.empty():
            self._idle.get_nowait().close()


def _read_watched(fd: int, deadline: float, check: Callable[[], None]) -> bytes:
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ProgramLimit(CodeStatus.TIMEOUT, "not done within the time limit")
        readable, _, _ = select.select([fd], [], [], min(left, WATCH_INTERVAL_S))
        if readable:
            return os.read(fd, 1 << 16)
        check()


def _parse(received: bytes) -> Verdict:
    """The number of tests, a dot for each that passed, then the outcome in JSON, if it came to that."""
    total, _, rest = received.partition(b"\n")
    dots, _, line = rest.partition(b"\n")
    counted = {"total": int(total or 0), "passed": dots.count(b".")}
    return counted | (json.loads(line) if line.endswith(b"}\n") else {})


def result_of(verdict: Verdict, limit: ProgramLimit | None, exit_status: int | None = None) -> CodeResult:
    """Read the verdict as a result; `exit_status` is the solution's, for the message if its process ended."""
    counts = {"num_passed": verdict["passed"], "num_tests": verdict["total"]}
    if limit is not None:
        return CodeResult(status=limit.status, error=str(limit), **counts)
    outcome, first = verdict.get("outcome"), verdict.get("first") or {}
    if outcome == "tests":
        return CodeResult(status=CodeStatus.ERROR, error=f"the task's tests are broken: {verdict['error']}")
    if outcome == "import":
        error = f"{verdict['e']}: {verdict['m']}"
        # The phase is the solution's word. It decides between two kinds of 0 only; the prelude has run in the tests.
        if verdict["phase"] == "compile":
            return CodeResult(status=CodeStatus.SYNTAX, error=error, **counts)
        ended = "" if exit_status is None else f" (exit status {exit_status})"
        return CodeResult(status=_raised(verdict["e"]), error=error + ended, **counts)
    if outcome == "done" and verdict["is_passed"]:
        return CodeResult(status=CodeStatus.OK, **counts)
    if outcome != "done":
        return CodeResult(status=CodeStatus.CRASH, error="the tests' process ended without a verdict", **counts)
    status = CodeStatus.WRONG if first.get("kind") == "wrong" else _raised(first.get("type", ""))
    return CodeResult(
        status=status, first_failure=first.get("test", ""), error=first.get("error", "no test failed"), **counts
    )


def _raised(error_type: str) -> CodeStatus:
    return CodeStatus.OOM if error_type == "MemoryError" else CodeStatus.CRASH
