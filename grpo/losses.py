"""Per-token losses as pure functions of log-probabilities. How tokens are averaged is decided in batch.py.

Shape: N trained tokens. `logprobs` carries the gradient; everything else is data.
"""

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def clipped_policy_loss(
    logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logprob - old logprob), arXiv:2402.03300 eq. 3.

    `old_logprobs` are the sampler's or the learner's own (corrections.py). clip_low = clip_high is PPO's clip;
    clip_high > clip_low is DAPO's clip-higher (arXiv:2503.14476 eq. 8). Returns the loss [N] and a bool [N] that marks
    tokens whose gradient is cut.
    """
    ratio_N = (logprobs_N - old_logprobs_N).exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    unbounded, bounded = ratio_N * advantages_N, clipped_N * advantages_N
    return -unbounded.minimum(bounded), bounded < unbounded


def kl_penalty(logprobs_N: Tensor, reference_logprobs_N: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimates KL(policy || reference) per sampled token, [N] (J. Schulman, "Approximating KL divergence", 2020).

    With d = log reference - log policy: k1 = -d, unbiased and of either sign; k2 = d^2 / 2; k3 = exp(d) - d - 1,
    unbiased and never negative (arXiv:2402.03300 eq. 4). As a loss, k1 has zero expected gradient on-policy: prefer k2
    or k3.
    """
    difference_N = reference_logprobs_N - logprobs_N
    if estimator == "k1":
        return -difference_N
    if estimator == "k2":
        return difference_N.square() / 2
    return difference_N.exp() - difference_N - 1
