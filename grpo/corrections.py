"""Corrections for samples that another policy drew than the one being trained: importance weights and masks.

Three policies meet in one token: pi_sampler, which drew it (the engine's arithmetic, perhaps older weights), pi_old,
the learner before the first optimizer step of the batch, and pi, the learner now. How they are put together:

- direct form, `old_logprobs="sampler"`: the loss clips pi / pi_sampler. That quotient is the importance weight, and its
  clip bounds it; a weight pi_old / pi_sampler on top would count the mismatch twice and is refused. Masks are allowed.
- decoupled form, `old_logprobs="learner"` (arXiv:2110.00641; as here in verl): weight(pi_old / pi_sampler) times the
  loss that clips pi / pi_old. The clip bounds the policy's own step, the weight answers for the sampler. pi_old is the
  learner's first pass over the batch; with several minibatches it costs one more forward pass of all samples.

Which to choose: none where engine and learner agree to rounding (float32, or kernels that give equal bits). In
bfloat16, replay experts first; then `token_tis`, and for long completions `sequence_mis` or `geometric_mask`, whose
bias does not grow with length. With several minibatches or a policy lag, add `off_policy_delta`.

A dropped token keeps its share of the loss's denominator, as in the estimators of the papers: its gradient is zero and
the others' does not change. Weights and masks carry no gradient.

Shape: N trained tokens; `samples_N` numbers the sample each belongs to, and a sample's tokens are all present.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpo.losses import sample_means, sample_sums

CorrectionKind = Literal["none", "token_tis", "token_mis", "sequence_tis", "sequence_mis", "geometric_mask"]


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Importance weights and masks for what the sampler's policy differs from the learner's."""

    kind: CorrectionKind = "none"
    """Weight of a token or sequence from pi_old / pi_sampler; see grpo/corrections.py for when to choose which."""
    low: float = 0.0
    """Quotients below it are dropped; `token_mis`, `sequence_mis` and `geometric_mask` only."""
    high: float = 2.0
    """Quotients above it are cut down to it (tis) or dropped (mis, mask): those of a token, of a whole sequence for
    `sequence_...`, or their geometric mean for `geometric_mask`, where 0.999 and 1.001 are usual."""
    old_logprobs: Literal["sampler", "learner"] = "sampler"
    """Whose probabilities the loss clips against: the engine's, or the learner's own before its first step."""
    off_policy_delta: float = 0.0
    """Sequences with a negative advantage whose mean log(pi_sampler / pi) exceeds it are dropped; 0 drops none."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"correction: need 0 <= low < high, got {self.low} and {self.high}")
        if not self.off_policy_delta >= 0:
            raise ValueError(f"correction: off_policy_delta must be >= 0, got {self.off_policy_delta}")
        if self.low and self.kind in ("none", "token_tis", "sequence_tis"):
            raise ValueError(f"correction: low={self.low} has no effect with kind {self.kind!r}; set it to 0")
        if self.kind not in ("none", "geometric_mask") and self.old_logprobs == "sampler":
            raise ValueError(
                f"correction: {self.kind!r} weighs tokens by pi_old / pi_sampler, which the clipped ratio already "
                "contains with old_logprobs 'sampler'; set old_logprobs to 'learner'"
            )

    @property
    def is_on(self) -> bool:
        return self.kind != "none" or self.off_policy_delta > 0

    def weights(
        self, logprobs_N: Tensor, old_N: Tensor, sampler_N: Tensor, advantages_N: Tensor, samples_N: Tensor
    ) -> Tensor:
        """[N] what each token's loss is multiplied by. `old_N` is the learner's, whatever the loss clips against."""
        log_ratios_N = old_N - sampler_N
        if self.kind == "token_tis":
            weights_N = token_tis(log_ratios_N, self.high)
        elif self.kind == "token_mis":
            weights_N = token_mis(log_ratios_N, self.low, self.high)
        elif self.kind == "sequence_tis":
            weights_N = sequence_tis(log_ratios_N, samples_N, self.high)
        elif self.kind == "sequence_mis":
            weights_N = sequence_mis(log_ratios_N, samples_N, self.low, self.high)
        elif self.kind == "geometric_mask":
            weights_N = geometric_mask(log_ratios_N, samples_N, self.low, self.high)
        else:
            weights_N = torch.ones_like(log_ratios_N)
        if self.off_policy_delta:
            delta = self.off_policy_delta
            weights_N = weights_N * off_policy_sequence_mask(logprobs_N, sampler_N, advantages_N, samples_N, delta)
        return weights_N


def token_tis(log_ratios_N: Tensor, high: float) -> Tensor:
    """Truncated importance weights min(rho_t, C), rho_t = pi_old / pi_sampler of one token (F. Yao et al., "Your
    efficient RL framework secretly brings you off-policy RL training", 2025)."""
    return log_ratios_N.exp().clamp(max=high)


def token_mis(log_ratios_N: Tensor, low: float, high: float) -> Tensor:
    """Masked importance weights rho_t 1[low <= rho_t <= high]: IcePop (arXiv:2510.18855), there with 0.5 and 5."""
    return _masked(log_ratios_N.exp(), low, high)


def sequence_tis(log_ratios_N: Tensor, samples_N: Tensor, high: float) -> Tensor:
    """min(rho, C) with rho = prod_t rho_t of the whole completion, for each of its tokens (J. Liu, Y. Li et al., "When
    speed kills stability", 2025)."""
    return sample_sums(log_ratios_N, samples_N).exp().clamp(max=high)


def sequence_mis(log_ratios_N: Tensor, samples_N: Tensor, low: float, high: float) -> Tensor:
    """rho 1[low <= rho <= high] with rho = prod_t rho_t (the same): what is far off is dropped, not kept at a cap."""
    return _masked(sample_sums(log_ratios_N, samples_N).exp(), low, high)


def geometric_mask(log_ratios_N: Tensor, samples_N: Tensor, low: float, high: float) -> Tensor:
    """1[low <= rho^(1/T) <= high] with T the completion's length (the same): a product over T tokens leaves any bounds
    as T grows, its geometric mean does not."""
    means_N = sample_means(log_ratios_N, samples_N)
    return ((means_N.exp() >= low) & (means_N.exp() <= high)).to(log_ratios_N.dtype)


def off_policy_sequence_mask(
    logprobs_N: Tensor, sampler_N: Tensor, advantages_N: Tensor, samples_N: Tensor, delta: float
) -> Tensor:
    """0 where the advantage is negative and mean_t log(pi_sampler / pi) > delta, else 1 (DeepSeek-V3.2,
    arXiv:2512.02556 section 3.1). pi is the learner now, so this counts numerics and staleness together."""
    means_N = sample_means(sampler_N - logprobs_N, samples_N)
    return 1 - ((advantages_N < 0) & (means_N > delta)).to(logprobs_N.dtype)


def _masked(ratios_N: Tensor, low: float, high: float) -> Tensor:
    # where() and not a product: a ratio that overflowed is inf, and inf * 0 is nan
    return torch.where((ratios_N >= low) & (ratios_N <= high), ratios_N, 0.0)
