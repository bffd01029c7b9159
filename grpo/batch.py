"""Training samples, and the micro-batches of tensors that they are packed into (packing.py).

Shapes: T packed tokens, W tokens of whole samples (more than T where prompts are shared), N trained tokens (those with
a loss), L layers with experts, K experts per token; for a list, L is the tokens of one sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from grpo.logprobs import KeptTokens
from models import SequenceLayout
from models.moves import moved
from rollout.router_replay import is_recorded

Aggregation = Literal["token", "sequence", "constant"]
"""How token losses become one number: mean over all trained tokens (DAPO, arXiv:2503.14476); mean over each sample's
tokens, then over samples (GRPO, arXiv:2402.03300 eq. 3); or each sample's sum divided by a constant length, then the
mean over samples (Dr. GRPO, arXiv:2503.20783)."""


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
    token_advantages: Sequence[float] | None = None
    """[L] in place of `advantage` where tokens differ (process supervision); 0.0 on tokens that are not trained."""
    temperature: float = 1.0
    """Logits are divided by it, in the engine and in the learner."""
    expert_ids: np.ndarray | None = field(default=None, compare=False, repr=False)
    """[L - 1, layers with experts, K] as recorded by the engine, see rollout/router_replay.py; None if not recorded."""
    policy_lags: Sequence[int] | None = None
    """[L] by how many versions the weights that sampled each token were older than those that the step begins with;
    None for nought throughout."""
    kept_ids: np.ndarray | None = field(default=None, compare=False, repr=False)
    """[J] the tokens from which those of the sample were drawn, end to end, as recorded under top_k and top_p; None for
    the whole vocabulary throughout."""
    kept_counts: Sequence[int] | None = None
    """[L] how many of `kept_ids` belong to each token; 0 for the whole vocabulary."""
    old_logprobs: Sequence[float] | None = None
    """[L] as the learner saw them before its first step on the batch, filled in by `Learner.with_old_logprobs`."""

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.loss_mask), len(self.sampling_logprobs)}
        assert len(lengths) == 1, f"token_ids, loss_mask and sampling_logprobs differ in length: {sorted(lengths)}"
        if self.token_advantages is not None:
            assert len(self.token_advantages) in lengths, (
                f"{len(self.token_advantages)} advantages for {lengths} tokens"
            )
        assert not self.loss_mask[0], "the first token has nothing before it to be predicted from"
        rows = len(self.token_ids) - 1 if self.expert_ids is None else len(self.expert_ids)
        assert rows == len(self.token_ids) - 1, (
            f"experts of {rows} tokens for {len(self.token_ids)}; the last never ran"
        )

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What stands before the first trained token."""
        return tuple(self.token_ids[: self.loss_mask.index(True)])

    @property
    def num_trained(self) -> int:
        return sum(self.loss_mask)

    @property
    def trained_advantages(self) -> list[float]:
        """Of the trained tokens, in order."""
        if self.token_advantages is None:
            return [self.advantage] * self.num_trained
        return [a for a, is_trained in zip(self.token_advantages, self.loss_mask, strict=True) if is_trained]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTotals:
    """Counts of a global batch, the denominators of its loss: of all micro-batches, on whatever rank they are."""

    samples: int
    """With a trained token."""
    tokens: int
    """Trained ones."""
    positive_tokens: int
    """Trained ones with an advantage above 0."""

    @classmethod
    def of(cls, samples: Sequence[TrainingSample]) -> "BatchTotals":
        counts = [sample.num_trained for sample in samples if sample.num_trained]
        positive = sum(advantage > 0 for sample in samples for advantage in sample.trained_advantages)
        return cls(samples=len(counts), tokens=sum(counts), positive_tokens=positive)


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
    """[N] the advantage of each token."""
    temperatures_N: Tensor
    """[N] sampling temperature."""
    weights_N: Tensor
    """[N] loss weights; they sum to `weight_sum` over all micro-batches of a global batch."""
    weight_sum: float
    """1, but for aggregation "constant": there the mean length as a share of the constant one."""
    totals: BatchTotals
    """Of the global batch."""
    samples_N: Tensor
    """[N] place of the sample that each token belongs to among those that were packed."""
    lags_N: Tensor
    """[N] policy lag of each token."""
    old_logprobs_N: Tensor | None
    """[N] the learner's own before its first step; None where no sample has them."""
    kept: KeptTokens | None
    """What each trained token was drawn from; None where that is the whole vocabulary for all."""
    expert_ids_TLK: Tensor | None
    """[T, L, K] int16, recorded experts; -1 in rows without a recording; None where no sample has one."""

    def to(self, device: torch.device) -> "MicroBatch":
        return moved(self, device)


def build_micro_batch(
    samples: Sequence[TrainingSample],
    weights: Sequence[float],
    places: Sequence[int],
    weight_sum: float,
    totals: BatchTotals,
    *,
    share_prompts: bool,
) -> MicroBatch:
    """With `share_prompts`, equal prompts are computed once. Their recorded experts are those of the first sample: a
    sampler that computes a prompt again for each completion may round, and route, it otherwise."""
    ids: list[int] = []
    mask: list[bool] = []
    logprobs: list[float] = []
    lags: list[int] = []
    for sample in samples:
        ids += sample.token_ids
        mask += sample.loss_mask
        logprobs += sample.sampling_logprobs
        lags += [0] * len(sample.token_ids) if sample.policy_lags is None else sample.policy_lags
    trained_N = torch.tensor(mask).nonzero().squeeze(1)
    counts = torch.tensor([sample.num_trained for sample in samples])

    def per_token(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(counts)

    ids_W, experts_WLK = torch.tensor(ids), _pack_experts(samples)
    layout = SequenceLayout.from_lengths(
        [len(sample.token_ids) for sample in samples], shared=_equal_prompts(samples) if share_prompts else ()
    )
    return MicroBatch(
        ids_T=layout.computed(ids_W),
        layout=layout,
        predictors_N=layout.tokens_at(trained_N - 1),
        targets_N=ids_W[trained_N],
        sampling_logprobs_N=torch.tensor(logprobs)[trained_N],
        advantages_N=torch.tensor([advantage for sample in samples for advantage in sample.trained_advantages]),
        temperatures_N=per_token([sample.temperature for sample in samples]),
        weights_N=per_token(weights),
        weight_sum=weight_sum,
        totals=totals,
        samples_N=per_token(places, torch.long),
        lags_N=torch.tensor(lags)[trained_N],
        old_logprobs_N=_old_logprobs(samples, trained_N),
        kept=_pack_kept(samples),
        expert_ids_TLK=None if experts_WLK is None else layout.computed(experts_WLK),
    )


def _equal_prompts(samples: Sequence[TrainingSample]) -> list[tuple[int, int]]:
    """For each sample the first with its prompt and the prompt's length, 0 if it is that one itself."""
    first: dict[tuple[int, ...], int] = {}
    prompts = [sample.prompt_ids for sample in samples]
    owners = [first.setdefault(prompt, number) for number, prompt in enumerate(prompts)]
    return [
        (owner, len(prompt) if owner < number else 0)
        for number, (owner, prompt) in enumerate(zip(owners, prompts, strict=True))
    ]


def _old_logprobs(samples: Sequence[TrainingSample], trained_N: Tensor) -> Tensor | None:
    given = [sample.old_logprobs for sample in samples if sample.old_logprobs is not None]
    assert len(given) in (0, len(samples)), "either all samples of a batch have old_logprobs or none"
    return torch.tensor([logprob for logprobs in given for logprob in logprobs])[trained_N] if given else None


def _pack_kept(samples: Sequence[TrainingSample]) -> KeptTokens | None:
    rows: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    first = 0
    for sample in samples:
        if sample.kept_ids is not None and sample.kept_counts is not None:
            mask_L, counts_L = np.array(sample.loss_mask), np.array(sample.kept_counts)
            is_trained_J = np.repeat(mask_L, counts_L)
            rows.append(np.repeat(first + mask_L.cumsum() - 1, counts_L)[is_trained_J])
            ids.append(sample.kept_ids[is_trained_J].astype(np.int64))
        first += sample.num_trained
    if not ids:
        return None
    return KeptTokens(rows_J=torch.from_numpy(np.concatenate(rows)), ids_J=torch.from_numpy(np.concatenate(ids)))


def _pack_experts(samples: Sequence[TrainingSample]) -> Tensor | None:
    """Recorded experts of all samples, [W, L, K] with -1 for what was not recorded; None if nothing was."""
    shapes = {sample.expert_ids.shape[1:] for sample in samples if sample.expert_ids is not None}
    if not shapes:
        return None
    assert len(shapes) == 1, f"samples with experts of different models: [layers, K] are {sorted(shapes)}"
    packed_WLK = np.full((sum(len(sample.token_ids) for sample in samples), *shapes.pop()), -1, np.int16)
    start = 0
    for sample in samples:
        if sample.expert_ids is not None:
            ids = np.where(is_recorded(sample.expert_ids)[..., None], sample.expert_ids.astype(np.int16), -1)
            packed_WLK[start : start + len(ids)] = ids
        start += len(sample.token_ids)
    return torch.from_numpy(packed_WLK)
