"""Coding tasks and what grading one gives; reads a task from a data set's row.

Usage: `task = task_from_row({"tests": ["assert add(1, 2) == 3"]})`.

Fields of a row, function style (calls are compared with what the tests expect):
- `tests`, `test` or `test_list`: a text with `check(candidate)`, a text of asserts, or a list of snippets
  (HumanEval, LeetCode, MBPP), or {"functional": text} (rLLM);
- `entry_point`: an expression for the function, "add" or "Solution().twoSum"; may be missing where the tests name it;
- `prelude`: trusted code that both sides run first; where it is missing, `prompt` is, if it is Python (HumanEval,
  LeetCode): it brings imports, helpers and classes such as TreeNode;
- `test_setup_code`, `test_imports`: run before each snippet (MBPP).
Fields of a row, stdin style (a whole program is run once per case): `tests` or `test` as [{"input", "output"}, ...] or
{"inputs", "outputs"} or SandboxFusion's JSON text of [{"input": {"stdin"}, "output": {"stdout"}}, ...]; or `inputs` and
`outputs`; or `input_output`, that as JSON text (APPS; with `fn_name`, its calls become function-style tests).

Not covered: tasks with several right answers (special judges), interactive tasks, unittest classes.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

Mode = Literal["all", "fraction"]


class CodeStatus(StrEnum):
    """How one program fared."""

    OK = "ok"
    WRONG = "wrong"
    TIMEOUT = "timeout"
    OOM = "oom"
    CRASH = "crash"
    """The program raised an exception or its process ended."""
    SYNTAX = "syntax"
    NO_CODE = "no-code"
    ERROR = "error"
    """The task's own tests or prelude are broken: says nothing about the program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeResult:
    """The outcome of grading one program."""

    status: CodeStatus
    """What happened."""
    num_passed: int = 0
    """Tests that passed before the end."""
    num_tests: int = 0
    """Tests of the task; a lower bound where tests run in loops and a failure ended them."""
    first_failure: str = ""
    """The first test that failed, shortened: source of an assert, or number of a case."""
    error: str = ""
    """Why, shortened; text of the program's making may be in it."""
    seconds: float = 0.0
    """Wall time from handing over the program to the verdict."""

    def value(self, mode: Mode = "all") -> float | None:
        """1 or 0, or the fraction of tests passed; None where the task is broken."""
        if self.status is CodeStatus.ERROR:
            return None
        if self.status is CodeStatus.OK:
            return 1.0
        # A program that fails never gets 1, even if the tests that were counted all passed.
        return 0.0 if mode == "all" else min(self.num_passed / max(self.num_tests, self.num_passed + 1), 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run of a stdin-style program."""

    stdin: str
    """What the program reads."""
    expected: str
    """What it must print; never enters its sandbox."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeTask:
    """Either function-style `tests` or stdin-style `cases`."""

    tests: str | tuple[str, ...] = ()
    """One text, or snippets that are a test each."""
    entry_point: str = ""
    """Expression of the function under test."""
    prelude: str = ""
    """Trusted code that both sides run first."""
    cases: tuple[Case, ...] = ()
    """Runs with expected output."""

    def __post_init__(self) -> None:
        if bool(self.tests) == bool(self.cases):
            raise ValueError("a coding task has either tests or stdin cases; the row gave " + self._given())

    def _given(self) -> str:
        return "both" if self.tests else "neither (looked for tests, test, test_list, inputs/outputs, input_output)"


def task_from_row(row: Mapping[str, Any]) -> CodeTask:
    """Read a task; ValueError says what is missing."""
    tests = next((row[name] for name in ("tests", "test", "test_list") if row.get(name)), None)
    if tests is None and row.get("input_output"):
        tests = row["input_output"]
    if tests is None and row.get("inputs"):
        tests = {"inputs": row["inputs"], "outputs": row.get("outputs", ())}
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        tests = _json_or_text(tests)
    entry_point = str(row.get("entry_point") or "")
    if isinstance(tests, Mapping) and tests.get("functional"):
        tests = tests["functional"]
    if isinstance(tests, Mapping):
        inputs, outputs = tests.get("inputs", ()), tests.get("outputs", ())
        if len(inputs) != len(outputs):
            raise ValueError(f"a task needs an output for each input, got {len(inputs)} inputs, {len(outputs)} outputs")
        if tests.get("fn_name"):
            return CodeTask(tests=_calls(tests["fn_name"], inputs, outputs), entry_point=tests["fn_name"])
        return CodeTask(cases=tuple(map(_case, inputs, outputs)))
    if isinstance(tests, Sequence) and not isinstance(tests, str) and tests and isinstance(tests[0], Mapping):
        return CodeTask(cases=tuple(_case(test["input"], test["output"]) for test in tests))
    setup = "\n".join([*row.get("test_imports", ()), str(row.get("test_setup_code") or "")]).strip()
    if tests is not None and not isinstance(tests, str):
        tests = tuple(f"{setup}\n{test}" if setup else str(test) for test in tests)
        tests = tests[0] if len(tests) == 1 else tests
    elif tests and setup:
        tests = f"{setup}\n{tests}"
    prelude = row["prelude"] if row.get("prelude") is not None else prelude_of_prompt(str(row.get("prompt") or ""))
    return CodeTask(tests=tests or (), entry_point=entry_point, prelude=prelude)


def prelude_of_prompt(prompt: str) -> str:
    """A prompt that is Python, completed to something that runs; "" for prose."""
    for text in (prompt, prompt + "\n    pass\n"):
        try:
            body = ast.parse(text).body
        except (SyntaxError, ValueError):
            continue
        is_code = any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom) for node in body)
        return text if is_code else ""
    return ""


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _case(given: Any, expected: Any) -> Case:
    given = given.get("stdin", "") if isinstance(given, Mapping) else given
    expected = expected.get("stdout", "") if isinstance(expected, Mapping) else expected
    return Case(stdin=_text(given), expected=_text(expected))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _calls(name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[str, ...]:
    """APPS: arguments per call, and a result that some rows wrap in a list of one."""
    calls = []
    for arguments, result in zip(inputs, outputs, strict=True):
        given = ", ".join(map(repr, arguments))
        wanted = f"({result!r}, {result[0]!r})" if isinstance(result, list) and len(result) == 1 else f"({result!r},)"
        calls.append(f"assert {name}({given}) in {wanted}")
    return tuple(calls)
