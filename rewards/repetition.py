"""A penalty for saying the same thing again, which rewards for length or form otherwise breed.

Usage: `repetition_penalty(ngram=3).score(sample)` is between -1 and 0.
"""

from functools import partial

from rewards.base import RewardFunction, Sample, reward
from rewards.length import Unit, check_unit, pieces


def repetition_penalty(
    *,
    ngram: int = 3,
    max_penalty: float = -1.0,
    unit: Unit = "tokens",
    weight: float = 1.0,
    name: str = "repetition_penalty",
) -> RewardFunction:
    """Make the n-gram repetition penalty (appendix C.2, arXiv:2502.03373, in the form of TRL and open-r1):

    (1 - unique n-grams / all n-grams) * `max_penalty`, and 0 for fewer than `ngram` pieces. TRL counts token ids,
    open-r1 lower-cased words (`unit="words"`).
    """
    check_unit(unit)
    if ngram < 1:
        raise ValueError(f"ngram must be >= 1, got {ngram}")
    if max_penalty > 0:
        raise ValueError(f"max_penalty must be <= 0, got {max_penalty}")
    return reward(name=name, weight=weight)(partial(_repetition, ngram=ngram, max_penalty=max_penalty, unit=unit))


def _repetition(sample: Sample, ngram: int, max_penalty: float, unit: Unit) -> float:
    parts = pieces(sample, unit)
    if unit == "words":
        parts = [str(part).lower() for part in parts]
    total = len(parts) - ngram + 1
    if total < 1:
        return 0.0
    unique = len(set(zip(*(parts[start:] for start in range(ngram)), strict=False)))
    return (1 - unique / total) * max_penalty + 0.0  # no minus zero in the logs
