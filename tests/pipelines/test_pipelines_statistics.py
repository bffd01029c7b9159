"""Statistics of evaluations.

Pinned: (1) Wilson's interval and the mean's standard error against statsmodels; (2) pass@k against counting all
subsets, and its expectation; (3) McNemar's exact test and the paired interval against statsmodels and the formula of
Bonett and Price; (4) intervals hold the truth about as often as they say, by simulation; (5) votes cluster by the
verifier's equality, ties are split, and cons@k of fewer than all votes is the mean over all subsets.
"""

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import hypergeom
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from pipelines.evaluation.voting import Vote, cluster, consensus
from pipelines.statistics import (
    Z,
    clustered_error,
    mean_estimate,
    paired_interval,
    pass_at_k,
    sign_test,
    wilson_interval,
)
from rewards import answers_equal


@pytest.mark.parametrize(("right", "trials"), [(0, 10), (1, 29), (81, 263), (5, 5), (700, 1319)])
def test_wilson_interval_is_that_of_statsmodels(right: int, trials: int) -> None:
    low, high = wilson_interval(right, trials)
    assert (low, high) == pytest.approx(proportion_confint(right, trials, method="wilson"))
    one_each = mean_estimate([1.0] * right + [0.0] * (trials - right))
    assert (one_each.low, one_each.high) == pytest.approx((low, high)), "Wilson's own for one completion per problem"


def test_clustered_error_is_that_of_a_cluster_robust_regression() -> None:
    rng = np.random.default_rng(0)
    right_PN = (rng.random((40, 8)) < rng.beta(0.6, 0.9, size=(40, 1))).astype(float)
    problems = np.repeat(np.arange(40), 8)
    fit = sm.OLS(right_PN.ravel(), np.ones(320)).fit(cov_type="cluster", cov_kwds={"groups": problems})
    estimate = mean_estimate(list(right_PN.mean(axis=1)))
    assert estimate.value == pytest.approx(float(fit.params[0]))
    # Its correction for few clusters is G / (G - 1) * (n - 1) / (n - 1 parameter), which is ours.
    assert estimate.standard_error == pytest.approx(float(fit.bse[0]))
    naive = math.sqrt(estimate.value * (1 - estimate.value) / 320)
    assert estimate.standard_error > 1.5 * naive, "completions of one problem are no independent trials"


def test_means_of_nothing_and_of_equal_values() -> None:
    nothing = mean_estimate([])
    assert (nothing.low, nothing.high, nothing.num_problems) == (0.0, 1.0, 0)
    for value in (0.0, 0.1, 0.5, 0.7, 1.0):  # a mean of 0.1 or 0.7 is off by a rounding
        estimate = mean_estimate([value] * 12)
        assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(12 * value, 12)), (
            "no spread seen is not no spread"
        )
    assert clustered_error([0.3]) == 0.0


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (8, 1, 4), (6, 0, 6), (6, 6, 2), (7, 5, 3)])
def test_pass_at_k_counts_subsets(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    share = Fraction(sum(map(any, subsets)), len(subsets))
    assert pass_at_k(num_samples=n, num_right=c, k=k) == pytest.approx(float(share))
    assert pass_at_k(num_samples=n, num_right=c, k=k) == pytest.approx(1 - hypergeom.pmf(0, n, c, k))


def test_pass_at_k_is_unbiased_where_the_plain_formula_is_not() -> None:
    n, k, p = 6, 4, 0.2
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    expected = sum(chance * pass_at_k(num_samples=n, num_right=c, k=k) for c, chance in enumerate(chances))
    assert expected == pytest.approx(truth)
    plain = sum(chance * (1 - (1 - c / n) ** k) for c, chance in enumerate(chances))
    assert plain < truth - 0.02
    with pytest.raises(ValueError, match="got 6 samples"):
        pass_at_k(num_samples=6, num_right=1, k=7)
    with pytest.raises(ValueError, match="num_right=7"):
        pass_at_k(num_samples=6, num_right=7, k=2)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (9, 2), (3, 14), (60, 41)])
def test_sign_test_is_mcnemars_exact_test(better: int, worse: int) -> None:
    table: Any = mcnemar([[20, better], [worse, 30]], exact=True) if better + worse else None
    expected = table.pvalue if table else 1.0
    assert sign_test(better, worse) == pytest.approx(expected)


@pytest.mark.parametrize(("better", "worse", "same"), [(0, 0, 20), (9, 2, 30), (60, 41, 1218)])
def test_paired_interval_is_bonett_and_prices(better: int, worse: int, same: int) -> None:
    """Bonett and Price (2012), equation 6: shares of each kind with one problem of each added."""
    n = better + worse + same
    up, down = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    spread = Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    found = paired_interval([1.0] * better + [-1.0] * worse + [0.0] * same)
    assert found == pytest.approx((up - down - spread, up - down + spread))


def coverage(
    interval: Callable[[np.ndarray], tuple[float, float]], draw: Callable[[], np.ndarray], truth: float
) -> float:
    bounds = [interval(draw()) for _ in range(1500)]
    return fmean(low <= truth <= high for low, high in bounds)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (2.0, 2.0), (0.3, 3.0)])
@pytest.mark.parametrize(("problems", "samples"), [(30, 8), (200, 4), (200, 1)])
def test_intervals_of_means_hold_the_truth(alpha: float, beta: float, problems: int, samples: int) -> None:
    rng = np.random.default_rng(1)

    def draw() -> np.ndarray:
        return rng.binomial(samples, rng.beta(alpha, beta, size=problems)) / samples

    def clustered(shares: np.ndarray) -> tuple[float, float]:
        estimate = mean_estimate(list(shares))
        return estimate.low, estimate.high

    def pooled(shares: np.ndarray) -> tuple[float, float]:
        return wilson_interval(float(shares.sum() * samples), problems * samples)

    truth = alpha / (alpha + beta)
    assert 0.925 < coverage(clustered, draw, truth) < 0.975
    if samples == 8:
        assert coverage(pooled, draw, truth) < 0.9, "completions taken for independent trials promise too much"


@pytest.mark.parametrize(("problems", "samples", "gain"), [(30, 1, 0.1), (200, 1, 0.0), (100, 4, 0.1), (200, 1, 0.3)])
def test_paired_intervals_hold_the_truth(problems: int, samples: int, gain: float) -> None:
    """Each problem is as hard for the second model as for the first, but for a constant gain."""
    rng = np.random.default_rng(2)

    def draw() -> np.ndarray:
        chance = rng.beta(0.5, 0.5, size=problems) * (1 - gain)
        return (rng.binomial(samples, chance + gain) - rng.binomial(samples, chance)) / samples

    assert 0.925 < coverage(lambda d: paired_interval(list(d)), draw, gain) < 0.985


def equal(one: str, other: str) -> bool:
    return answers_equal(one, other)[0]


def test_votes_cluster_by_the_verifiers_equality() -> None:
    answers = ["1/2", "0.5", None, r"\frac{1}{2}", "2", "2.0", "50%"]
    assert cluster(answers, equal)[:6] == [0, 0, None, 0, 1, 1]
    assert len(set(answers)) == 7, "by text, nobody agrees"


def test_majority_with_ties_and_without_votes() -> None:
    half, two = Vote(answer="1/2", right=True), Vote(answer="2", right=False)
    assert consensus([half, Vote(answer="0.5", right=True), two, two, two], 5, equal, "p") == 0.0
    assert consensus([half, Vote(answer="0.5", right=True), two], 3, equal, "p") == 1.0
    assert consensus([half, two], 2, equal, "p") == 0.5, "a tie is split"
    silent = Vote(answer=None, right=False)
    assert consensus([silent, silent, half], 3, equal, "p") == 1.0, "who says nothing does not vote"
    assert consensus([silent, silent], 2, equal, "p") == 0.0
    with pytest.raises(ValueError, match="cons@3"):
        consensus([half, two], 3, equal, "p")


def test_consensus_of_few_is_the_mean_over_subsets() -> None:
    votes = [Vote(answer=answer, right=answer == "7") for answer in "7712357"]

    def majority(subset: tuple[Vote, ...]) -> float:
        counts = {vote.answer: sum(other.answer == vote.answer for other in subset) for vote in subset}
        winners = [answer for answer, count in counts.items() if count == max(counts.values())]
        return winners.count("7") / len(winners)

    for k in range(1, 8):
        truth = fmean(majority(subset) for subset in itertools.combinations(votes, k))
        assert consensus(votes, k, equal, "p") == pytest.approx(truth)
    many = [Vote(answer=str(n % 5 if n % 3 else 7), right=n % 3 == 0) for n in range(30)]
    random.Random(0).shuffle(many)
    drawn = consensus(many, 6, equal, "p")
    assert drawn == consensus(many, 6, equal, "p"), "the same subsets for the same seed"
    rng = random.Random(5)
    truth = fmean(majority(tuple(rng.sample(many, 6))) for _ in range(4000))
    assert drawn == pytest.approx(truth, abs=0.08)
