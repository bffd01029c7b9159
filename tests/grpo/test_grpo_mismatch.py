"""Pins what is measured between sampler and learner.

1. Every token counts the same, whichever micro-batch brought it; KL estimates, quantiles and lags by hand.
2. Experts are compared as sets; rows without a recording are counted, and a sequence's last token is not one of them.
3. The alarm speaks once per crossing, and a KL that is not a number crosses.
"""

import math

import pytest
import torch

from grpo.mismatch import MismatchAlarm, MismatchMeter
from models.moe import Routing


def test_by_hand() -> None:
    """Learner minus sampler is 0.5, -1 and 0, in two micro-batches of two and one tokens."""
    meter = MismatchMeter()
    meter.add(torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -2.0]))
    meter.add(torch.tensor([-4.0]), torch.tensor([-4.0]))
    assert meter.report() == pytest.approx(
        {
            "mismatch/abs_mean": 1.5 / 3,
            "mismatch/abs_max": 1.0,
            "mismatch/kl_k1": 0.5 / 3,
            "mismatch/kl_k3": (math.exp(0.5) - 1.5 + math.exp(-1.0)) / 3,
            "mismatch/ratio_p0.1": math.exp(-1.0),
            "mismatch/ratio_p1": math.exp(-1.0),
            "mismatch/ratio_p50": 1.0,
            "mismatch/ratio_p99": math.exp(0.5),
            "mismatch/ratio_p99.9": math.exp(0.5),
        },
        rel=1e-6,
    )


def test_quantiles_of_a_thousand_ratios() -> None:
    """Ratios 1, 2, ..., 1001 in any order: the quantile q is 1 + 1000 q."""
    ratios = torch.arange(1.0, 1002.0)[torch.randperm(1001, generator=torch.Generator().manual_seed(0))]
    meter = MismatchMeter()
    meter.add(ratios.log(), torch.zeros(1001))
    found = {name: value for name, value in meter.report().items() if "ratio" in name}
    wanted = {"p0.1": 2, "p1": 11, "p50": 501, "p99": 991, "p99.9": 1000}
    assert found == pytest.approx({f"mismatch/ratio_{name}": value for name, value in wanted.items()}, rel=1e-5)


def test_expected_kl_is_that_of_the_sampler_against_the_learner() -> None:
    """Tokens in the sampler's proportions 1 : 3 give KL(sampler || learner) exactly."""
    learner, sampler = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    drawn = torch.tensor([0, 1, 1, 1])
    meter = MismatchMeter()
    meter.add(learner[drawn], sampler[drawn])
    exact = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert meter.report()["mismatch/kl_k3"] == pytest.approx(exact, rel=1e-5)
    assert meter.report()["mismatch/kl_k1"] == pytest.approx(exact, rel=1e-5)


def test_tiny_differences_do_not_drown_in_rounding() -> None:
    """k3 of a difference d is d^2 / 2: 5e-11 here, which float32 arithmetic on exp(d) would round to 0 or 1e-7."""
    meter = MismatchMeter()
    meter.add(torch.full((4,), 1e-5), torch.zeros(4))
    assert meter.report()["mismatch/kl_k3"] == pytest.approx(5e-11, rel=1e-3)


def test_staleness_is_reported_per_lag() -> None:
    meter = MismatchMeter()
    meter.add(torch.tensor([0.1, 0.2, 0.4]), torch.zeros(3), torch.tensor([0, 2, 2]))
    report = meter.report()

    def k3(d: float) -> float:
        return math.exp(d) - d - 1

    assert report["mismatch/kl_k3_lag_0"] == pytest.approx(k3(0.1), rel=1e-5)
    assert report["mismatch/kl_k3_lag_2"] == pytest.approx((k3(0.2) + k3(0.4)) / 2, rel=1e-5)
    assert "mismatch/kl_k3_lag_1" not in report


def routing(chosen: list[list[int]]) -> Routing:
    ids_TK = torch.tensor(chosen)
    return Routing(ids_TK=torch.zeros_like(ids_TK), chosen_TK=ids_TK, scores_TE=torch.zeros(len(chosen), 4))


def test_experts_by_hand() -> None:
    """Two sequences of 3 and 2 tokens, two layers. Token 1 differs in layer 3, in the other order it does not differ;
    token 3 has no recording; tokens 2 and 4 are the last of their sequences."""
    routed = {
        3: routing([[0, 1], [1, 2], [0, 1], [2, 3], [0, 1]]),
        1: routing([[0, 1], [3, 0], [0, 1], [0, 1], [0, 1]]),
    }
    recorded_TLK = torch.tensor(
        [[[1, 0], [1, 0]], [[0, 3], [1, 3]], [[-1, -1]] * 2, [[-1, -1]] * 2, [[-1, -1]] * 2], dtype=torch.int16
    )
    meter = MismatchMeter()
    meter.add_experts(routed, recorded_TLK, num_sequences=2)
    assert meter.report() == pytest.approx(
        {
            "mismatch/rows_without_experts": 1 / 3,
            "mismatch/other_experts": 1 / 4,
            "mismatch/tokens_with_other_experts": 1 / 2,
        }
    )
    meter.add_experts(routed, None, num_sequences=2)
    assert meter.report()["mismatch/rows_without_experts"] == pytest.approx(4 / 6)
    assert meter.report()["mismatch/other_experts"] == 1 / 4


def test_nothing_measured_reports_nothing() -> None:
    meter = MismatchMeter()
    meter.add_experts({}, None, num_sequences=3)
    assert meter.report() == {}


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"\[2\].*\[1\]"):
        MismatchMeter().add(torch.zeros(2), torch.zeros(1))


def test_the_alarm_speaks_once_per_crossing() -> None:
    messages: list[str] = []
    alarm = MismatchAlarm(1e-2, messages.append)
    states = [alarm.check({"mismatch/kl_k3": kl}) for kl in (1e-3, 2e-2, 3e-2, 1e-3, math.nan, 1e-2)]
    assert [state["mismatch/alarm"] for state in states] == [0, 1, 1, 0, 1, 0]
    assert len(messages) == 2 and "0.02 per token, allowed 0.01" in messages[0] and "nan" in messages[1]
    assert alarm.check({}) == {}, "a step without samples measures nothing"
