"""`grpo doctor RUN`: reads a run folder and says what looks wrong, since which step, and what to try."""

import json
from collections.abc import Callable
from pathlib import Path

from grpo.metrics import read_metrics, read_rows
from pipelines import doctor_health as health
from pipelines import doctor_rules as rules
from pipelines.doctor_rules import Curves, Points
from pipelines.findings import Finding
from pipelines.tasks import get_task

RULES: tuple[Callable[[Curves], Finding | None], ...] = (
    rules.not_learning, rules.reward_hacking, rules.length_gaming, rules.repetition, rules.entropy_collapse,
    rules.entropy_explosion, rules.flat_groups, rules.truncation, health.reward_failures, health.skipped_steps,
    health.mismatch_growth, health.stale_versions, health.dead_experts, health.engine_failures, rules.throughput_loss,
)  # fmt: skip
_NGRAM = 4


def examine_run(folder: Path) -> list[Finding]:
    """What the rules find; of a quickstart, in its RL. Raises FileNotFoundError for a folder without metrics."""
    run = folder if (folder / "metrics.jsonl").exists() else folder / "zero"
    curves = read_curves(run, folder)
    return [finding for rule in RULES if (finding := rule(curves)) is not None]


def read_curves(run: Path, named: Path) -> Curves:
    """Of the run in the folder that the user has `named`."""
    rows = read_metrics(run)
    if not rows:
        raise FileNotFoundError(f"{named} has no metrics.jsonl with a step in it: give the folder of a run")
    path = run / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    trainer = config.get("trainer", {})
    repeated: dict[int, list[float]] = {}
    for group in read_rows(run / "groups.jsonl"):
        repeated.setdefault(group["step"], []).extend(repeated_share(one["text"]) for one in group["completions"])
    points: Points = [(step, sum(shares) / len(shares)) for step, shares in repeated.items()]
    return Curves(
        rows=rows, accuracy=accuracy_of(config.get("task"), rows[0]), repetition=points,
        alarm_kl=trainer.get("mismatch_alarm_kl", 1e-4), prompts_per_step=trainer.get("prompts_per_step", 16),
    )  # fmt: skip


def accuracy_of(task: str | None, row: dict[str, float]) -> str:
    """The metric that counts right answers; the total reward where the run has no such one, a mixture for example."""
    try:
        name = f"reward/{get_task(task).accuracy}" if task else ""
    except (ValueError, OSError):  # a task from a file that has gone since
        name = ""
    return name if name in row else "reward/mean"


def repeated_share(text: str) -> float:
    """Share of the passages of four words that stood there before."""
    words = text.split()
    passages = [tuple(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1)]
    return 1 - len(set(passages)) / len(passages) if passages else 0.0
