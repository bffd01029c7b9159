"""What a task is. One file of this folder holds each; a user's own is a file with `TASK = Task(...)`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.templates import Example

Row = dict[str, Any]


def lacks_text(row: Row, *names: str) -> str | None:
    """Which of the fields is no text, or an empty one; None if none of them."""
    wrong = [name for name in names if not isinstance(row.get(name), str) or not row[name].strip()]
    return f"field {wrong[0]!r} is missing or not a text" if wrong else None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task; its rows come from a file or the hub, or from `make_rows` where it can make them."""

    name: str
    question: Callable[[Row], str]
    """The text that the template wraps."""
    check: Callable[[Row], str | None]
    """None if a row is usable, else the reason why not."""
    prepare: Callable[[Row], Row] = dict
    """From a usable row of the data set to the row that `question`, `gold` and the rewards read."""
    gold: Callable[[Row], str] | None = None
    """A right answer as the data set gives it, bare of any form; None where it gives none."""
    template: str = "r1"
    """Name of the prompt template."""
    rewards: tuple[str, ...]
    """Reward specs, as on the command line: `[weight*]name` or `[weight*]file.py:function`."""
    accuracy: str
    """The reward whose value 1 means a right answer."""
    max_tokens: int
    """Longest completion."""
    examples: tuple[Example, ...] = ()
    """Worked examples in the form of the task's template, none of them from a test set."""
    make_rows: Callable[[int, int], list[Row]] | None = None
    """(count, seed) -> rows, for tasks that are generated."""
    default_data: str | None = None
    """Hub id to read where no data is named."""
