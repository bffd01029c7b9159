"""Grading programs: the solution in one sandbox, the tests in another, the verdict from the tests' side only.

A solution's sandbox is started ahead of time, used for one program and killed with all it started. The tests' side is
warm: it forks a child per grading, from which nothing comes back but the verdict.

Covered: see `rewards.sandbox_launch` (the host), `rewards.code_codec` (what crosses), `rewards.code_test_side` (what
the tests believe), `rewards.code_cases` (stdin-style programs). The grader's process never compiles, runs, unpickles
or formats anything of the program's making beyond bounded text.
Not covered: programs that hold the answers because the prompt shows the tests, weak tests, guessing.

Usage: `with CodeGrader() as grader: grader.grade(task, "def add(a, b): return a + b").value()`.
"""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Self

from rewards.code_cases import CaseRunner, check_usage
from rewards.code_remote import RemoteSandbox
from rewards.code_task import CodeResult, CodeStatus, CodeTask
from rewards.code_verdict import TestSides, job_of, result_of
from rewards.sandbox import open_sandbox
from rewards.sandbox_limits import Limits, SandboxError

_MAX_CODE_CHARS = 1 << 20


class CodeGrader:
    """Grades programs in a pool of sandboxes; every method may be called from any thread."""

    def __init__(
        self,
        sandbox: str = "auto",
        *,
        limits: Limits | None = None,
        num_workers: int | None = None,
        packages: Path | None = None,
        allow_unsafe_code: bool = False,
    ) -> None:
        self.num_workers = num_workers or len(os.sched_getaffinity(0))
        """Programs graded at the same time."""
        self.limits = limits or Limits()
        self._remote: RemoteSandbox | None = None
        if sandbox.startswith(("http://", "https://")):
            self._remote = RemoteSandbox(sandbox, self.limits)
            # Only the data set's own tests run here then, which are trusted: any tier will do for them.
            self._sandbox = open_sandbox(limits=self.limits, packages=packages, allow_unsafe_code=True, num_waiting=0)
            self.description = f"code sandbox: remote, {sandbox}; tests here ({self._sandbox.description})"
        else:
            self._sandbox = open_sandbox(
                sandbox,
                limits=self.limits,
                packages=packages,
                allow_unsafe_code=allow_unsafe_code,
                num_waiting=self.num_workers + 1,
            )
            self.description = self._sandbox.description
        self._slots = threading.Semaphore(self.num_workers)
        self._tests = TestSides(self._sandbox.tests)
        self._pid = os.getpid()

    def grade(self, task: CodeTask, code: str, *, stop_at_first: bool = True) -> CodeResult:
        """Grade one program; waits for a free slot. `stop_at_first=False` counts the tests behind a failure too."""
        if os.getpid() != self._pid:
            raise SandboxError("a CodeGrader does not survive os.fork(); make one in each process")
        if not code.strip():
            return CodeResult(status=CodeStatus.NO_CODE, error="no code in the completion")
        if len(code) > _MAX_CODE_CHARS:
            return CodeResult(status=CodeStatus.SYNTAX, error=f"a program of {len(code)} characters")
        with self._slots:
            started = time.monotonic()
            grade = self._grade_cases if task.cases else self._grade_tests
            result = grade(task, code, stop_at_first)
            return replace(result, seconds=time.monotonic() - started)

    def grade_many(self, programs: Sequence[tuple[CodeTask, str]], *, stop_at_first: bool = True) -> list[CodeResult]:
        """Grade programs side by side; results in their order."""
        with ThreadPoolExecutor(self.num_workers) as threads:
            return list(threads.map(lambda pair: self.grade(*pair, stop_at_first=stop_at_first), programs))

    def close(self) -> None:
        """Kill everything that is idle."""
        self._tests.close()
        self._sandbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _grade_cases(self, task: CodeTask, code: str, stop_at_first: bool) -> CodeResult:
        deadline = time.monotonic() + self.limits.total_timeout_s
        runner = CaseRunner(self._sandbox.solutions, self.limits, code)
        remote = self._remote
        num_passed, first = 0, None
        try:
            for number, case in enumerate(task.cases):
                result = runner.run(case, deadline) if remote is None else remote.grade_case(case, code)
                num_passed += result.num_passed
                if result.status is not CodeStatus.OK and first is None:
                    first = replace(result, first_failure=f"case {number + 1}")
                if first is not None and (stop_at_first or first.status is CodeStatus.SYNTAX):
                    break
                if time.monotonic() >= deadline:
                    break
        finally:
            runner.close()
        return replace(first or CodeResult(status=CodeStatus.OK), num_passed=num_passed, num_tests=len(task.cases))

    def _grade_tests(self, task: CodeTask, code: str, stop_at_first: bool) -> CodeResult:
        if self._remote is not None:
            return self._remote.grade_tests(task, code, self._tests, stop_at_first=stop_at_first)
        job = job_of(task, code, stop_at_first=stop_at_first)
        solution = self._sandbox.solutions.take()
        tests, is_done = None, False
        try:
            tests = self._tests.take()
            deadline = time.monotonic() + self.limits.timeout_s
            verdict, limit = tests.run(
                job, solution.request_fd, solution.reply_fd, deadline, lambda: check_usage(solution, self.limits)
            )
            is_done = limit is None
            is_early_end = verdict.get("outcome") == "import"
            return result_of(verdict, limit, solution.wait(0.2) if is_early_end else None)
        finally:
            solution.kill()
            if tests is not None:
                self._tests.give_back(tests, is_done=is_done)
