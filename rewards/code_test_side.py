"""Inside the tests' sandbox: run a task's own tests against a solution that lives in another sandbox.

A warm process waits for jobs and forks a child for each, so a job finds the interpreter and `ast` loaded and cannot
change what the next one finds. A job is four descriptors: its specification, the pipes to the solution, and a pipe for
the verdict, which is held here and nowhere else.

Covered: what the solution sends is data (see `rewards.code_codec`). It never decides which names the tests use: a name
that the tests need comes from the prelude, then the built-ins, then the standard library, and only then, or as the
entry point, from the solution. An exception it raises arrives by name, never StopIteration, which would end a test's
`all(map(...))` early, and nothing that `except Exception` does not see.
Not covered: the tests and the prelude are trusted, as they come from the data set. A helper that they use but do not
define (as in three HumanEval tasks, if the prompt is not given as the prelude) is the solution's to define.

Usage: `python code_test_side.pyc SOCKET_FD SOCKET_FD`, started by `rewards.sandbox_process`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # in the sandbox, `rewards` holds the codec only

from rewards.code_proxy import Function, Solution, SolutionEnded
from rewards.code_suite import Suite

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MAX_TEXT_CHARS = 300


class Verdict:
    """Counts tests as they end and writes the outcome to the pipe that only this process holds."""

    def __init__(self, fd: int, solution: Solution) -> None:
        self._fd, self._solution = fd, solution
        self.num_passed = self.num_failed = 0
        self.first: dict[str, str] | None = None

    def begin(self, num_tests: int) -> None:
        """Leave the number of tests, for a verdict that never comes."""
        os.write(self._fd, f"{num_tests}\n".encode("ascii"))

    def passed(self) -> None:
        self.num_passed += 1
        os.write(self._fd, b".")

    def failed(self, test: str, error: BaseException) -> None:
        self.num_failed += 1
        raised = self._solution.raised
        if isinstance(error, SolutionEnded):
            kind, name = "ended", "SolutionEnded"
        elif raised is not None and raised[0] is error:
            kind, name = "raised", raised[1]
        else:
            kind, name = "wrong", type(error).__name__
        if self.first is None:
            text = f"{name}: {_text(error)}" if _text(error) else name
            self.first = {"test": test[:_MAX_TEXT_CHARS], "error": text, "kind": kind, "type": name}

    def write(self, outcome: str, **details: Any) -> None:
        """The last line. `outcome` is done, import (the program failed first), or tests (these are broken)."""
        self._fd_write(json.dumps({"outcome": outcome, "passed": self.num_passed, "first": self.first, **details}))

    def _fd_write(self, line: str) -> None:
        view = memoryview(f"\n{line}\n".encode("ascii"))
        while view:
            view = view[os.write(self._fd, view) :]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_TEXT_CHARS]
    except Exception:  # an assert's message may be any value, a huge int for one
        return ""


def run_job(spec_fd: int, read_fd: int, write_fd: int, verdict_fd: int) -> None:
    """Run the tests that the specification holds and write the verdict."""
    with os.fdopen(spec_fd, "rb") as file:
        spec: dict[str, Any] = json.load(file)
    solution = Solution(read_fd, write_fd, is_collecting=spec["is_collecting"])
    verdict = Verdict(verdict_fd, solution)
    module = type(sys)("tests")
    sys.modules["tests"] = module
    namespace = module.__dict__
    try:
        exec(compile(spec["prelude"], "prelude.py", "exec", dont_inherit=True), namespace)
        for name in spec["forget"]:
            namespace.pop(name, None)
        suite = Suite(spec["tests"], spec["entry_point"], namespace, stop_at_first=spec["stop_at_first"])
    except BaseException as error:
        verdict.begin(0)
        verdict.write("tests", error=f"{type(error).__name__}: {_text(error)}")
        return
    verdict.begin(suite.num_tests)
    own = {name: thing for name, thing in namespace.items() if isinstance(thing, type)}
    solution.classes = {name: thing for name, thing in own.items() if thing.__module__ == "tests"}
    try:
        reply = solution.boot(spec)
    except SolutionEnded as error:
        reply = {"e": "SolutionEnded", "m": str(error), "phase": "import"}
    if "e" in reply:
        details = {key: str(reply.get(key))[:_MAX_TEXT_CHARS] for key in ("e", "m", "phase")}
        verdict.write("import", total=suite.num_tests, **details)
        return
    names = reply.get("names")
    known = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
    suite.bind(known, lambda expression: Function(solution, expression))
    suite.run(verdict)
    is_passed = verdict.num_failed == 0 and verdict.num_passed > 0 and solution.ended is None
    total = max(suite.num_tests, verdict.num_passed + verdict.num_failed)
    verdict.write("done", is_passed=is_passed, total=total)


def main() -> None:
    """Fork a child for each job that arrives on the socket, until the socket closes."""
    control = socket.socket(fileno=int(sys.argv[1]))
    folder = os.path.dirname(os.path.abspath(__file__))
    packages = os.path.join(os.path.dirname(folder), "packages")
    if os.path.isdir(packages):
        sys.path.append(packages)
        with contextlib.suppress(ImportError):
            import numpy  # noqa: F401  # here once, or 0.1 s in every job whose tests use it
    control.send(b"R")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 4)
        if not message:
            return
        child = os.fork()
        if child == 0:
            control.close()
            run_job(*descriptors)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(child, 0)
        control.send(b"D")


if __name__ == "__main__":
    main()
