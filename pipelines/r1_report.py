"""Every checkpoint of a chain on the same problems, as one table: report.md for people, report.json for programs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.console import print_table

_COLUMNS = ("checkpoint", "task", "accuracy", "95% interval", "thinking", "language", "problems")


def write_report(folder: Path, results: Mapping[str, Sequence[Path]]) -> list[dict[str, Any]]:
    """`results`: checkpoint -> its results.json files, each in a folder named after its task. The rows of report.json,
    and prints the table. Raises OSError for a file that is missing."""
    rows = [row_of(name, path) for name, paths in results.items() for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(rows, indent=2) + "\n")
    lines = ["| " + " | ".join(line) + " |" for line in (_COLUMNS, ("---",) * len(_COLUMNS), *map(_cells, rows))]
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    print_table("every checkpoint on the same problems", _COLUMNS, map(_cells, rows))
    return rows


def row_of(checkpoint: str, path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    metrics = result["metrics"]
    return {
        "checkpoint": checkpoint,
        "task": path.parent.name,
        "accuracy": result["accuracy"],
        "accuracy_low": result["accuracy_low"],
        "accuracy_high": result["accuracy_high"],
        "thinking": metrics.get("thinking_length"),
        "language": metrics.get("language_consistency"),
        "num_problems": result["num_problems"],
    }


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    thinking, language = row["thinking"], row["language"]
    return (
        row["checkpoint"],
        row["task"],
        f"{row['accuracy']:.1%}",
        f"{row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}",
        "" if thinking is None else f"{thinking:.1f}",
        "" if language is None else f"{language:.0%}",
        str(row["num_problems"]),
    )
