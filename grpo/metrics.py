"""Where a run's numbers go: JSON lines, TensorBoard, wandb and trackio if asked. docs/metrics.md has them all.

logger = MetricsLogger(run_dir, resume_from=0, trackers=("wandb",))
logger.log(step, {"reward/mean": 0.5})
"""

import importlib.util
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.tensorboard import SummaryWriter

from models.checkpoint import flush_to_disk

Tracker = Literal["wandb", "trackio"]
"""A service or program beside the run that shows its numbers."""


class MetricsLogger:
    """Appends one JSON object per step to `metrics.jsonl` and gives the same to TensorBoard and the trackers."""

    def __init__(self, run_dir: Path, resume_from: int, trackers: Sequence[Tracker] = ()) -> None:
        """`resume_from` is the first step that will be logged; what the file has from that step on is dropped. Trackers
        are given the run's `config.json`, if there is one. Raises ValueError for a tracker that is not installed.
        """
        self.path = run_dir / "metrics.jsonl"
        drop_steps(self.path, resume_from)
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_from)
        self._trackers = _start_trackers(trackers, run_dir)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        append_rows(self.path, [{"step": step, **metrics}])
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(metrics, step=step)

    def close(self) -> None:
        self._writer.close()
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raises ValueError for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"trainer.trackers: {name} is not installed; run `pip install {name}`, or leave it out")


def _start_trackers(names: Sequence[Tracker], run_dir: Path) -> list[Any]:
    """One tracked run per run folder: after a resume the same one goes on. It sees again the steps behind the
    checkpoint, with the same numbers; wandb ignores them, trackio shows each twice.
    """
    check_trackers(names)
    if not names:
        return []
    from accelerate import PartialState  # late: it is slow to import
    from accelerate.tracking import TrackioTracker, WandBTracker

    PartialState()  # whose main process the trackers ask for

    id_file = run_dir / "tracker_id"
    if not id_file.exists():
        _replace_text(id_file, uuid.uuid4().hex[:8])
    run_id = id_file.read_text()
    title = f"{run_dir.resolve().name}-{run_id}"
    trackers: list[Any] = []
    for name in names:
        if name == "wandb":
            trackers.append(WandBTracker("grpo", name=title, id=run_id, resume="allow", dir=str(run_dir)))
        else:
            trackers.append(TrackioTracker("grpo", name=title, resume="allow"))
        trackers[-1].start()
        if (config := run_dir / "config.json").exists():
            trackers[-1].store_init_configuration(json.loads(config.read_text()))
    return trackers


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds one JSON line per row."""
    with path.open("a") as file:
        file.writelines(json.dumps(row, default=str) + "\n" for row in rows)


def drop_steps(path: Path, first: int) -> None:
    """Removes the rows of step `first` and later, which a resumed run will write again."""
    if path.exists():
        rows = (row for row in read_rows(path) if row["step"] < first)
        _replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _replace_text(path: Path, text: str) -> None:
    """Whole or not at all: neither a kill nor a power cut in between must cost the history."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    flush_to_disk(fresh)
    os.replace(fresh, path)


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
