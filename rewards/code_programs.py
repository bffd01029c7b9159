"""Grading a file of programs: what `grpo reward code PROGRAMS.jsonl --out OUT.jsonl` runs.

Rows of the input: {id, code, entry_point, tests}, and any other field that `rewards.code_task` reads. Rows of the
output, in the same order: {id, value, status, seconds}, and {passed, total, first_failure, error} for a person.

Usage: `print(grade_file(Path("programs.jsonl"), Path("out.jsonl")).text())`.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.code_grade import CodeGrader
from rewards.code_task import CodeResult, CodeStatus, CodeTask, Mode, task_from_row
from rewards.sandbox_limits import Limits


@dataclass(frozen=True, kw_only=True, slots=True)
class GradingSummary:
    """Totals of one file."""

    description: str
    """The isolation in force."""
    num_programs: int
    """Rows."""
    counts: Mapping[str, int]
    """Status -> rows."""
    mean_value: float | None
    """Mean over the rows that have a value; None if no row has."""
    seconds: float
    """Wall time, the sandbox's start included."""

    def text(self) -> str:
        """Two lines for the console."""
        counts = ", ".join(f"{status} {count}" for status, count in sorted(self.counts.items()))
        mean = "no value" if self.mean_value is None else f"mean {self.mean_value:.4f}"
        rate = self.num_programs / max(self.seconds, 1e-9)
        return (
            f"{self.description}\n{self.num_programs} programs in {self.seconds:.1f} s ({rate:.1f}/s), {mean}: {counts}"
        )


def grade_file(
    programs_path: Path,
    out_path: Path,
    *,
    mode: Mode = "all",
    sandbox: str = "auto",
    limits: Limits | None = None,
    num_workers: int | None = None,
    packages: Path | None = None,
    allow_unsafe_code: bool = False,
    announce: Callable[[str], object] = print,
) -> GradingSummary:
    """Grade every row and write the results; `announce` gets the line about the isolation before the first program."""
    started = time.monotonic()
    programs = [_read_row(programs_path, number, line) for number, line in _lines(programs_path)]
    with CodeGrader(
        sandbox, limits=limits, num_workers=num_workers, packages=packages, allow_unsafe_code=allow_unsafe_code
    ) as grader:
        announce(grader.description)
        pairs = [(task, code) for _, task, code in programs]
        results = grader.grade_many(pairs, stop_at_first=mode == "all")
        description = grader.description
    with out_path.open("w") as file:
        for (row_id, _, _), result in zip(programs, results, strict=True):
            file.write(json.dumps(_row(row_id, result, mode)) + "\n")
    values = [value for result in results if (value := result.value(mode)) is not None]
    return GradingSummary(
        description=description,
        num_programs=len(results),
        counts=Counter(str(result.status) for result in results),
        mean_value=sum(values) / len(values) if values else None,
        seconds=time.monotonic() - started,
    )


def _lines(path: Path) -> list[tuple[int, str]]:
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read_row(path: Path, number: int, line: str) -> tuple[Any, CodeTask, str]:
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get("code"), str):
            raise ValueError("a row is an object with at least id, code (text) and tests")
        return row.get("id", number), task_from_row(row), row["code"]
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None


def _row(row_id: Any, result: CodeResult, mode: Mode) -> dict[str, Any]:
    return {
        "id": row_id,
        "value": result.value(mode),
        "status": str(result.status),
        "seconds": round(result.seconds, 4),
        "passed": result.num_passed,
        "total": result.num_tests,
        "first_failure": result.first_failure,
        "error": result.error,
    }


__all__ = ["CodeStatus", "GradingSummary", "grade_file"]
