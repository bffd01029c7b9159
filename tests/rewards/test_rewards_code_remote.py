"""A remote sandbox in SandboxFusion's form, played by a small server here: what is sent, what comes of the answers."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rewards import code_remote
from rewards.code_grade import CodeGrader
from rewards.code_task import Case, CodeTask
from rewards.sandbox_limits import Limits, SandboxError

SECRET = 987654321
TASK = CodeTask(
    tests=f"def check(f):\n    assert f(1, 2) == 3\n    assert f({SECRET}, 1) == {SECRET + 1}\n",
    entry_point="add",
)
CASES = CodeTask(cases=(Case(stdin="1 2", expected="3"), Case(stdin="2 2", expected="4")))
RIGHT = "def add(a, b):\n    return a + b\n"


class Server(ThreadingHTTPServer):
    """Runs what it is sent, without isolation: only harmless programs may come here."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.num_failures = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request | {"path": self.path})
        if self.server.num_failures:
            self.server.num_failures -= 1
            self.reply({"status": "SandboxError", "message": "busy"})
        else:
            self.reply(run(request))

    def reply(self, answer: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


def run(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(request["code"])
        file.flush()
        command = [sys.executable, "-I", file.name]
        try:
            ended = subprocess.run(
                command, input=request["stdin"], capture_output=True, text=True, timeout=request["run_timeout"]
            )
        except subprocess.TimeoutExpired:
            return {"status": "Failed", "message": "", "run_result": {"status": "TimeLimitExceeded", "stdout": ""}}
    result = {"status": "Finished", "return_code": ended.returncode, "stdout": ended.stdout, "stderr": ended.stderr}
    return {"status": "Failed" if ended.returncode else "Success", "message": "", "run_result": result}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def grader(server: Server) -> Iterator[CodeGrader]:
    with CodeGrader(server.url, limits=Limits(timeout_s=2), num_workers=2) as grader:
        yield grader


def test_description_names_the_server_and_where_tests_run(server: Server, grader: CodeGrader):
    assert grader.description.startswith(f"code sandbox: remote, {server.url}; tests here (code sandbox: ")


def test_one_request_grades_a_program_and_holds_no_expected_value(server: Server, grader: CodeGrader):
    result = grader.grade(TASK, RIGHT)
    assert (result.value(), result.num_passed, result.num_tests) == (1.0, 2, 2)
    (request,) = server.requests
    assert request["path"] == "/run_code" and request["language"] == "python" and request["run_timeout"] == 2
    assert set(request) == {"path", "code", "language", "stdin", "run_timeout", "compile_timeout"}
    assert str(SECRET) in request["stdin"] and str(SECRET + 1) not in request["stdin"] + request["code"]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print('x')\n" + RIGHT, "ok"),
        ("def add(a, b): return 3\n", "wrong"),
        ("class A:\n    __eq__ = lambda s, o: True\ndef add(a, b): return A()\n", "wrong"),
        ("def add(a, b): return a / 0\n", "crash"),
        ("import sys; sys.exit(0)\n", "crash"),
        ("import os; os._exit(0)\n", "crash"),
        (
            "import sys\nfor _ in range(9): print('{\"unknown\": true}')\nsys.stdout.flush()\nimport os; os._exit(0)\n",
            "crash",
        ),
        ("import time\ndef add(a, b): time.sleep(60)\n", "timeout"),
        ("def add(a, b)\n", "syntax"),
        ("", "no-code"),
    ],
)
def test_statuses(grader: CodeGrader, code: str, status: str):
    result = grader.grade(TASK, code)
    assert (str(result.status), result.value()) == (status, 1.0 if status == "ok" else 0.0), result


def test_calls_that_depend_on_answers_take_further_requests(server: Server, grader: CodeGrader):
    tests = "x = f(1)\nassert f(x) == 3\nassert [f(y) for y in f([x])] == [3, 3]\n"
    code = "def f(x): return [2, 2] if isinstance(x, list) else x + 1\n"
    assert grader.grade(CodeTask(tests=tests), code).value() == 1.0
    assert 2 <= len(server.requests) <= 6
    assert grader.grade(CodeTask(tests=tests), code.replace("+ 1", "+ 2")).value() == 0.0


def test_stdin_cases(server: Server, grader: CodeGrader):
    assert grader.grade(CASES, "print(sum(map(int, input().split())))").value() == 1.0
    assert [request["stdin"] for request in server.requests] == ["1 2", "2 2"]
    assert grader.grade(CASES, "print(3)", stop_at_first=False).value("fraction") == 0.5
    assert str(grader.grade(CASES, "print(").status) == "syntax"
    assert str(grader.grade(CASES, "while True: pass").status) == "timeout"


def test_failures_of_the_server_are_tried_again_then_raised(
    server: Server, grader: CodeGrader, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(code_remote.time, "sleep", lambda seconds: None)
    server.num_failures = 2
    assert grader.grade(TASK, RIGHT).value() == 1.0
    server.num_failures = 3
    with pytest.raises(SandboxError, match=r"failed 3 times: .*busy"):
        grader.grade(TASK, RIGHT)
    with (
        CodeGrader("http://127.0.0.1:9", limits=Limits(timeout_s=1)) as absent,
        pytest.raises(SandboxError, match="running"),
    ):
        absent.grade(CASES, "print(3)")
