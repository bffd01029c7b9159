"""Training samples and how they are packed into micro-batches of tensors.

Each token's loss weight is divided by the denominator of the whole global batch before packing, so the gradient does
not depend on how samples fall into micro-batches.

Shapes: T packed tokens, N trained tokens (those with a loss), L tokens of one sample.

    micro_batches = pack(samples, token_budget=8192, aggregation="token")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models import SequenceLayout

Aggregation = Literal["token", "sequence"]
"""How token losses become one number: mean over all trained tokens (DAPO, arXiv:2503.14476), or mean over each
sample's tokens, then over samples (GRPO, arXiv:2402.03300 eq. 3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSample:
    """One sequence with what the loss needs; plain lists until packing."""

    token_ids: Sequence[int]
    """[L] prompt and completion."""
    loss_mask: Sequence[bool]
    """[L] True on tokens to train; never on the first, which nothing predicts."""
    sampling_logprobs: Sequence[float]
    """[L] log-probability with which the engine sampled each token, at `temperature`; 0.0 on prompt tokens."""
    advantage: float = 1.0
    """Of the whole completion, from its group."""
    temperature: float = 1.0
    """Logits are divided by it, in the engine and in the learner."""

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.loss_mask), len(self.sampling_logprobs)}
        assert len(lengths) == 1, f"token_ids, loss_mask and sampling_logprobs differ in length: {sorted(lengths)}"
        assert not self.loss_mask[0], "the first token has nothing before it to be predicted from"

    @property
    def num_trained(self) -> int:
        return sum(self.loss_mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Packed tensors of several samples: what one forward and backward pass takes."""

    ids_T: Tensor
    """[T] token ids, samples end to end."""
    layout: SequenceLayout
    """Where each sample stands."""
    predictors_N: Tensor
    """[N] index into T of the token whose hidden state predicts each trained token."""
    targets_N: Tensor
    """[N] the trained tokens."""
    sampling_logprobs_N: Tensor
    """[N] as recorded by the engine."""
    advantages_N: Tensor
    """[N] the advantage of the sample that each token belongs to."""
    temperatures_N: Tensor
    """[N] sampling temperature."""
    weights_N: Tensor
    """[N] loss weights; they sum to 1 over all micro-batches of a global batch."""


def pack(samples: Sequence[TrainingSample], token_budget: int, aggregation: Aggregation) -> list[MicroBatch]:
    """Splits a global batch into micro-batches of at most `token_budget` tokens.

    Samples are laid out longest first, so that a micro-batch holds samples of similar length. Raises ValueError if one
    sample alone exceeds the budget, or if nothing is to be trained.
    """
    samples = [sample for sample in samples if sample.num_trained]
    if not samples:
        raise ValueError("no sample has a token to train")
    longest = max(len(sample.token_ids) for sample in samples)
    if longest > token_budget:
        raise ValueError(f"a sample of {longest} tokens exceeds token_budget={token_budget}; raise the budget")
    weights = _token_weights(samples, aggregation)
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].token_ids))
    groups: list[list[int]] = [[]]
    used = 0
    for i in order:
        length = len(samples[i].token_ids)
        if used + length > token_budget:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += length
    return [_build([samples[i] for i in group], [weights[i] for i in group]) for group in groups]


def _token_weights(samples: Sequence[TrainingSample], aggregation: Aggregation) -> list[float]:
    """The weight of each trained token of each sample; over the whole batch they sum to 1."""
    if aggregation == "token":
        total = sum(sample.num_trained for sample in samples)
        return [1 / total] * len(samples)
    return [1 / (len(samples) * sample.num_trained) for sample in samples]


def _build(samples: Sequence[TrainingSample], weights: Sequence[float]) -> MicroBatch:
    ids: list[int] = []
    mask: list[bool] = []
    logprobs: list[float] = []
    for sample in samples:
        ids += sample.token_ids
        mask += sample.loss_mask
        logprobs += sample.sampling_logprobs
    trained_N = torch.tensor(mask).nonzero().squeeze(1)
    counts = torch.tensor([sample.num_trained for sample in samples])

    def per_token(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)

    ids_T = torch.tensor(ids)
    return MicroBatch(
        ids_T=ids_T,
        layout=SequenceLayout.from_lengths([len(sample.token_ids) for sample in samples]),
        predictors_N=trained_N - 1,
        targets_N=ids_T[trained_N],
        sampling_logprobs_N=torch.tensor(logprobs)[trained_N],
        advantages_N=per_token([sample.advantage for sample in samples]),
        temperatures_N=per_token([sample.temperature for sample in samples]),
        weights_N=per_token(weights),
    )
