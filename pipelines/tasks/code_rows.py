"""Rows of programming problems; what the code tasks share. What a row's tests may look like is in rewards/code_task.py;
here stands where the data sets keep the problem's text and a right program.
"""

from pipelines.tasks.base import Row
from pipelines.templates import Example
from rewards.code_task import CodeTask, task_from_row

CODE_REWARDS = ("code_reward", "0.1*r1_format", "0*thinking_length")
ACCURACY = "code"
_TEXTS = ("problem", "query", "description", "content", "question", "text", "prompt")
_PROGRAMS = ("completion", "solutions", "solution", "code", "canonical_solution")


def problem_of(row: Row) -> str | None:
    """The problem's text, None where there is none."""
    found = next((row[name] for name in _TEXTS if isinstance(row.get(name), str) and row[name].strip()), None)
    return found and found.strip()


def program_of(row: Row) -> str:
    """The data set's own solution; empty where it has none."""
    found = next((row[name] for name in _PROGRAMS if isinstance(row.get(name), str)), "")
    return found.replace("\r\n", "\n")


def tests_of(row: Row) -> CodeTask | str:
    """The row's tests, or the reason why there are none."""
    try:
        return task_from_row(row)
    except (KeyError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def check_problem(row: Row, *, calls: bool) -> str | None:
    """None for a row with a problem and tests that call functions, or else that run programs; the reason otherwise."""
    if problem_of(row) is None:
        return f"no text in any of {', '.join(_TEXTS)}"
    tests = tests_of(row)
    if isinstance(tests, str):
        return tests
    if calls:
        return None if tests.tests else "runs of a program, not tests of a function; the task codeforces takes them"
    return None if tests.cases else "tests of functions, not of standard input and output; the task leetcode takes them"


def gold_program(row: Row) -> str:
    """The data set's own solution as the rewards look for it; empty where it has none."""
    return fenced(program_of(row)) if program_of(row) else ""


def fenced(program: str) -> str:
    """A program as the rewards look for it."""
    return f"```python\n{program.strip()}\n```"


def coded(question: str, thinking: str, program: str) -> Example:
    """An example in the form of the R1 template."""
    return Example(question, f" <think> {thinking} </think> <answer>\n{fenced(program)}\n</answer>")
