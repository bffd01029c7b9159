"""Where a run's numbers go: a JSON-lines file, TensorBoard, and the console line.

logger = MetricsLogger(run_dir, resume_from=0)
logger.log(step, {"reward/mean": 0.5})
"""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class MetricsLogger:
    """Appends one JSON object per step to `metrics.jsonl` and the same numbers to `tensorboard/`."""

    def __init__(self, run_dir: Path, resume_from: int) -> None:
        """`resume_from` is the first step that will be logged; what the file has from that step on is dropped."""
        self._path = run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(run_dir) if row["step"] < resume_from]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_from)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, in order; empty if the file does not exist.

    A last line cut short by a crash is left out; such a line anywhere else raises ValueError.
    """
    path = run_dir / "metrics.jsonl"
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
