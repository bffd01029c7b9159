"""Rewards for the length of a completion. They pay for what is easy: give them to a `Rubric` with a `Gate`, or with
little weight, and not from the first step on.

Length is the number of tokens, unless `unit` says "words" (separated by white space) or "characters".

Usage: `soft_overlong(max_length=20480, buffer=4096).score(sample)`.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

from rewards.base import RewardFunction, Sample, Score, ScoreStatus, reward

Unit = Literal["tokens", "words", "characters"]


def check_unit(unit: str) -> None:
    """Raises ValueError for an unknown unit."""
    if unit not in get_args(Unit):
        raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, got {unit!r}")


def pieces(sample: Sample, unit: Unit) -> Sequence[int | str]:
    """The completion cut into tokens, words or characters. Raises ValueError where the token ids are not known."""
    if unit == "tokens":
        if sample.completion and not sample.completion_ids:
            raise ValueError("the sample has text but no completion_ids; measure in unit='words' or 'characters'")
        return sample.completion_ids
    return sample.completion.split() if unit == "words" else sample.completion


@reward(weight=0.0)
def thinking_length(sample: Sample) -> float:
    """Words between `<think>` and `</think>`; to the end of the completion where the thinking is not closed. A measure
    to be logged: thinking must pay by the answer, not by itself.
    """
    return float(len(sample.thinking.split()))


def truncation_penalty(
    *, penalty: float = -1.0, weight: float = 1.0, name: str = "truncation_penalty"
) -> RewardFunction:
    """Make a reward that is `penalty` where the token limit ended the completion, and 0 else."""
    return reward(name=name, weight=weight)(partial(_truncation, penalty=penalty))


def _truncation(sample: Sample, penalty: float) -> float:
    return penalty if sample.truncated else 0.0


def soft_overlong(
    *, max_length: int, buffer: int, unit: Unit = "tokens", weight: float = 1.0, name: str = "soft_overlong"
) -> RewardFunction:
    """Make DAPO's soft overlong punishment (eq. 13, arXiv:2503.14476), with L_max = `max_length`, L_cache = `buffer`:

    0 for |y| <= L_max - L_cache; ((L_max - L_cache) - |y|) / L_cache up to L_max; -1 beyond.
    The paper has 20480 and 4096. The generation's own limit must be above L_max - L_cache, or it never applies.
    """
    check_unit(unit)
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must be > 0 and <= max_length={max_length}, got {buffer}")
    return reward(name=name, weight=weight)(partial(_soft_overlong, max_length=max_length, buffer=buffer, unit=unit))


def _soft_overlong(sample: Sample, max_length: int, buffer: int, unit: Unit) -> float:
    length = len(pieces(sample, unit))
    if length > max_length:
        return -1.0
    return min(0.0, (max_length - buffer - length) / buffer)


def cosine_length(
    *,
    judge: RewardFunction,
    max_length: int,
    correct: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    beyond: float | None = None,
    unit: Unit = "tokens",
    weight: float = 1.0,
    name: str = "cosine_length",
) -> RewardFunction:
    """Make the cosine reward of "Demystifying Long Chain-of-Thought Reasoning" (arXiv:2502.03373):

    CosFn(t, T, a, b) = b + (a - b) (1 + cos(pi t / T)) / 2, from a at length 0 to b at length T = `max_length`, with
    (a, b) = `correct` where `judge` gives 1 or more, else `wrong`. Short is better if right, long is less bad if wrong.

    The values are those of TRL and open-r1. t is clamped to T as in TRL (open-r1 does not, and the cosine turns up
    again), unless `beyond` is the value of longer completions (the paper's r_e).
    """
    check_unit(unit)
    if max_length < 1:
        raise ValueError(f"max_length must be >= 1, got {max_length}")
    settings = {"judge": judge, "max_length": max_length, "correct": correct, "wrong": wrong, "beyond": beyond}
    return reward(name=name, weight=weight)(partial(_cosine, **settings, unit=unit))


def _cosine(
    sample: Sample,
    judge: RewardFunction,
    max_length: int,
    correct: tuple[float, float],
    wrong: tuple[float, float],
    beyond: float | None,
    unit: Unit,
) -> Score:
    verdict = judge.score(sample)
    if verdict.value is None:
        return _unjudged(verdict)
    length = len(pieces(sample, unit))
    if beyond is not None and length > max_length:
        return Score(value=beyond)
    start, end = correct if verdict.value >= 1 else wrong
    progress = min(length / max_length, 1.0)
    return Score(value=end + (start - end) * (1 + math.cos(math.pi * progress)) / 2)


def kimi_length(
    *, judge: RewardFunction, unit: Unit = "tokens", weight: float = 1.0, name: str = "kimi_length"
) -> RewardFunction:
    """Make the length reward of Kimi k1.5 (section 2.3.3, arXiv:2501.12599) over the completions of one prompt:

    lambda = 0.5 - (len - min_len) / (max_len - min_len); lambda where `judge` gives 1 or more, else min(0, lambda);
    0 for all where max_len = min_len. The paper warms it up: without it early in training, then with constant weight.
    Completions that the engine could not finish have no value and do not count as the shortest.
    """
    check_unit(unit)
    return reward(name=name, weight=weight, group=True)(partial(_kimi, judge=judge, unit=unit))


def _kimi(samples: list[Sample], judge: RewardFunction, unit: Unit) -> list[Score]:
    lengths = [None if sample.finish_reason == "error" else len(pieces(sample, unit)) for sample in samples]
    known = [length for length in lengths if length is not None]
    shortest, spread = min(known, default=0), max(known, default=0) - min(known, default=0)
    scores: list[Score] = []
    for verdict, length in zip(judge.score_groups([samples])[0], lengths, strict=True):
        if verdict.value is None or length is None:
            scores.append(_unjudged(verdict))
            continue
        value = 0.5 - (length - shortest) / spread if spread else 0.0
        scores.append(Score(value=value if verdict.value >= 1 else min(0.0, value)))
    return scores


def _unjudged(verdict: Score) -> Score:
    """Without a verdict there is no reward; a judge that failed has failed here too."""
    return Score(value=None, status=ScoreStatus(verdict.status), info={"judge": dict(verdict.info)})
