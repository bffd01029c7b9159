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


def fenced(program: str) -> str:
    """A program as the rewards look for it."""
    return f"```python\n{program.strip()}\n```"


def coded(question: str, thinking: str, program: str) -> Example:
    """An example in the form of the R1 template."""
    return Example(question, f" <think> {thinking} </think> <answer>\n{fenced(program)}\n</answer>")
