"""Completions while they are sampled, how a token is drawn, and the plain decoder: one pass of the model per token.

Shapes: B sequences being decoded, T packed prompt tokens, D hidden, V vocabulary, L layers with experts, K experts per
token, J kept tokens, X any leading dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import DeepseekV3ForCausalLM, LatentCache, SequenceLayout
from rollout.router_replay import pack_ids
from rollout.sample import FinishReason, SamplingParams
from rollout.stream import Request

_BLOCK = 512


@dataclass
class Running:
    """A completion while it is being sampled."""

    request: Request
    budget: int
    """Tokens the completion may grow to in total."""
    token_ids: list[int]
    """All of the completion, those sampled before a pause included."""
    logprobs: list[float]
    """[L'] of the tokens sampled since."""
    kept: list[np.ndarray] = field(default_factory=list)
    """[L'] the tokens from which each was drawn, as `Completion.kept_ids`; none if from all."""
    experts: list[np.ndarray] = field(default_factory=list)
    """[tokens, L, K] pieces: the context's experts, and those of each token sampled since but the newest."""
    finish_reason: FinishReason | None = None

    def append(self, token: int, logprob: float, params: SamplingParams) -> None:
        assert self.finish_reason is None, "a finished completion does not grow"
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token == params.stop_token_id:
            self.finish_reason = FinishReason.STOP
        elif token in params.turn_token_ids:
            self.finish_reason = FinishReason.PAUSED
        elif len(self.token_ids) == self.budget:
            self.finish_reason = FinishReason.LENGTH

    def expert_ids(self) -> np.ndarray | None:
        """As `Completion.expert_ids`."""
        return np.concatenate(self.experts) if self.experts else None


class Decoder(Protocol):
    """Continues a batch; rows are in the order of the samples it is given."""

    context_experts: list[list[np.ndarray]]
    """What each context adds to `Running.experts`: one piece, or none in a model without experts."""

    def step(self, active: Sequence[Running]) -> None:
        """Grows every sample by at least one token, none of them finished."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order; a row may be named several times."""
        ...

    def join(self, other: Self) -> None:
        """Puts the rows of another decoder behind these; both have done a step."""
        ...


def log_distribution(head: nn.Linear, hidden_XD: Tensor, params: SamplingParams) -> Tensor:
    """[..., V] float32 log-probabilities, which are what is recorded: at the temperature, or at 1 where that is 0, and
    of what top_k and top_p keep."""
    logprobs_XV = (head(hidden_XD).float() / (params.temperature or 1.0)).log_softmax(-1)
    return restricted(logprobs_XV, params.top_k, params.top_p) if params.is_restricted else logprobs_XV


def restricted(logprobs_XV: Tensor, top_k: int, top_p: float) -> Tensor:
    """The `top_k` most probable tokens (0 for all), of those the fewest that together have `top_p`, normalized again;
    -inf elsewhere. What equals the k-th stays, as in vLLM."""
    if 0 < top_k < logprobs_XV.shape[-1]:
        kth_X1 = logprobs_XV.topk(top_k).values[..., -1:]
        logprobs_XV = logprobs_XV.masked_fill(logprobs_XV < kth_X1, -torch.inf).log_softmax(-1)
    if top_p < 1:
        sorted_XV, order_XV = logprobs_XV.sort(descending=True, stable=True)
        mass_XV = sorted_XV.exp()
        is_beyond_XV = mass_XV.cumsum(-1) - mass_XV >= top_p
        is_beyond_XV[..., 0] = False  # the sum before the first is 0, but for rounding
        dropped_XV = torch.zeros_like(is_beyond_XV).scatter(-1, order_XV, is_beyond_XV)
        logprobs_XV = logprobs_XV.masked_fill(dropped_XV, -torch.inf).log_softmax(-1)
    return logprobs_XV


def kept_tokens(logprobs_NV: Tensor) -> list[np.ndarray]:
    """The tokens that each row keeps, as `Completion.kept_ids`."""
    rows_J, ids_J = (logprobs_NV > -torch.inf).nonzero(as_tuple=True)
    counts_N = rows_J.bincount(minlength=len(logprobs_NV))
    return np.split(ids_J.cpu().numpy().astype(np.int32), counts_N.cumsum(0).cpu().numpy()[:-1])


def probabilities(logprobs_XV: Tensor, temperature: float) -> Tensor:
    """[..., V] float64, what is drawn from: at temperature 0 the most probable token alone, the first of equals.

    They sum to 1 as well as float32 log-probabilities do; `choose` draws in proportion.
    """
    if temperature == 0:
        return F.one_hot(logprobs_XV.argmax(-1), logprobs_XV.shape[-1]).double()
    return logprobs_XV.double().exp()


def choose(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """[B] ids in proportion to the weights: inverts the distribution function at numbers from [0, 1), float64.

    First among blocks of ids, by their sums, then within the block: running sums in float64 over a whole vocabulary
    would take longer on a GPU than the rest of sampling. An id without weight is never chosen.
    """
    padding = -weights_BV.shape[1] % _BLOCK
    blocks_BGX = (F.pad(weights_BV, (0, padding)) if padding else weights_BV).unflatten(1, (-1, _BLOCK))
    sums_BG = blocks_BGX.sum(-1, dtype=torch.float64)
    ends_BG = sums_BG.cumsum(-1)
    marks_B1 = uniforms_B[:, None] * _just_below(ends_BG[:, -1:])
    block_B1 = torch.searchsorted(ends_BG, marks_B1, right=True)
    block_BX = blocks_BGX[torch.arange(len(blocks_BGX), device=block_B1.device), block_B1[:, 0]]
    ends_BX = block_BX.cumsum(-1, dtype=torch.float64)
    # Rounding may lead out of the block on either side.
    marks_B1 = (marks_B1 - (ends_BG - sums_BG).gather(1, block_B1)).clamp(min=0)
    place_B1 = torch.searchsorted(ends_BX, marks_B1.minimum(_just_below(ends_BX[:, -1:])), right=True)
    return place_B1.add(block_B1, alpha=_BLOCK).squeeze(1)


def _just_below(sums: Tensor) -> Tensor:
    """Less than each positive sum by at least its rounding, so that something lies above it; float64."""
    return sums * (1 - 2**-52)


def uniforms(seeds: Sequence[int] | np.ndarray, places: Sequence[int] | np.ndarray, count: int) -> Tensor:
    """[B, count] numbers from [0, 1), float64, that depend on each row's seed and place alone.

    A counter in place of a generator's state: row b is drawn from stream `seeds[b]` for token `places[b]` of its
    completion, whatever was drawn before, so a paused completion goes on where it stopped. SplitMix64 (Steele, Lea and
    Flood, OOPSLA 2014); a stream's numbers are 2^-53 apart.
    """
    counters_BX = np.array(places, dtype=np.uint64)[:, None] * np.uint64(64) + np.arange(count, dtype=np.uint64)
    starts_B1 = _mix64(np.array(seeds, dtype=np.uint64))[:, None]
    bits_BX = _mix64(starts_B1 + counters_BX * np.uint64(0x9E3779B97F4A7C15))
    return torch.from_numpy((bits_BX >> np.uint64(11)) * 2.0**-53)


def _mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def next_uniforms(active: Sequence[Running], count: int) -> Tensor:
    """[B, count] what each sample draws its next token or tokens from."""
    return uniforms([sample.request.seed for sample in active], [len(sample.token_ids) for sample in active], count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """What running each context once gives."""

    ids_T: Tensor
    hidden_TD: Tensor
    layout: SequenceLayout
    cache: LatentCache
    experts: list[list[np.ndarray]]
    """As `Decoder.context_experts`."""


def prefill(model: DeepseekV3ForCausalLM, contexts: Sequence[Sequence[int]], room: int) -> Prefill:
    """Runs each context once, into a cache of `room` tokens per context."""
    layout = SequenceLayout.from_lengths([len(context) for context in contexts])
    head = model.lm_head.weight
    cache = LatentCache(model.config, len(contexts), room, dtype=head.dtype, device=head.device)
    ids_T = torch.tensor([token for context in contexts for token in context])
    output = model(ids_T, layout, cache)
    ids_TLK = pack_ids(output.expert_ids, model.config.n_routed_experts)
    pieces = [] if ids_TLK is None else np.split(ids_TLK, layout.offsets[1:-1])
    experts = [[piece] for piece in pieces] or [[] for _ in contexts]
    return Prefill(ids_T=ids_T, hidden_TD=output.hidden_TD, layout=layout, cache=cache, experts=experts)


class PlainDecoder:
    """One token per step and sample."""

    def __init__(
        self, model: DeepseekV3ForCausalLM, contexts: Sequence[Sequence[int]], params: SamplingParams, room: int
    ) -> None:
        self.model = model
        self.params = params
        start = prefill(model, contexts, room)
        self.cache, self.context_experts = start.cache, start.experts
        self.hidden_BD = start.hidden_TD[torch.tensor(start.layout.offsets[1:]) - 1]
        self.is_ahead = True  # whether hidden_BD has already seen each sample's last token

    def step(self, active: Sequence[Running]) -> None:
        if not self.is_ahead:
            last_B = torch.tensor([sample.token_ids[-1] for sample in active])
            output = self.model.decode(last_B, self.cache)
            self.hidden_BD = output.hidden_TD
            ids_BLK = pack_ids(output.expert_ids, self.model.config.n_routed_experts)
            if ids_BLK is not None:
                for row, sample in enumerate(active):
                    sample.experts.append(ids_BLK[row : row + 1])
        temperature = self.params.temperature
        logprobs_BV = log_distribution(self.model.lm_head, self.hidden_BD, self.params)
        ids_B = choose(probabilities(logprobs_BV, temperature), next_uniforms(active, 1).squeeze(1))
        logprobs_B = logprobs_BV.gather(1, ids_B[:, None]).squeeze(1)
        for sample, token, logprob in zip(active, ids_B.tolist(), logprobs_B.tolist(), strict=True):
            sample.append(token, logprob, self.params)
        if self.params.is_restricted:
            for sample, ids in zip(active, kept_tokens(logprobs_BV), strict=True):
                sample.kept.append(ids)
        self.is_ahead = False

    def select(self, rows: Tensor) -> None:
        self.hidden_BD = self.hidden_BD[rows]
        self.cache.select(rows)

    def join(self, other: "PlainDecoder") -> None:
        assert not self.is_ahead and not other.is_ahead, "a decoder's hidden states are of one kind"
        self.hidden_BD = torch.cat([self.hidden_BD, other.hidden_BD])
        self.cache.join(other.cache)
