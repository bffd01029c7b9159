"""Grading on a remote sandbox that speaks SandboxFusion's form: POST {url}/run_code, one program per request.

Such a server runs a program to its end and returns what it printed, so calls cannot go back and forth. Instead the
tests run here first against a solution that answers every call with "unknown", which shows the calls they make; the
server runs the program with all those calls at once; then the tests run again with the answers. Calls that depend on
earlier answers are asked for in further requests. Expected values never leave this machine.

Request: {"code", "language": "python", "stdin", "run_timeout", "compile_timeout"}. Response: {"status": "Success" |
"Failed" | "SandboxError", "message", "run_result": {"status": "Finished" | "TimeLimitExceeded" | "Error",
"return_code", "stdout", "stderr"}}.

Covered: the verdict comes from the tests' side here; a program can only forge its own answers. Connection errors, HTTP
errors and "SandboxError" are tried again, then raised as SandboxError.
Not covered: isolation is the server's matter. Tests and prelude, which are trusted, run on this machine, in the best
local tier or, where there is none, under rlimits. Calls after the tests looked at an unknown value cost a request each.

Usage: `RemoteSandbox("http://localhost:8080", limits)`.
"""

import json
import os
import re
import secrets
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rewards.code_cases import ProgramLimit, same_output
from rewards.code_codec import receive, send
from rewards.code_task import Case, CodeResult, CodeStatus, CodeTask
from rewards.code_verdict import TestSides, Verdict, job_of, result_of
from rewards.sandbox_limits import Limits, SandboxError

_MAX_ROUNDS = 60
_NUM_TRIES = 3
_SLACK_S = 10.0
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_MODULES = ("code_codec", "sandbox_confine", "code_solution_side")


class RemoteSandbox:
    """A server, reached by HTTP."""

    def __init__(self, url: str, limits: Limits) -> None:
        self._url = url.rstrip("/")
        self._limits = limits

    def run(self, code: str, stdin: str) -> tuple[CodeStatus | None, str, str]:
        """Run a program; return (None, or why it failed), what it printed, and its last words."""
        limits = self._limits
        request = {"code": code, "language": "python", "stdin": stdin, "run_timeout": limits.timeout_s}
        reply = self._post(request | {"compile_timeout": limits.timeout_s})
        result = reply.get("run_result") or {}
        printed, words = str(result.get("stdout") or ""), str(result.get("stderr") or "").strip()[-300:]
        if result.get("status") == "TimeLimitExceeded":
            return CodeStatus.TIMEOUT, printed, "not done within the time limit"
        if reply.get("status") == "Success" and result.get("return_code") == 0:
            return None, printed, words
        kind = CodeStatus.OOM if words.rpartition("\n")[2].startswith("MemoryError") else CodeStatus.CRASH
        return kind, printed, words.rpartition("\n")[2] or f"exit status {result.get('return_code')}"

    def grade_case(self, case: Case, code: str) -> CodeResult:
        """Grade one stdin case; `num_tests` is 1."""
        status, printed, words = self.run(code, case.stdin)
        if status is CodeStatus.CRASH and words.startswith(("SyntaxError", "IndentationError", "TabError")):
            status = CodeStatus.SYNTAX
        if status is not None:
            return CodeResult(status=status, num_tests=1, error=words)
        if not same_output(case.expected, printed):
            return CodeResult(status=CodeStatus.WRONG, num_tests=1, error=f"printed {printed[:200]!r}")
        return CodeResult(status=CodeStatus.OK, num_passed=1, num_tests=1)

    def grade_tests(self, task: CodeTask, code: str, tests: TestSides, *, stop_at_first: bool) -> CodeResult:
        """Grade function-style tests."""
        job = job_of(task, code, stop_at_first=stop_at_first)
        solution = _Replayed(self, json.dumps([task.tests, task.prelude]))
        _run_against(solution, job | {"stop_at_first": False, "is_collecting": True}, tests, self._limits)
        solution.is_collecting = False
        # The second run may wait for the server several times; each wait has its own limit.
        verdict, limit = _run_against(solution, job, tests, self._limits)
        if solution.failure is not None:
            raise solution.failure
        if solution.status is CodeStatus.TIMEOUT and not verdict.get("is_passed"):
            limit = ProgramLimit(CodeStatus.TIMEOUT, "not done within the time limit")
        return result_of(verdict, limit)

    def _post(self, request: dict[str, Any]) -> dict[str, Any]:
        problem = ""
        for attempt in range(_NUM_TRIES):
            if attempt:
                time.sleep(0.2 * 4**attempt)
            http_request = urllib.request.Request(
                f"{self._url}/run_code", json.dumps(request).encode(), {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(http_request, timeout=self._limits.timeout_s + _SLACK_S) as response:
                    reply = json.loads(response.read(64 << 20))
            except (urllib.error.URLError, OSError, ValueError) as error:
                problem = str(error)
                continue
            if isinstance(reply, dict) and reply.get("status") != "SandboxError":
                return reply
            problem = str(reply)[:300]
        raise SandboxError(f"the sandbox at {self._url} failed {_NUM_TRIES} times: {problem}; is it running?")


class _Replayed:
    """Stands for the solution on the tests' pipes: knows answers, asks the server for more when it must."""

    def __init__(self, remote: RemoteSandbox, source: str) -> None:
        self._remote = remote
        self._names = sorted(set(_IDENTIFIER.findall(source)))
        self._requests: list[dict[str, Any]] = []
        self._answers: list[dict[str, Any]] = []
        self._num_rounds = 0
        self.is_collecting = True
        self.status: CodeStatus | None = None
        """Why the server's last run ended early, if it did."""
        self.failure: SandboxError | None = None
        """The server's failure."""

    def serve(self, read_fd: int, write_fd: int) -> None:
        """Answer until the tests' side closes."""
        try:
            boot = receive(read_fd)
            send(write_fd, {"names": self._names} if self.is_collecting else self._answer(boot, -1, None))
            number = 0
            while True:
                request = receive(read_fd)
                if self.is_collecting:
                    self._requests.append(request)
                    send(write_fd, {})
                    continue
                answer = self._answer(boot, number, request)
                number += 1
                send(write_fd, answer)
        except (EOFError, BrokenPipeError, ValueError, RecursionError):
            pass
        except SandboxError as error:
            self.failure = error
        finally:
            os.close(read_fd)
            os.close(write_fd)

    def _answer(self, boot: dict[str, Any], number: int, request: dict[str, Any] | None) -> dict[str, Any]:
        """The reply to request `number` (-1: the boot); EOFError if the program ended before it."""
        if request is not None and (number >= len(self._requests) or self._requests[number] != request):
            self._requests[number:] = [request]
            del self._answers[number + 1 :]
        if number + 1 >= len(self._answers):
            self._ask(boot)
        if number + 1 >= len(self._answers):
            raise EOFError("the program ended")
        return self._answers[number + 1]

    def _ask(self, boot: dict[str, Any]) -> None:
        self._num_rounds += 1
        if self._num_rounds > _MAX_ROUNDS:
            raise SandboxError(f"the tests need more than {_MAX_ROUNDS} requests to the remote sandbox")
        marker = secrets.token_hex(8)
        stdin = json.dumps({"boot": boot, "requests": self._requests, "marker": marker})
        self.status, printed, _ = self._remote.run(_driver(), stdin)
        lines = [line[len(marker) :] for line in printed.split("\n") if line.startswith(marker)]
        self._answers = [json.loads(line) for line in lines]


def _run_against(
    solution: _Replayed, job: dict[str, Any], tests: TestSides, limits: Limits
) -> tuple[Verdict, ProgramLimit | None]:
    request_read, request_write = os.pipe()
    reply_read, reply_write = os.pipe()
    thread = threading.Thread(target=solution.serve, args=(request_read, reply_write), daemon=True)
    thread.start()
    side, is_done = tests.take(), False
    try:
        deadline = time.monotonic() + (limits.timeout_s if solution.is_collecting else limits.total_timeout_s)
        verdict, limit = side.run(job, request_write, reply_read, deadline, lambda: None)
        is_done = limit is None
        return verdict, limit
    finally:
        os.close(request_write)
        os.close(reply_read)
        tests.give_back(side, is_done=is_done)
        thread.join()


def _driver() -> str:
    """A program that brings the solution's side along and replays the requests of its standard input."""
    sources = {name: Path(__file__).with_name(f"{name}.py").read_text() for name in _MODULES}
    return "\n".join(
        [
            "import json, sys, types",
            f"sources = {sources!a}",
            "sys.modules['rewards'] = types.ModuleType('rewards')",
            "for name, source in sources.items():",
            "    module = sys.modules['rewards.' + name] = types.ModuleType('rewards.' + name)",
            "    module.__file__ = '/nowhere/' + name",
            "    exec(compile(source, name, 'exec', dont_inherit=True), module.__dict__)",
            "order = json.load(sys.stdin)",
            "sys.modules['rewards.code_solution_side'].replay(order['boot'], order['requests'], order['marker'])",
        ]
    )
