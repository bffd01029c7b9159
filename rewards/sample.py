"""Samples and scores: what a reward sees and what it says. Plain data; nothing here calls a reward.

Usage: `Sample(prompt="2+2?", completion="4", row={"answer": "4"})`, `Score(value=1.0, info={"extracted": "4"})`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from numbers import Real
from typing import Any

FINISH_REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One completion with everything a reward may look at."""

    prompt: str
    """The prompt as the engine saw it, chat template included."""
    completion: str
    """The generated text, without the prompt; with all that an environment wrote in between."""
    completion_ids: tuple[int, ...] = ()
    """[T] token ids of the completion."""
    observations: tuple[str, ...] = ()
    """What an environment, such as a tool, wrote in the completion, in order. The policy can write the same text; only
    here it is certain who wrote it."""
    finish_reason: str = "stop"
    """Why generation ended, one of `FINISH_REASONS`."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The data set row the prompt was made from, for example {"question": ..., "answer": ...}."""
    group_id: str = ""
    """Names the prompt; equal for the completions of one group."""
    index: int = 0
    """Position within the group."""
    step: int = 0
    """Training step that asked for the sample."""

    def __post_init__(self) -> None:
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(f"finish_reason must be one of {', '.join(FINISH_REASONS)}, got {self.finish_reason!r}")

    @property
    def truncated(self) -> bool:
        """Whether the token limit, and not the model, ended the completion."""
        return self.finish_reason == "length"

    @property
    def think_prefilled(self) -> bool:
        """Whether the prompt already opened the thinking, so that the completion starts inside it."""
        return self.prompt.rstrip().endswith("<think>")

    @property
    def answer_part(self) -> str:
        """The text after the last `</think>`, or the whole completion where there is none."""
        return self.completion.rpartition("</think>")[2]

    @property
    def thinking(self) -> str:
        """The text between `<think>` and `</think>`, to the end where it is not closed; empty where there is none."""
        text = ("<think>" if self.think_prefilled else "") + self.completion
        return text.partition("<think>")[2].partition("</think>")[0]

    def where(self) -> str:
        """Names the sample in messages."""
        return f"the sample with group_id={self.group_id!r}, index={self.index}, step={self.step}"


class ScoreStatus(StrEnum):
    """How the scoring went, which is not how good the sample is."""

    OK = "ok"
    TIMEOUT = "timeout"
    ERROR = "error"

    def is_failure(self) -> bool:
        """True where the reward itself failed, by error or by timeout."""
        return self is not ScoreStatus.OK


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a reward says about one sample."""

    value: float | None
    """The reward, finite; None = not applicable: the sample leaves the loss and is counted."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Named finite numbers, averaged over samples and logged."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Details for the rollout log, for example what was extracted and why it was wrong."""
    status: ScoreStatus = ScoreStatus.OK
    """Whether the scoring worked."""
    seconds: float = 0.0
    """Wall time of the scoring; filled by `RewardFunction.score`."""
    parts: Mapping[str, "Score"] = field(default_factory=dict)
    """Reward name -> its own score, before weights and gates; filled by `Rubric`."""
    steps: tuple[tuple[int, float], ...] = ()
    """For process supervision: (characters of the completion up to a step's end, that step's reward), in order."""

    def __post_init__(self) -> None:
        if self.value is not None:
            _check_finite("the value of a Score", self.value)
        for name, number in self.metrics.items():
            _check_finite(f"metric {name!r} of a Score", number)
        for end, number in self.steps:
            _check_finite(f"the reward of the step up to character {end}", number)
        ends = [0, *(end for end, _ in self.steps)]
        if any(end < before for before, end in pairwise(ends)):
            raise ValueError(f"steps of a Score end at characters {ends[1:]}; give them in order, from 0 on")


def _check_finite(what: str, number: object) -> None:
    if not isinstance(number, Real):
        raise TypeError(f"{what} must be a number, got {type(number).__name__}; convert it with float(...)")
    if not math.isfinite(number):
        raise ValueError(f"{what} must be finite, got {number}; return None where the reward does not apply")


def as_score(returned: object) -> Score:
    """Wrap what a reward returned; TypeError or ValueError for what is no score. What `float` takes is a number, so
    numpy and torch scalars are too; text is not.
    """
    if isinstance(returned, Score):
        return returned if returned.value is None else replace(returned, value=float(returned.value))
    if returned is None:
        return Score(value=None)
    if hasattr(type(returned), "__float__"):
        return Score(value=float(returned))  # type: ignore[arg-type]
    raise TypeError(
        f"a reward returns a float, int, bool, None or Score, got {type(returned).__name__}: {returned!r:.100}"
    )
