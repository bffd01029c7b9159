"""Tasks: what a data set's rows ask, how an answer is judged, and how large the answers are.

task = get_task("gsm8k")
question = task.question(row)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.tasks import countdown_mini, gsm8k, ledger, variables

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task; its rows come from a file or the hub, or from `make_rows` where it can make them."""

    name: str
    question: Callable[[Row], str]
    """The text that the template wraps."""
    check: Callable[[Row], str | None]
    """None if a row is usable, else the reason why not."""
    template: str
    """Name of the prompt template."""
    rewards: tuple[str, ...]
    """Reward specs, as on the command line: `[weight*]name` or `[weight*]file.py:function`."""
    accuracy: str
    """The reward whose value 1 means a right answer."""
    max_tokens: int
    """Longest completion."""
    make_rows: Callable[[int, int], list[Row]] | None = None
    """(count, seed) -> rows, for tasks that are generated."""
    default_data: str | None = None
    """Hub id to read where no data is named."""


TASKS = {
    "ledger": Task(
        name="ledger",
        question=lambda row: row["question"],
        check=ledger.check_row,
        template="r1",
        rewards=("math_answer", "0.1*r1_format", "0*thinking_length"),
        accuracy="math_answer",
        max_tokens=32,
        make_rows=ledger.make_rows,
    ),
    "countdown-mini": Task(
        name="countdown-mini",
        question=lambda row: row["question"],
        check=countdown_mini.check_row,
        template="r1",
        rewards=(f"{countdown_mini.__file__}:countdown_answer", "0.1*r1_format", "0*thinking_length"),
        accuracy="countdown_answer",
        max_tokens=152,
        make_rows=countdown_mini.make_rows,
    ),
    "variables": Task(
        name="variables",
        question=lambda row: row["question"],
        check=variables.check_row,
        template="r1",
        rewards=("math_answer", "0.1*r1_format", "0*thinking_length"),
        accuracy="math_answer",
        max_tokens=32,
        make_rows=variables.make_rows,
    ),
    "gsm8k": Task(
        name="gsm8k",
        question=lambda row: row["question"],
        check=gsm8k.check_row,
        template="r1",
        rewards=("math_answer", "0.1*r1_format", "0*thinking_length"),
        accuracy="math_answer",
        max_tokens=1024,
        default_data="openai/gsm8k:main",
    ),
}


def get_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]
