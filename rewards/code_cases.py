"""Stdin-style tasks: hand a program its input case by case and compare what it printed.

The comparison happens here, in the grader's process: expected output never enters the sandbox. One sandbox serves all
cases of one program, each in a forked child; a program that takes the sandbox over can only print something else.

Covered: trailing blanks and blank lines at the end do not matter; line count and tokens must match; where the expected
token is a decimal fraction, 1e-6 absolute or relative is allowed. Every case has its time limit, kept from outside.
Not covered: tasks with several right answers, and answers in another order.

Usage: `same_output("1.5 yes", "1.5000000001 yes\\n")`.
"""

import json
import math
import os
import re
import select
import time
from dataclasses import dataclass
from typing import Any

from rewards.code_codec import MAX_FRAME_BYTES
from rewards.code_task import Case, CodeResult, CodeStatus
from rewards.sandbox_limits import Limits, SandboxError
from rewards.sandbox_process import WATCH_INTERVAL_S, Nursery, SandboxProcess

_TOLERANCE = 1e-6
_DECIMAL = re.compile(r"[-+]?[0-9]*\.[0-9]+(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_MAX_NUMBER_CHARS = 400


def same_output(expected: str, printed: str) -> bool:
    """Whether `printed` answers as `expected` does."""
    wanted_lines, lines = _lines(expected), _lines(printed)
    return len(wanted_lines) == len(lines) and all(map(_same_line, wanted_lines, lines))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same_line(expected: str, printed: str) -> bool:
    if expected == printed:
        return True
    wanted, tokens = expected.split(), printed.split()
    return len(wanted) == len(tokens) and all(map(_same_token, wanted, tokens))


def _same_token(expected: str, printed: str) -> bool:
    if expected == printed:
        return True
    if max(len(expected), len(printed)) > _MAX_NUMBER_CHARS or not _DECIMAL.fullmatch(expected):
        return False
    if not _NUMBER.fullmatch(printed):
        return False
    return math.isclose(float(expected), float(printed), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


class ProgramLimit(Exception):
    """A program went over a limit; `status` says over which."""

    def __init__(self, status: CodeStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_usage(process: SandboxProcess, limits: Limits) -> None:
    """Raise ProgramLimit if all processes of a sandbox together use too much."""
    usage = process.usage()
    if usage.resident_bytes > limits.memory_mb << 20:
        raise ProgramLimit(CodeStatus.OOM, f"more than {limits.memory_mb} MB in all processes together")
    if usage.num_processes >= limits.max_processes:
        raise ProgramLimit(CodeStatus.CRASH, f"{limits.max_processes} processes")
    if usage.num_files > limits.max_files:
        raise ProgramLimit(CodeStatus.CRASH, f"more than {limits.max_files} files")


class Conversation:
    """Messages to and from a hostile process, none of which can block or fill the grader."""

    def __init__(self, process: SandboxProcess, limits: Limits) -> None:
        self._process, self._limits = process, limits
        os.set_blocking(process.request_fd, False)
        os.set_blocking(process.reply_fd, False)

    def exchange(self, message: Any, deadline: float) -> dict[str, Any]:
        """Send one message and return the answer; ProgramLimit, EOFError or ValueError if there is none."""
        payload = json.dumps(message).encode("ascii")
        if len(payload) > MAX_FRAME_BYTES:
            raise SandboxError(f"a program or a case of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
        rest = memoryview(len(payload).to_bytes(4, "big") + payload)
        while rest:
            self._wait(deadline, is_write=True)
            try:
                rest = rest[os.write(self._process.request_fd, rest[: 1 << 16]) :]
            except BrokenPipeError:
                raise EOFError from None
        num_bytes = int.from_bytes(self._read(4, deadline), "big")
        if num_bytes > max(MAX_FRAME_BYTES, 8 * self._limits.max_output_bytes):
            raise ValueError(f"a reply of {num_bytes} bytes")
        reply = json.loads(self._read(num_bytes, deadline))
        if not isinstance(reply, dict):
            raise ValueError(f"a reply is an object, got {type(reply).__name__}")
        return reply

    def _read(self, num_bytes: int, deadline: float) -> bytes:
        chunks: list[bytes] = []
        while num_bytes:
            self._wait(deadline, is_write=False)
            chunk = os.read(self._process.reply_fd, min(num_bytes, 1 << 20))
            if not chunk:
                raise EOFError
            chunks.append(chunk)
            num_bytes -= len(chunk)
        return b"".join(chunks)

    def _wait(self, deadline: float, *, is_write: bool) -> None:
        fds = [self._process.request_fd if is_write else self._process.reply_fd]
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ProgramLimit(CodeStatus.TIMEOUT, "out of time")
            ready = select.select(*([], fds) if is_write else (fds, []), [], min(left, WATCH_INTERVAL_S))
            if ready[0] or ready[1]:
                return
            check_usage(self._process, self._limits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What one run of a program gave; text of its making is in all of it."""

    status: CodeStatus
    """ok, or why it ended early."""
    printed: str = ""
    """Standard output, up to a byte more than the limit; "" where a limit ended the program."""
    error: str = ""
    """Why it ended early, shortened."""


class CaseRunner:
    """Runs one program on cases, in a new sandbox whenever the last one had to be killed."""

    def __init__(self, nursery: Nursery, limits: Limits, code: str) -> None:
        self._nursery, self._limits, self._code = nursery, limits, code
        self._process: SandboxProcess | None = None
        self._conversation: Conversation | None = None

    def run(self, case: Case, deadline: float) -> CodeResult:
        """Grade one case; `num_tests` is 1."""
        output = self.execute(case.stdin, deadline)
        if output.status is not CodeStatus.OK:
            return CodeResult(status=output.status, num_tests=1, error=output.error)
        if len(output.printed) > self._limits.max_output_bytes:
            return CodeResult(status=CodeStatus.WRONG, num_tests=1, error="too much output")
        if not same_output(case.expected, output.printed):
            return CodeResult(status=CodeStatus.WRONG, num_tests=1, error=f"printed {output.printed[:200]!r}")
        return CodeResult(status=CodeStatus.OK, num_passed=1, num_tests=1)

    def execute(self, stdin: str, deadline: float) -> Output:
        """Run the program once."""
        case_deadline = min(deadline, time.monotonic() + self._limits.timeout_s)
        try:
            if self._conversation is None:
                self._start(case_deadline)
            assert self._conversation is not None
            reply = self._conversation.exchange(stdin, case_deadline)
            return _output_of(str(reply["out"]), int(reply["status"]), str(reply["err"]))
        except ProgramLimit as limit:
            self.close()
            return Output(status=limit.status, error=str(limit))
        except (EOFError, ValueError, KeyError, TypeError, RecursionError) as error:
            self.close()
            return Output(status=CodeStatus.CRASH, error=f"the program's process ended {error}")

    def close(self) -> None:
        """Kill the sandbox."""
        if self._process is not None:
            self._process.kill()
        self._process = self._conversation = None

    def _start(self, deadline: float) -> None:
        self._process = self._nursery.take()
        conversation = Conversation(self._process, self._limits)
        boot = {"kind": "stdin", "code": self._code, "max_output_bytes": self._limits.max_output_bytes}
        reply = conversation.exchange(boot, deadline)
        if "e" in reply:
            raise ProgramLimit(CodeStatus.SYNTAX, f"{reply['e']}: {reply.get('m')}"[:300])
        self._conversation = conversation


def _output_of(printed: str, exit_status: int, error_text: str) -> Output:
    if exit_status == 0:
        return Output(status=CodeStatus.OK, printed=printed)
    last_line = error_text.strip().rpartition("\n")[2][:300]
    kind = CodeStatus.OOM if last_line.startswith("MemoryError") else CodeStatus.CRASH
    return Output(status=kind, printed=printed, error=last_line or f"exit status {exit_status}")
