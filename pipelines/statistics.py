"""Statistics of evaluations: shares with honest intervals, pass@k, and the comparison of two models on one set.

What is uncertain is which problems happened to be in the data set, and what was sampled. Completions of one problem are
not independent, so problems, not completions, are the sample everywhere (clustered standard errors,
arXiv:2411.00640). All intervals are of 95%.

    estimate = mean_estimate([0.25, 1.0, 0.5])      # one share per problem
    pass_at_k(num_samples=64, num_right=3, k=8)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

Z = 1.959963984540054
"""97.5% quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over problems and how sure it is."""

    value: float
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end."""
    standard_error: float
    num_problems: int
    """Problems that the mean is of."""


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """95% score interval for a share (E. B. Wilson, 1927); (0, 1) without trials. The numbers need not be whole."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    center = share + Z * Z / (2 * trials)
    spread = Z * math.sqrt(max(0.0, share * (1 - share) / trials) + Z * Z / (4 * trials * trials))
    scale = 1 + Z * Z / trials
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def clustered_error(values: Sequence[float]) -> float:
    """Standard error of the mean of one value per problem, sqrt(sum (v - mean)^2 / (N (N - 1))); 0 for one.

    With v the share of right completions this is the cluster-robust error of all completions' mean, for equally many
    completions per problem.
    """
    count = len(values)
    if count < 2 or min(values) == max(values):  # of equal ones the mean may be off by a rounding
        return 0.0
    mean = fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count * (count - 1)))


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean of one value in [0, 1] per problem, such as its share of right completions or its pass@k.

    The interval is Wilson's with the effective number of trials, mean (1 - mean) / SE^2, the design-effect method of
    complex surveys: for one completion per problem it is Wilson's own, and near 0 and 1 it stays inside and keeps a
    width, as mean -+ 1.96 SE does not. Between N and infinity is where that number can be; values that are all equal,
    and so tell nothing of the spread, count as N trials. (0, 1) without problems.
    """
    count = len(values)
    if count == 0:
        return Estimate(value=0.0, low=0.0, high=1.0, standard_error=0.0, num_problems=0)
    mean, error = fmean(values), clustered_error(values)
    # N - 1 -> N: the sum of squares of a share is at most N mean (1 - mean), reached where every value is 0 or 1.
    trials = mean * (1 - mean) / (error * error * (count - 1) / count) if error > 0 else count
    low, high = wilson_interval(mean * trials, trials)
    return Estimate(value=mean, low=low, high=high, standard_error=error, num_problems=count)


def pass_at_k(*, num_samples: int, num_right: int, k: int) -> float:
    """Chance that one of k of the samples, drawn without replacement, is right: 1 - C(n - c, k) / C(n, k).

    Unbiased for the chance that one of k fresh samples is right (arXiv:2107.03374 eq. 1), which 1 - (1 - c/n)^k is not.
    Raises ValueError for k above n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples per problem, got {num_samples} samples")
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"num_right={num_right} is not between 0 and num_samples={num_samples}")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95% interval for the mean of one difference in [-1, 1] per problem.

    The mean -+ 1.96 SE after one problem of difference 1 and one of -1 have been added. With one completion per problem
    this is the adjusted Wald interval for paired shares of Bonett and Price (J. Educ. Behav. Stat. 37, 2012), which
    keeps its coverage where few problems differ, and where none does.
    """
    count = len(differences) + 2
    mean = sum(differences) / count
    square = (sum(value * value for value in differences) + 2) / count
    spread = Z * math.sqrt((square - mean * mean) / count)
    return max(-1.0, mean - spread), min(1.0, mean + spread)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value that wins and losses are equally probable, exact binomial; ties are not counted, 1 without any.

    With one completion per problem this is McNemar's exact test.
    """
    trials = wins + losses
    tail = sum(math.comb(trials, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**trials)
