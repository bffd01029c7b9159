"""Policy objectives and KL estimates as pure functions of log-probabilities; which runs is chosen in objective.py, how
token losses are averaged in packing.py.

Every policy loss returns the loss [N], to be minimized, and a bool [N] that marks the tokens whose gradient a bound
cuts or holds down. r_t = exp(logprob - old logprob) is the probability ratio of a token, A_t its advantage, |o| the
number of trained tokens of its sample, sg the stop-gradient.

Shape: N trained tokens. `logprobs` carries the gradient, everything else is data. `samples_N` numbers the sample that
each token belongs to; losses that take it are of whole sequences, whose tokens must all be present. With aggregation
"sequence" such a loss counts each sample once, as its paper does.
"""

from typing import Literal

import torch
from torch import Tensor

PolicyLoss = Literal["clip", "gspo", "gspo_token", "cispo", "gmpo", "sapo", "reinforce"]
KLEstimator = Literal["k1", "k2", "k3", "k3_weighted"]


def clipped_policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), arXiv:2402.03300 eq. 3.

    `old_logprobs` are the sampler's or the learner's own (corrections.py). clip_low = clip_high is PPO's clip;
    clip_high > clip_low is DAPO's clip-higher (arXiv:2503.14476 eq. 8). With `dual_clip` c the objective is at least
    c A where A < 0 (arXiv:1912.09729 eq. 5), so that ratios above c get no gradient there either; 0 for none.
    """
    return _clipped((logprobs_N - old_logprobs_N).exp(), advantages_N, clip_low, clip_high, dual_clip)


def gspo_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    samples_N: Tensor,
    clip_low: float,
    clip_high: float,
    *,
    per_token: bool,
) -> tuple[Tensor, Tensor]:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) with s = exp((1/|o|) sum_t log r_t), the same for all tokens of
    a sample: GSPO (arXiv:2507.18071 eq. 5 to 7, there with 3e-4 and 4e-4).

    `per_token` is GSPO-token (eq. 13, 14): s_t = sg(s) pi_t / sg(pi_t), of the same value, whose gradient is that of
    the token alone, so that advantages may differ within a sample.
    """
    log_ratios_N = sample_means(logprobs_N - old_logprobs_N, samples_N)
    if per_token:
        log_ratios_N = log_ratios_N.detach() + logprobs_N - logprobs_N.detach()
    return _clipped(log_ratios_N.exp(), advantages_N, clip_low, clip_high, 0.0)


def cispo_loss(
    logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi: CISPO (arXiv:2506.13585 eq. 4). All tokens keep a gradient;
    it is the weight that is bounded. The paper leaves out the lower bound: clip_low = 1."""
    ratio_N = (logprobs_N.detach() - old_logprobs_N).exp()
    weights_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    return -weights_N * advantages_N * logprobs_N, weights_N != ratio_N


def gmpo_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    samples_N: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """-A prod_t min(r_t^s, clip(r_t^s, e^-clip_low, e^clip_high))^(s/|o|) with s = sign(A): GMPO (arXiv:2507.20673
    eq. 4, there with 0.4 and 0.4), the geometric mean of token ratios, each bounded before the mean.

    Bounds are in log space. The minimum leaves one of them at work: log r <= clip_high where A > 0, log r >= -clip_low
    where A < 0. A sample has one advantage here, so step rewards (process supervision) do not go with it.
    """
    log_ratios_N = logprobs_N - old_logprobs_N
    is_positive_N = advantages_N > 0
    bounded_N = torch.where(is_positive_N, log_ratios_N.clamp(max=clip_high), log_ratios_N.clamp(min=-clip_low))
    return -advantages_N * sample_means(bounded_N, samples_N).exp(), bounded_N != log_ratios_N


def sapo_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    temperature_positive: float,
    temperature_negative: float,
) -> tuple[Tensor, Tensor]:
    """-(4 / tau) sigmoid(tau (r - 1)) A: SAPO (arXiv:2511.20347 eq. 5, 6), a gate that closes smoothly around r = 1 in
    place of a clip. tau is `temperature_positive` where A > 0, else `temperature_negative`; there 1.0 and 1.05."""
    ratio_N = (logprobs_N - old_logprobs_N).exp()
    tau_N = torch.where(advantages_N > 0, temperature_positive, temperature_negative).to(ratio_N.dtype)
    gated_N = 4 / tau_N * (tau_N * (ratio_N - 1)).sigmoid()
    return -gated_N * advantages_N, torch.zeros_like(ratio_N, dtype=torch.bool)


def reinforce_loss(logprobs_N: Tensor, advantages_N: Tensor) -> tuple[Tensor, Tensor]:
    """-A log pi (R. Williams, 1992; with a leave-one-out baseline RLOO, arXiv:2402.14740). Off-policy it is biased:
    corrections.py has weights for that."""
    return -advantages_N * logprobs_N, torch.zeros_like(logprobs_N, dtype=torch.bool)


def kl_penalty(
    logprobs_N: Tensor, reference_logprobs_N: Tensor, estimator: KLEstimator, old_logprobs_N: Tensor | None = None
) -> Tensor:
    """Estimates KL(policy || reference) per sampled token, [N] (J. Schulman, "Approximating KL divergence", 2020).

    With d = log reference - log policy: k1 = -d, unbiased and of either sign; k2 = d^2 / 2; k3 = exp(d) - d - 1,
    unbiased and never negative (arXiv:2402.03300 eq. 4). As losses on-policy, k1 has zero expected gradient, k2 that of
    KL(policy || reference), k3 that of KL(reference || policy).

    "k3_weighted" is r k3 with r = exp(logprob - old logprob) (DeepSeek-V3.2, arXiv:2512.02556 section 3.1), which alone
    is unbiased in value and gradient, off-policy as well; it needs the log-probabilities of the policy that sampled.
    """
    difference_N = reference_logprobs_N - logprobs_N
    if estimator == "k1":
        return -difference_N
    if estimator == "k2":
        return difference_N.square() / 2
    k3_N = difference_N.exp() - difference_N - 1
    if estimator == "k3":
        return k3_N
    assert old_logprobs_N is not None, "the weighted estimate needs the sampler's log-probabilities"
    return (logprobs_N - old_logprobs_N).exp() * k3_N


def sample_sums(values_N: Tensor, samples_N: Tensor) -> Tensor:
    """[N] the sum over the sample of each token; carries the gradient."""
    size = int(samples_N.max()) + 1 if len(samples_N) else 0
    totals = values_N.new_zeros(size).index_add(0, samples_N, values_N)
    return totals[samples_N]


def sample_means(values_N: Tensor, samples_N: Tensor) -> Tensor:
    """[N] the mean over the sample of each token; carries the gradient."""
    return sample_sums(values_N, samples_N) / sample_sums(torch.ones_like(values_N), samples_N)


def _clipped(
    ratio_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[Tensor, Tensor]:
    unbounded, bounded = ratio_N * advantages_N, ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantages_N
    objective_N, cut_N = unbounded.minimum(bounded), bounded < unbounded
    if dual_clip:
        floor_N = torch.where(advantages_N < 0, dual_clip * advantages_N, -torch.inf)
        objective_N, cut_N = objective_N.maximum(floor_N), cut_N | (objective_N < floor_N)
    return -objective_N, cut_N
