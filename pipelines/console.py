"""What the user sees while something runs: one status line or bar at a time, tables at the end."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console(highlight=False, markup=False)


class ProgressBar:
    """A bar with a free-text note behind it; plain lines now and then where the output is no terminal."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self._progress, self._title, self._total, self._done = progress, title, total, 0
        self._started = time.monotonic()
        self._task = progress.add_task(title, total=total, note="")

    def advance(self, note: str, steps: int = 1) -> None:
        tenths = [10 * done // max(1, self._total) for done in (self._done, self._done + steps)]
        self._done += steps
        self._progress.update(self._task, advance=steps, note=note)
        if not console.is_terminal and (tenths[0] < tenths[1] or self._done == self._total):
            left = (time.monotonic() - self._started) / self._done * (self._total - self._done)
            console.print(f"{self._title} {self._done}/{self._total}  {left:,.0f} s left  {note}", soft_wrap=True)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[ProgressBar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield ProgressBar(progress, title, total)


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """The first column is left-aligned, the others right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what is waited for while it lasts: on a terminal with the seconds, elsewhere in a line of its own."""
    if not console.is_terminal:
        console.print(f"{what} ...", soft_wrap=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield
