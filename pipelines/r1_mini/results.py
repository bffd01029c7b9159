"""From the arms' results to `results.json`, a Markdown table and curves.

A number is the mean over seeds; its interval is Student's t over the seeds, 95%, cut at 0 and 1 for shares.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pipelines.report import curve

T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Of Student's t at 97.5%, by degrees of freedom."""
Results = dict[str, dict[int, dict[str, Any]]]
"""Arm -> seed -> its result."""


def read_results(out: Path) -> Results:
    results: Results = {}
    for path in sorted(out.glob("seed-*/**/result.json")):
        seed, *name = path.parent.relative_to(out).parts
        results.setdefault("/".join(name), {})[int(seed.removeprefix("seed-"))] = json.loads(path.read_text())
    return results


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% for the mean over seeds; of one seed nothing is known."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = T_QUANTILES.get(len(values) - 1, 1.96) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def number(values: Sequence[float], *, share: bool = True) -> dict[str, Any]:
    low, high = interval(values)
    if share:
        low, high = max(0.0, low), min(1.0, high)
    return {"mean": fmean(values), "low": low, "high": high, "seeds": list(values)}


def pick(results: Results, arm: str, *keys: str) -> list[float]:
    """One number of each seed of an arm; none where the arm was not run."""
    values = []
    for _, result in sorted(results.get(arm, {}).items()):
        value: Any = result
        for key in keys:
            value = value[key]
        values.append(float(value))
    return values


def steps_to(points: Sequence[float], threshold: float) -> float:
    """The first step at which the accuracy in training reaches the threshold; the number of steps if it never does."""
    return float(next((step for step, value in enumerate(points) if value >= threshold), len(points)))


def tokens_to(points: Sequence[tuple[float, float]], threshold: float) -> float:
    """The tokens after which the accuracy reaches the threshold; inf if it never does."""
    return next((tokens for tokens, accuracy in points if accuracy >= threshold), math.inf)


def _share(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    found = number(values)
    spread = f" ({found['low']:.1%} to {found['high']:.1%})" if len(values) > 1 else ""
    return f"{found['mean']:.1%}{spread}"


def _plain(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    low, high = interval(values)
    spread = f" ({low:.1f} to {high:.1f})" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}"


def measured_row(results: Results, title: str, arm: str) -> list[str]:
    """Accuracy sampled and greedy, without thought, thinking, true thoughts, of an arm with these numbers."""
    has = {key for result in results.get(arm, {}).values() for key in result}
    optional = {
        key: _share(pick(results, arm, key, "accuracy")) if key in has else "" for key in ("greedy", "no_thought")
    }
    return [
        title, _share(pick(results, arm, "sampled", "accuracy")), optional["greedy"], optional["no_thought"],
        _plain(pick(results, arm, "sampled", "thinking")), _share(pick(results, arm, "sampled", "true_thought")),
    ]  # fmt: skip


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main_table(results: Results) -> str:
    """Claim 1, the cold start and the controls."""
    rows = []
    for task in ("ledger", "countdown-mini", "variables"):
        rows.append(measured_row(results, f"{task}: base", f"{task}/base"))
        rows.append(measured_row(results, f"{task}: RL from base", f"{task}/zero"))
    for title, arm in (
        ("ledger: cold start", "cold"), ("ledger: cold start, then RL", "cold-zero"),
        ("control: RL with a coin as reward", "coin"), ("control: pretraining goes on, as many samples", "continued"),
        ("control: SFT on own right samples", "own-samples"),
    ):  # fmt: skip
        rows.append(measured_row(results, title, f"ledger/{arm}"))
    return table(("", "accuracy, sampled", "greedy", "thought forbidden", "thinking, words", "true thoughts"), rows)


def student_table(results: Results) -> str:
    """Claim 3: a student's RL and distillation against its base's accuracy where it writes everything out."""

    def full(name: str) -> float:
        return fmean(pick(results, name, "sampled", "full_accuracy"))

    names = [name for name in results if name.startswith("student/") and f"{name}-zero" in results]
    rows = []
    for name in sorted(names, key=full):
        after = [
            _share(pick(results, arm, "sampled", "accuracy")) for arm in (name, f"{name}-zero", f"{name}-distilled")
        ]
        rows.append([name.removeprefix("student/"), _share(pick(results, name, "sampled", "full_accuracy")), *after])
    return table(("student", "whole chains right, base", "base", "RL", "distilled"), rows)


def vote_table(results: Results) -> str:
    """Claim 4."""
    names = [name for name, seeds in results.items() if all("votes" in result for result in seeds.values())]
    rows = [
        [name, _share(pick(results, name, "votes", "accuracy")), _share(pick(results, name, "votes", "majority"))]
        for name in names
    ]
    return table(("model", "single samples", "majority"), rows)


def cost_table(results: Results, threshold: float = 0.9) -> str:
    """Claims 2 and 5: steps and tokens until an accuracy is reached in training."""
    rows = []
    for title, arm in (("RL from base", "ledger/zero"), ("RL after a cold start", "ledger/cold-zero")):
        curves = [result["curve"]["accuracy"] for result in results.get(arm, {}).values()]
        rows.append([title, f"{_plain([steps_to(points, threshold) for points in curves])} steps"])
    sft = []
    for seed, result in results.get("student/by-tokens", {}).items():
        whole = [arms[seed] for name, arms in results.items() if name == result["whole"] and seed in arms]
        sft.append([*result["points"], *((arm["tokens"], arm["sampled"]["accuracy"]) for arm in whole)])
    rows.append(["student, SFT on traces", _thousands([tokens_to(points, threshold) for points in sft])])
    own = []
    for result in results.get("student/on-policy", {}).values():
        tokens, points = float(result["cold_tokens"]), []
        for accuracy, length in zip(result["curve"]["accuracy"], result["curve"]["tokens"], strict=True):
            points.append((tokens, accuracy))
            tokens += result["samples_per_step"] * length
        own.append(tokens_to(points, threshold))
    rows.append(["student, cold start and on-policy distillation", _thousands(own)])
    return table((f"until {threshold:.0%} of samples are right", ""), rows)


def _thousands(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    return ", ".join("never" if math.isinf(value) else f"{value / 1000:,.0f} thousand tokens" for value in values)


def write_results(out: Path) -> Path:
    """Writes `results.json`, `report.md` and a picture for each task; the report's path."""
    results = read_results(out)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for arm, seeds in results.items():
        for key, title in (("accuracy", "accuracy in training"), ("thinking", "words of thought")):
            curves = [result["curve"][key] for result in seeds.values() if "curve" in result]
            if curves:
                means = [fmean(values) for values in zip(*curves, strict=True)]
                picture = curve(list(enumerate(means))).replace(
                    "<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" aria-label="{title}" '
                )
                (out / f"{arm.replace('/', '-')}-{key}.svg").write_text(picture + "\n")
    seconds = sum(result["cpu_seconds"] for seeds in results.values() for result in seeds.values())
    parts = [main_table(results), student_table(results), vote_table(results), cost_table(results)]
    path = out / "report.md"
    path.write_text("\n".join(parts) + f"\nProcessor time of all arms: {seconds / 60:.1f} minutes.\n")
    return path
