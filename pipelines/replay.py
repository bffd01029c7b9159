"""`grpo replay`: trains again on the samples that a run wrote, without an engine.

    grpo replay runs/zero --step 12
    grpo replay runs/zero --step 12 --last 15 --out runs/replayed

The run must have written its samples (`--trainer.dump-samples-every 1`). The learner starts from the run's newest
checkpoint before the step, or from the base, and learns from every step since. On a CPU all comes out equal to the bit;
exit status 1 and the metrics that differ if it does not.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tyro.conf import Positional

from grpo.checkpoint import load_checkpoint
from grpo.metrics import append_rows, read_metrics
from grpo.minibatches import update_in_minibatches
from grpo.sample_file import read_samples, sample_path
from models.auto import write_checkpoint
from models.checkpoint import replace_folder
from pipelines.config import read_config
from pipelines.console import console
from pipelines.zero import ZeroConfig, build_learner


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """`grpo replay RUN`: trains again on samples that a run wrote, without an engine."""

    run: Positional[str] = ""
    """Folder of the run."""
    step: int = 0
    """First step of interest; those between the checkpoint before it and it are replayed, too."""
    last: int = -1
    """Last step; -1 for just the one."""
    out: str = ""
    """Folder for the metrics and the model after the last step; nothing is written without it."""

    def __post_init__(self) -> None:
        if self.step < 0 or (self.last != -1 and self.last < self.step):
            raise ValueError(f"need step >= 0 and last >= step, got {self.step} and {self.last}")


def run_replay(config: ReplayConfig) -> int:
    """The exit status: 1 if a metric differs from the run's. Raises FileNotFoundError for a step without samples."""
    run_dir, out = Path(config.run), Path(config.out) if config.out else None
    if out is not None and out.exists():
        raise ValueError(f"{out} exists already; choose another --out")
    if not config.run or not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"{config.run or 'RUN'} is no folder of a run: it has no config.json")
    zero = read_config(ZeroConfig, run_dir / "config.json", default=ZeroConfig(model=""))
    last = max(config.step, config.last)
    torch.set_num_threads(zero.num_threads)
    learner = build_learner(zero)
    first, _ = load_checkpoint(run_dir, learner, console.print, last=config.step)
    logged = {row["step"]: row for row in read_metrics(run_dir)}
    console.print(f"from {'the base' if not first else f'the checkpoint after {first} steps'}")
    replayed, num_different = [], 0
    for step in range(first, last + 1):
        samples = read_samples(sample_path(run_dir, step))
        report = update_in_minibatches(learner, samples, zero.trainer.minibatches) if samples else {}
        replayed.append({"step": step, **report})
        different = differences(report, logged.get(step, {}))
        num_different += len(different)
        console.print(f"step {step}: {len(samples)} samples, {len(report) - len(different)} metrics equal to the run's")
        for line in different:
            console.print(f"  {line}", style="bold red")
    if out is not None:
        with replace_folder(out / "model") as fresh:
            write_checkpoint(learner.model, fresh)
        append_rows(out / "metrics.jsonl", replayed)
    return int(num_different > 0)


def differences(report: dict[str, float], row: dict[str, float]) -> list[str]:
    """One line per metric that is not the run's, to the bit."""
    return [
        f"{name}: {value!r}, the run logged {row.get(name)!r}"
        for name, value in report.items()
        if row.get(name) != value and not (math.isnan(value) and math.isnan(row.get(name, 0.0)))
    ]
