"""How far the sampler's probabilities are from the learner's, measured on the tokens that were sampled.

Both claim to hold the same weights, so any difference is numerics, stale weights or another model.

    meter.add(learner_logprobs_N, sampling_logprobs_N)
    meter.report()      # {"mismatch/abs_mean": ..., "mismatch/abs_max": ..., "mismatch/kl": ...}
"""

from torch import Tensor


class MismatchMeter:
    """Accumulates over micro-batches; every token counts the same."""

    def __init__(self) -> None:
        self._tokens = 0
        self._abs_sum = self._abs_max = self._kl_sum = 0.0

    def add(self, learner_N: Tensor, sampler_N: Tensor) -> None:
        """Log-probabilities of the same sampled tokens, both at the sampling temperature."""
        assert learner_N.shape == sampler_N.shape, f"{learner_N.shape} and {sampler_N.shape}"
        difference_N = learner_N - sampler_N
        self._tokens += difference_N.numel()
        self._abs_sum += difference_N.abs().sum().item()
        self._abs_max = max(self._abs_max, difference_N.abs().max().item())
        self._kl_sum += (difference_N.exp() - difference_N - 1).sum().item()

    def report(self) -> dict[str, float]:
        """Mean and largest |difference|, and the k3 estimate of KL(sampler || learner) per token."""
        if not self._tokens:
            return {}
        return {
            "mismatch/abs_mean": self._abs_sum / self._tokens,
            "mismatch/abs_max": self._abs_max,
            "mismatch/kl": self._kl_sum / self._tokens,
        }
