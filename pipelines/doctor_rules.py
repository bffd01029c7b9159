"""What looks wrong in a run, by its metrics: one small function per sign, each with its threshold and why.

    finding = truncation(Curves(rows=read_metrics(run)))

A rule gives None where what it looks at was not measured. All say since which step, with the numbers. The thresholds
tell what deserves a look from what is usual; where no source is named they were set by runs of this project.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from pipelines.findings import Finding

Points = list[tuple[int, float]]
"""(step, value), in order."""

LASTING = 5
"""Steps in a row that a state must last: single batches are noise."""
SOLVED = 0.9
"""Accuracy from which on flat groups and a low entropy are what success looks like."""
FALL = 0.05
"""Fall of a mean accuracy that is more than noise: 3 standard errors of 256 completions are 0.09, of 5 steps 0.04."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A run as the rules see it."""

    rows: Sequence[dict[str, Any]]
    """Of metrics.jsonl, in order."""
    accuracy: str = "reward/mean"
    """The metric that counts right answers."""
    alarm_kl: float = 1e-4
    """trainer.mismatch_alarm_kl"""
    prompts_per_step: int = 16
    """trainer.prompts_per_step"""
    repetition: Points = field(default_factory=list)
    """Share of repeated passages in the completions of the steps that groups.jsonl holds."""

    def points(self, name: str) -> Points:
        """The metric's values that are numbers."""
        found = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), int | float)]
        return [(step, float(value)) for step, value in found if math.isfinite(value)]

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        """Metrics so named, in order."""
        return sorted({name for row in self.rows for name in row if name.startswith(prefix) and name.endswith(suffix)})

    @property
    def last_accuracy(self) -> float:
        points = smooth(self.points(self.accuracy))
        return points[-1][1] if points else 0.0


def smooth(points: Points, window: int = LASTING) -> Points:
    """Means of each value and those before it."""
    return [(step, fmean(v for _, v in points[max(0, i + 1 - window) : i + 1])) for i, (step, _) in enumerate(points)]


def stretch(points: Points, is_bad: Callable[[float], bool], length: int = LASTING) -> str | None:
    """When the first stretch of `length` bad values in a row was; a run shorter than that must be bad throughout."""
    length, begin = min(length, len(points)), 0
    for i, (_, value) in enumerate([*points, (0, math.nan)]):
        if i < len(points) and is_bad(value):
            continue
        if i - begin >= length > 0:
            first, last = points[begin][0], points[i - 1][0]
            return f"since step {first}" if i == len(points) else f"in steps {first} to {last}"
        begin = i + 1
    return None


def warn(check: str, text: str, remedy: str, level: str = "warning") -> Finding:
    return Finding(level=level, check=check, text=text, remedy=remedy)  # type: ignore[arg-type]


def fine(check: str, text: str) -> Finding:
    return Finding(level="ok", check=check, text=text)


def entropy_collapse(run: Curves) -> Finding | None:
    """A tenth of the first entropy, while answers are still wrong and no longer get better: nothing is explored any
    more (arXiv:2505.22617 has reward bought with entropy, and no gain once it is spent)."""
    entropy = smooth(run.points("policy/entropy"))
    if not entropy:
        return None
    first = fmean(value for _, value in entropy[:LASTING])
    now = entropy[-1][1]
    low = [step for step, value in entropy if value < 0.1 * first]
    then = dict(smooth(run.points(run.accuracy))).get(low[0], 0.0) if low else 0.0
    if not low or run.last_accuracy >= SOLVED or run.last_accuracy > then + FALL:
        return fine("entropy", f"{first:.2g} nats at first, {now:.2g} at last")
    return warn(
        "entropy",
        f"collapsed: below a tenth of its first {first:.2g} nats since step {low[0]}, now {now:.2g}, with "
        f"{run.accuracy} at {run.last_accuracy:.2f}",
        "start again from a checkpoint before it with learner.objective.clip_high 0.28, a lower learner.lr or a higher "
        "temperature; harder prompts keep more to explore",
    )


def entropy_explosion(run: Curves) -> Finding | None:
    """Three times the first entropy, and accuracy falling: the policy falls apart into noise."""
    entropy, accuracy = smooth(run.points("policy/entropy")), smooth(run.points(run.accuracy))
    if not entropy or not accuracy:
        return None
    first = fmean(value for _, value in entropy[:LASTING])
    since = stretch(entropy, lambda value: value > 3 * first)
    best = max(value for _, value in accuracy)
    if since is None or run.last_accuracy > best - FALL:
        return fine("noise", f"entropy at most {max(value for _, value in entropy):.2g} nats")
    return warn(
        "noise",
        f"entropy more than three times its first {first:.2g} nats {since}, {run.accuracy} fell from {best:.2f} to "
        f"{run.last_accuracy:.2f}",
        "lower learner.lr, look at mismatch/kl_k3 and policy/grad_norm before that step",
    )


def reward_hacking(run: Curves) -> Finding | None:
    """Since accuracy was best it has fallen, while another reward, or the total, has risen by as much: what is paid is
    not what is wanted."""
    accuracy = smooth(run.points(run.accuracy))
    if len(accuracy) < 2 * LASTING:
        return None
    peak, best = max(accuracy[LASTING - 1 :], key=lambda point: point[1])
    fall = best - accuracy[-1][1]
    names = [n for n in run.names("reward/") if n.count("/") == 1 and n not in (run.accuracy, "reward/errors")]
    risen = []
    for name in names:
        points = dict(smooth(run.points(name)))
        if fall > FALL and peak in points and points[max(points)] > points[peak] + FALL * max(1.0, abs(points[peak])):
            risen.append(f"{name} rose from {points[peak]:.2f} to {points[max(points)]:.2f}")
    if not risen:
        return fine("rewards", f"{run.accuracy} {accuracy[-1][1]:.2f}, at best {best:.2f} at step {peak}")
    return warn(
        "rewards",
        f"since step {peak} {run.accuracy} fell from {best:.2f} to {accuracy[-1][1]:.2f} while {', '.join(risen)}",
        "read groups.jsonl from there on; lower the weight of what rises, or let it count only where the answer is "
        "right: --reward 'NAME if math_answer'",
    )


def length_gaming(run: Curves) -> Finding | None:
    """Completions half as long again, or half as long, since accuracy was best, which has fallen."""
    accuracy, tokens = smooth(run.points(run.accuracy)), dict(smooth(run.points("completion/tokens")))
    if len(accuracy) < 2 * LASTING or not tokens:
        return None
    peak, best = max(accuracy[LASTING - 1 :], key=lambda point: point[1])
    then, now = tokens.get(peak, 0.0), tokens[max(tokens)]
    if best - accuracy[-1][1] <= FALL or then / 2 < now < then * 1.5:
        return fine("length", f"{now:.0f} tokens")
    return warn(
        "length",
        f"{then:.0f} tokens at step {peak}, {now:.0f} now, while {run.accuracy} fell from {best:.2f} to "
        f"{accuracy[-1][1]:.2f}",
        "longer: learner.objective.aggregation constant, or --extra-reward soft_overlong(...); shorter: leave out what "
        "pays for brevity",
    )


def repetition(run: Curves) -> Finding | None:
    """Half of all passages of four words stand there twice, and that is twice what it was."""
    if not run.repetition:
        return None
    first, (step, now) = run.repetition[0][1], run.repetition[-1]
    since = stretch(run.repetition, lambda share: share > 0.5 and share > 2 * first, length=2)
    if since is None:
        return fine("repetition", f"{now:.0%} of the passages of four words repeated at step {step}")
    return warn(
        "repetition",
        f"{now:.0%} of the passages of four words are repeated, {first:.0%} at first; {since}",
        "--extra-reward 'repetition_penalty(...)'; trainer.train_truncated false if these also reach max_tokens",
    )


def flat_groups(run: Curves) -> Finding | None:
    """Eight groups in ten without spread teach nothing, unless because all is solved."""
    flat = run.points("groups/without_spread")
    if not flat:
        return None
    since, now = stretch(flat, lambda share: share >= 0.8), flat[-1][1]
    if since is None or run.last_accuracy >= SOLVED:
        return fine("groups", f"{now:.0%} of the last step's groups have equal rewards")
    return warn(
        "groups",
        f"at least 80% have equal rewards {since}, {now:.0%} now, with {run.accuracy} at {run.last_accuracy:.2f}",
        "prompts too hard or too easy: other data, trainer.rollout.curriculum, more completions_per_prompt, "
        "trainer.rollout.max_oversampling 3",
    )


def not_learning(run: Curves) -> Finding | None:
    """A hundred steps whose second half is no better than the first five steps, far from solved."""
    reward = run.points("reward/mean")
    if len(reward) < 100:
        return None
    before, after = (fmean(value for _, value in part) for part in (reward[:LASTING], reward[len(reward) // 2 :]))
    if after > before + 0.01 * max(1.0, abs(before)) or run.last_accuracy >= SOLVED:
        return fine("learning", f"reward {before:.2f} at first, {after:.2f} in the second half")
    return warn(
        "learning",
        f"reward {before:.2f} at first, {after:.2f} in the second half of {len(reward)} steps",
        "learner.lr is too low or too high by ten, or the base cannot do the task at all: look at groups.jsonl",
    )


def throughput_loss(run: Curves) -> Finding | None:
    """Half of the best speed, medians of ten steps: longer completions cost some, not so much."""
    slow = []
    for name in ("speed/rollout_tokens_per_s", "speed/learn_tokens_per_s"):
        speeds = run.points(name)
        rolling = [
            (step, median(value for _, value in speeds[i - 9 : i + 1])) for i, (step, _) in enumerate(speeds) if i >= 9
        ]
        best = max((value for _, value in rolling), default=0.0)
        if since := stretch(rolling, lambda value, best=best: value < 0.5 * best):
            slow.append(f"{name} at best {best:,.0f}, {rolling[-1][1]:,.0f} now, below half {since}")
    if not run.points("speed/rollout_tokens_per_s"):
        return None
    if not slow:
        return fine("throughput", f"{run.points('speed/rollout_tokens_per_s')[-1][1]:,.0f} tokens/s")
    return warn(
        "throughput",
        "; ".join(slow),
        "compare seconds/rollout, seconds/learn and completion/tokens around that step; other work on the machine, or "
        "few very long completions: trainer.rollout.partial_share",
    )


def truncation(run: Curves) -> Finding | None:
    """A fifth of the completions cut: their reward says little of what they were about to answer."""
    cut = run.points("completion/truncated")
    if not cut:
        return None
    if (since := stretch(cut, lambda share: share > 0.2)) is None:
        return fine("truncation", f"{cut[-1][1]:.1%} reach the token limit")
    return warn(
        "truncation",
        f"more than 20% reach the token limit {since}, {cut[-1][1]:.0%} now",
        "raise trainer.max_tokens; or --extra-reward soft_overlong(...), trainer.train_truncated false",
    )
