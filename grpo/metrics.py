"""Where a run's numbers go: a JSON-lines file, TensorBoard, and the console line.

logger = MetricsLogger(run_dir, resume_from=0)
logger.log(step, {"reward/mean": 0.5})
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class MetricsLogger:
    """Appends one JSON object per step to `metrics.jsonl` and the same numbers to `tensorboard/`."""

    def __init__(self, run_dir: Path, resume_from: int) -> None:
        """`resume_from` is the first step that will be logged; what the file has from that step on is dropped."""
        self._path = run_dir / "metrics.jsonl"
        drop_steps(self._path, resume_from)
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_from)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        append_rows(self._path, [{"step": step, **metrics}])
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds one JSON line per row."""
    with path.open("a") as file:
        file.writelines(json.dumps(row, default=str) + "\n" for row in rows)


def drop_steps(path: Path, first: int) -> None:
    """Removes the rows of step `first` and later, which a resumed run will write again."""
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if row["step"] < first]
    kept = path.with_name(f".{path.name}.kept")
    kept.unlink(missing_ok=True)
    append_rows(kept, rows)
    kept.replace(path)  # whole or not at all: a kill in between must not cost the history


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, in order; empty if the file does not exist."""
    return read_rows(run_dir / "metrics.jsonl")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; empty if it does not exist.

    A last line cut short by a crash is left out; such a line anywhere else raises ValueError.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON; the file was damaged") from None
    return rows
