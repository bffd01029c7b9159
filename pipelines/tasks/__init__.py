"""Tasks: what a data set's rows ask, how an answer is judged, and how large the answers are.

task = get_task("gsm8k")
task = get_task("my_task.py")      # a file with TASK = Task(...)
question = task.question(row)
"""

from pathlib import Path

from pipelines.tasks import (
    aime,
    amc,
    codeforces,
    countdown,
    countdown_mini,
    dapo,
    gsm8k,
    humaneval,
    instructions,
    ledger,
    leetcode,
    math,
    mbpp,
    variables,
)  # fmt: skip
from pipelines.tasks.base import Row, Task
from pipelines.templates import Example
from rewards.portable import import_file

__all__ = ["TASKS", "Example", "Row", "Task", "get_task"]

TASKS = {
    task.name: task
    for task in (
        ledger.TASK,
        gsm8k.TASK,
        math.TASK,
        math.MATH500,
        aime.TASK,
        aime.AIME24,
        aime.AIME25,
        amc.TASK,
        dapo.TASK,
        countdown.TASK,
        countdown_mini.TASK,
        variables.TASK,
        humaneval.TASK,
        humaneval.PLUS,
        humaneval.COMPLETE,
        mbpp.TASK,
        mbpp.PLUS,
        codeforces.TASK,
        leetcode.TASK,
        instructions.TASK,
    )
}


def get_task(name: str) -> Task:
    """The task of that name, or the `TASK` of the file of that name, which ends in .py.

    Raises ValueError or FileNotFoundError with what there is instead.
    """
    if name.endswith(".py"):
        return _load_task(Path(name).expanduser())
    if name not in TASKS:
        raise ValueError(
            f"unknown task {name!r}; known: {', '.join(TASKS)}; or a file my_task.py with TASK = Task(...)"
        )
    return TASKS[name]


def _load_task(path: Path) -> Task:
    if not path.is_file():
        raise FileNotFoundError(f"task file {str(path)!r} not found (from {str(Path.cwd())!r})")
    try:
        module = import_file(path)
    except Exception as error:  # the user's file: the traceback is chained for --verbose
        raise ValueError(f"task file {path} cannot be loaded: {type(error).__name__}: {error}") from error
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        found = "no TASK" if task is None else f"a TASK of type {type(task).__name__}"
        raise ValueError(f"task file {path} has {found}; write `TASK = Task(...)` with pipelines.tasks.Task at its end")
    return task
