"""Group-relative advantages: each completion against the others of its prompt (arXiv:2402.03300 section 4.1.2, 4.1.3).

    advantages_P_G = batch_advantages([[1.0, 0.0, 0.0, None], [1.0, 1.0]], AdvantageConfig())

A group is the completions of one prompt by its id: two prompts of the same text are two groups. What has no reward
(None: not scored, or the engine failed) takes no part in any mean or deviation and stays None; groups may therefore be
uneven. Deviations are the sample's (divisor n - 1), as in verl and TRL; the papers do not say. Plain Python floats.

Shapes: P groups of G completions each, ragged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

AdvantageBaseline = Literal["group", "leave_one_out", "batch"]
"""The mean of the group (GRPO), of its other completions (RLOO, arXiv:2402.14740), or of all completions of the step
(REINFORCE++, arXiv:2501.03262)."""
AdvantageScale = Literal["std", "batch_std", "none"]
"""Divide by the group's standard deviation (GRPO), by that of the whole step (REINFORCE++), or not (Dr. GRPO,
arXiv:2503.20783)."""
Step = tuple[int, float]
"""Tokens of the completion up to the end of a step, and the step's reward."""

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """From rewards to advantages."""

    baseline: AdvantageBaseline = "group"
    """What is taken off each reward."""
    scale: AdvantageScale = "std"
    """What the difference is divided by."""
    supervision: Literal["outcome", "process"] = "outcome"
    """One reward per completion, or one per step of it (`Score.steps`), see docs/grpo.md."""

    def __post_init__(self) -> None:
        if self.baseline == "batch" and self.scale == "std":
            raise ValueError("baseline 'batch' with scale 'std' mixes batch and group; set scale to batch_std or none")
        if self.supervision == "process" and (self.baseline != "group" or self.scale == "batch_std"):
            raise ValueError(
                "supervision 'process' normalizes step rewards within a group: set baseline to group and scale to std "
                f"or none, got {self.baseline!r} and {self.scale!r}"
            )


def batch_advantages(
    rewards_P_G: Sequence[Sequence[float | None]], config: AdvantageConfig
) -> list[list[float | None]]:
    """Advantages of all groups of a step, each from its own group; baseline and scale "batch" look at all of them.

    Raises ValueError for a group of which fewer than two completions were asked for.
    """
    group_scale = "std" if config.scale == "std" else "none"
    if config.baseline == "batch":
        centered_P_G = _against_batch_mean(rewards_P_G)
    else:
        of_others = config.baseline == "leave_one_out"
        centered_P_G = [group_advantages(r, scale=group_scale, leave_one_out=of_others) for r in rewards_P_G]
    if config.scale != "batch_std":
        return centered_P_G
    present = [advantage for group in centered_P_G for advantage in group if advantage is not None]
    if not any(present):
        return centered_P_G
    divisor = math.sqrt(math.fsum(a * a for a in present) / (len(present) - 1)) + _EPSILON  # their mean is 0
    return [[None if a is None else a / divisor for a in group] for group in centered_P_G]


def group_advantages(
    rewards: Sequence[float | None], *, scale: Literal["std", "none"], leave_one_out: bool = False
) -> list[float | None]:
    """A_i = r_i - mean(r), divided by std(r) + 1e-6 when `scale` is "std"; with `leave_one_out` the mean is that of the
    other completions, which makes A_i n / (n - 1) times as large, n being the number of rewards.

    A group whose rewards are all equal gets exact zeros. Raises ValueError if fewer than two completions were asked
    for: there is nothing to compare with. A group in which scoring left fewer than two rewards has no baseline either
    and gets None throughout.
    """
    if len(rewards) < 2:
        raise ValueError(f"a group needs at least 2 completions for its baseline, got {len(rewards)}")
    scored = [reward for reward in rewards if reward is not None]
    if len(scored) < 2:
        return [None] * len(rewards)
    mean, deviation = _moments(scored)
    if deviation == 0:
        return [None if reward is None else 0.0 for reward in rewards]
    factor = len(scored) / (len(scored) - 1) if leave_one_out else 1.0
    divisor = deviation + _EPSILON if scale == "std" else 1.0
    return [None if reward is None else factor * (reward - mean) / divisor for reward in rewards]


def process_advantages(
    steps_G: Sequence[Sequence[Step] | None], lengths_G: Sequence[int], *, scale: Literal["std", "none"]
) -> list[list[float] | None]:
    """Process supervision (arXiv:2402.03300 section 4.1.3): step rewards are normalized over all steps of the group,
    r = (r - mean) / (std + 1e-6), and a token's advantage is the sum over the steps that end with it or behind it.

    One list of `lengths_G[i]` advantages per completion, 0.0 behind its last step. None for a completion without steps,
    and throughout where a group has fewer than two steps; zeros where all its step rewards are equal. Raises ValueError
    for fewer than two completions.
    """
    if len(steps_G) < 2:
        raise ValueError(f"a group needs at least 2 completions for its baseline, got {len(steps_G)}")
    rewards = [reward for steps in steps_G for _, reward in steps or ()]
    if len(rewards) < 2:
        return [None] * len(steps_G)
    mean, deviation = _moments(rewards)
    divisor = deviation + _EPSILON if scale == "std" else 1.0
    advantages_G: list[list[float] | None] = []
    for steps, length in zip(steps_G, lengths_G, strict=True):
        advantages = [0.0] * length
        for end, reward in steps or ():
            normalized = 0.0 if deviation == 0 else (reward - mean) / divisor
            advantages[:end] = [advantage + normalized for advantage in advantages[:end]]
        advantages_G.append(advantages if steps else None)
    return advantages_G


def _against_batch_mean(rewards_P_G: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Groups with fewer than two rewards have None, as with the other baselines, and leave the mean."""
    kept_P_G = [[None if a is None else r for a, r in zip(group_advantages(g, scale="none"), g, strict=True)]
                for g in rewards_P_G]  # fmt: skip
    present = [reward for group in kept_P_G for reward in group if reward is not None]
    mean, deviation = _moments(present) if present else (0.0, 0.0)
    return [[None if r is None else 0.0 if deviation == 0 else r - mean for r in group] for group in kept_P_G]


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the sample's standard deviation, which is exactly 0 for equal values and for them alone."""
    mean = math.fsum(values) / len(values)
    if min(values) == max(values):
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
