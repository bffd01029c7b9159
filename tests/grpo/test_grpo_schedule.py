"""Pins the learning rate: linear warm-up that starts above 0, then constant, or cosine to a twentieth of the peak."""

from itertools import pairwise

import pytest

from grpo.schedule import Decay, learning_rate

HALF_COSINE = 0.05 + 0.95 / 2
"""Share of the peak halfway between the end of the warm-up and the last step."""


@pytest.mark.parametrize(
    ("step", "warmup_steps", "decay", "expected"),
    [
        (0, 0, "constant", 1.0),
        (99, 0, "constant", 1.0),
        (0, 4, "constant", 0.25),
        (1, 4, "constant", 0.5),
        (3, 4, "constant", 1.0),
        (4, 4, "constant", 1.0),
        (0, 4, "cosine", 0.25),
        (3, 4, "cosine", 1.0),
        (4, 4, "cosine", 1.0),
        (0, 0, "cosine", 1.0),
        (10, 0, "cosine", HALF_COSINE),
        (12, 4, "cosine", HALF_COSINE),
        (5, 0, "cosine", 0.05 + 0.95 * (2 + 2**0.5) / 4),  # cos(pi / 4) = sqrt(2) / 2
        (20, 0, "cosine", 0.05),
        (36, 4, "cosine", 0.05),  # a cosine that went on would be back at the peak
        (500, 0, "cosine", 0.05),
    ],
)
def test_learning_rate_by_hand(step: int, warmup_steps: int, decay: Decay, expected: float) -> None:
    rate = learning_rate(step, peak=3.0, warmup_steps=warmup_steps, total_steps=20, decay=decay)
    assert rate == pytest.approx(3.0 * expected, rel=1e-12)


def test_cosine_only_falls_after_the_warm_up() -> None:
    rates = [learning_rate(step, peak=1.0, warmup_steps=5, total_steps=30, decay="cosine") for step in range(40)]
    assert rates[:6] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert all(later < earlier for earlier, later in pairwise(rates[5:31]))


def test_warm_up_longer_than_the_run() -> None:
    rates = [learning_rate(step, peak=1.0, warmup_steps=8, total_steps=4, decay="cosine") for step in range(9)]
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
