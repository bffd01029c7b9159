"""Pins the mismatch meter: every token counts the same, whichever micro-batch brought it."""

import math

import pytest
import torch

from grpo.mismatch import MismatchMeter


def test_by_hand() -> None:
    """Learner minus sampler is 0.5, -1 and 0, in two micro-batches of two and one tokens."""
    meter = MismatchMeter()
    meter.add(torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -2.0]))
    meter.add(torch.tensor([-4.0]), torch.tensor([-4.0]))
    assert meter.report() == pytest.approx(
        {
            "mismatch/abs_mean": 1.5 / 3,
            "mismatch/abs_max": 1.0,
            "mismatch/kl": (math.exp(0.5) - 1.5 + math.exp(-1.0)) / 3,
        },
        rel=1e-6,
    )


def test_expected_kl_is_that_of_the_sampler_against_the_learner() -> None:
    """Tokens in the sampler's proportions 1 : 3 give KL(sampler || learner) exactly."""
    learner, sampler = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    drawn = torch.tensor([0, 1, 1, 1])
    meter = MismatchMeter()
    meter.add(learner[drawn], sampler[drawn])
    exact = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert meter.report()["mismatch/kl"] == pytest.approx(exact, rel=1e-5)


def test_nothing_measured_reports_nothing() -> None:
    assert MismatchMeter().report() == {}


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"\[2\].*\[1\]"):
        MismatchMeter().add(torch.zeros(2), torch.zeros(1))
