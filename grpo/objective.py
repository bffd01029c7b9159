"""What one optimizer step minimizes: the policy loss of one name, and what is added to it.

    J = sum_t w_t (m_t c_t policy_t + kl_coef kl_t - entropy_coef H_t) + positive_nll_coef nll

Over the trained tokens t of the global batch: w_t from packing.py (the aggregation), m_t 1 for tokens that
`entropy_top_share` selects and 0 for the others, c_t the weight from corrections.py, policy_t and kl_t from losses.py,
H_t the entropy. All denominators are the global batch's, so J does not depend on micro-batches.

Shape: N trained tokens of one micro-batch.

    terms = objective_terms(config, correction, batch, logprobs_N, entropies_N, reference_N, entropy_threshold=None)
    terms.loss.backward()
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from grpo import losses
from grpo.batch import Aggregation, MicroBatch
from grpo.corrections import CorrectionConfig
from grpo.losses import KLEstimator, PolicyLoss


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The objective, see docs/grpo.md for each equation and presets.py for what papers combine."""

    loss: PolicyLoss = "clip"
    """The policy loss: PPO's and GRPO's clip, or one of grpo/losses.py."""
    clip_low: float = 0.2
    """Probability ratios below 1 - clip_low get no gradient where the advantage is negative; in log space for gmpo,
    bounds the weight for cispo; 1 for no bound."""
    clip_high: float = 0.2
    """Probability ratios above 1 + clip_high get no gradient where the advantage is positive; as above."""
    dual_clip: float = 0.0
    """Ratios above it get no gradient where the advantage is negative either; above 1, 0 for no bound. `clip` only."""
    sapo_temperature_positive: float = 1.0
    """How fast sapo's gate closes where the advantage is positive."""
    sapo_temperature_negative: float = 1.05
    """The same where it is not."""
    positive_scale: float = 1.0
    """Factor of positive advantages."""
    negative_scale: float = 1.0
    """Factor of negative advantages."""
    aggregation: Aggregation = "token"
    """Average over all tokens of the batch, over each sample's tokens first, or with a constant length."""
    constant_length: int = 0
    """Tokens that a sample's sum is divided by with aggregation `constant`: the trainer's max_tokens, as a rule."""
    kl_coef: float = 0.0
    """Weight of the KL penalty against the reference policy; 0 keeps no copy of it."""
    kl_estimator: KLEstimator = "k3"
    """How that KL is estimated from sampled tokens."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Penalize KL in the loss, token by token, or take its sum over a completion off that completion's reward."""
    reference_every: int = 0
    """Optimizer steps after which the present policy becomes the reference (R1); 0 keeps the initial one."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    entropy_top_share: float = 1.0
    """Share of the tokens of an optimizer step, those with the highest entropy, that the policy loss trains
    (arXiv:2506.01939, there 0.2); below 1 it costs a second forward pass."""
    positive_nll_coef: float = 0.0
    """Weight of -log pi, averaged over the tokens with a positive advantage (VAPO, arXiv:2504.05118, there 0.1)."""

    def __post_init__(self) -> None:
        self._check_policy_loss()
        if (self.aggregation == "constant") != (self.constant_length > 0):
            raise ValueError(
                f"aggregation {self.aggregation!r} with constant_length={self.constant_length}: 'constant' divides by "
                "it and needs it above 0, the others have no use for it; set both or neither"
            )
        for name in ("positive_scale", "negative_scale", "kl_coef", "entropy_coef", "positive_nll_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.kl_in == "reward" and self.kl_estimator == "k3_weighted":
            raise ValueError("kl_estimator 'k3_weighted' corrects a gradient, a reward has none; take k1, k2 or k3")
        if self.reference_every < 0 or (self.reference_every and not self.kl_coef):
            raise ValueError(
                f"reference_every={self.reference_every} with kl_coef={self.kl_coef}: it must be >= 0, and without a "
                "KL penalty there is no reference; set kl_coef above 0, or reference_every to 0"
            )
        if not 0 < self.entropy_top_share <= 1:
            raise ValueError(f"entropy_top_share must be above 0 and at most 1, got {self.entropy_top_share}")

    def _check_policy_loss(self) -> None:
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(f"need 0 <= clip_low <= 1 and clip_high >= 0, got {self.clip_low} and {self.clip_high}")
        if self.dual_clip and (self.loss != "clip" or not self.dual_clip > 1 + self.clip_high):
            raise ValueError(
                f"dual_clip={self.dual_clip} with loss {self.loss!r} and clip_high={self.clip_high}: it bounds the "
                "loss 'clip' and must exceed 1 + clip_high; 3 is usual, 0 turns it off"
            )
        if not (self.sapo_temperature_positive > 0 and self.sapo_temperature_negative > 0):
            raise ValueError(
                f"sapo's temperatures must be > 0, got {self.sapo_temperature_positive} and "
                f"{self.sapo_temperature_negative}"
            )


def check_supervision(supervision: Literal["outcome", "process"], objective: ObjectiveConfig) -> None:
    """Raises ValueError for an objective that needs one advantage per completion where each token has its own."""
    if supervision == "process" and (objective.loss == "gmpo" or objective.kl_in == "reward"):
        raise ValueError(
            f"supervision 'process' gives each token an advantage of its own; loss {objective.loss!r} with kl_in "
            f"{objective.kl_in!r} needs one per completion: choose another loss than gmpo, and kl_in loss"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Of one micro-batch."""

    loss: Tensor
    """Scalar; the sum over all micro-batches is the objective."""
    of_tokens_N: Tensor
    """[N] the loss of each token before it is weighted, without gradient."""
    means: dict[str, Tensor] = field(default_factory=dict)
    """Metric -> [N], to be averaged over the trained tokens."""


def objective_terms(
    config: ObjectiveConfig,
    correction: CorrectionConfig,
    batch: MicroBatch,
    logprobs_N: Tensor,
    entropies_N: Tensor,
    reference_N: Tensor | None,
    entropy_threshold: float | None,
) -> Terms:
    """`reference_N` are the reference's log-probabilities for a KL penalty in the loss; `entropy_threshold` is that of
    the whole optimizer step (`entropy_threshold_of`). Advantages are scaled here, for the correction's signs as well.
    """
    sampler_N, current_N = batch.sampling_logprobs_N, logprobs_N.detach()
    learner_N = current_N if batch.old_logprobs_N is None else batch.old_logprobs_N
    old_N = sampler_N if correction.old_logprobs == "sampler" else learner_N
    advantages_N = scaled_advantages(batch.advantages_N, config.positive_scale, config.negative_scale)
    terms_N, cut_N = policy_loss(config, logprobs_N, old_N, advantages_N, batch.samples_N)
    means = {"policy/clipped": cut_N.float(), "policy/entropy": entropies_N}
    if correction.is_on:
        factors_N = correction.weights(current_N, learner_N, sampler_N, advantages_N, batch.samples_N)
        terms_N = terms_N * factors_N
        means |= {"correction/weight": factors_N, "correction/dropped": (factors_N == 0).float()}
    if entropy_threshold is not None:
        selected_N = (entropies_N.detach() >= entropy_threshold).to(terms_N.dtype)
        terms_N = terms_N * selected_N
        means["policy/selected"] = selected_N
    if reference_N is not None:
        kl_N = losses.kl_penalty(logprobs_N, reference_N, config.kl_estimator, old_N)
        terms_N = terms_N + config.kl_coef * kl_N
        means["policy/kl_to_reference"] = kl_N
    if config.entropy_coef:
        terms_N = terms_N - config.entropy_coef * entropies_N
    loss = (terms_N * batch.weights_N).sum()
    if config.positive_nll_coef and batch.totals.positive_tokens:
        nll_sum = -(logprobs_N * (batch.advantages_N > 0)).sum()
        loss = loss + config.positive_nll_coef / batch.totals.positive_tokens * nll_sum
    return Terms(loss=loss, of_tokens_N=terms_N.detach(), means=means)


def policy_loss(
    config: ObjectiveConfig, logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, samples_N: Tensor
) -> tuple[Tensor, Tensor]:
    """[N] the loss that `config.loss` names, and which tokens its bounds reach."""
    low, high = config.clip_low, config.clip_high
    match config.loss:
        case "clip":
            return losses.clipped_policy_loss(logprobs_N, old_N, advantages_N, low, high, config.dual_clip)
        case "gspo" | "gspo_token":
            is_per_token = config.loss == "gspo_token"
            return losses.gspo_loss(logprobs_N, old_N, advantages_N, samples_N, low, high, per_token=is_per_token)
        case "cispo":
            return losses.cispo_loss(logprobs_N, old_N, advantages_N, low, high)
        case "gmpo":
            return losses.gmpo_loss(logprobs_N, old_N, advantages_N, samples_N, low, high)
        case "sapo":
            positive, negative = config.sapo_temperature_positive, config.sapo_temperature_negative
            return losses.sapo_loss(logprobs_N, old_N, advantages_N, positive, negative)
        case "reinforce":
            return losses.reinforce_loss(logprobs_N, advantages_N)


def scaled_advantages(advantages_N: Tensor, positive_scale: float, negative_scale: float) -> Tensor:
    """Positive advantages times one factor, negative ones times another; signs stay."""
    return torch.where(advantages_N > 0, positive_scale * advantages_N, negative_scale * advantages_N)


def entropy_threshold_of(entropies_N: Tensor, top_share: float) -> float:
    """The entropy that the share `top_share` of all tokens exceeds, rounded up to a whole token.

    Half way between the last entropy that is selected and the first that is not, so that no token's choice hangs on
    rounding; of equal entropies at the border all are selected.
    """
    count = math.ceil(top_share * len(entropies_N) - 1e-9)
    ordered_N = entropies_N.double().sort(descending=True).values
    if count >= len(ordered_N):
        return -torch.inf
    return ((ordered_N[count - 1] + ordered_N[count]) / 2).item()
