"""Completions while they are sampled, how a token is drawn, and the plain decoder: one pass of the model per token.

Shapes: B sequences being decoded, T packed prompt tokens, D hidden, V vocabulary, L layers with experts, K experts per
token, X any leading dimensions.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import DeepseekV3ForCausalLM, LatentCache, SequenceLayout
from rollout.router_replay import pack_ids
from rollout.sample import FinishReason, Prompt, SamplingParams


@dataclass
class Running:
    """A completion while it is being sampled."""

    prompt: int
    """Index into the prompts."""
    seed: int
    budget: int
    """Tokens it may still grow to in total."""
    draws: random.Random
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)
    """[tokens, L, K] pieces: the prompt's experts, and those of each token sampled so far but the newest."""
    finish_reason: FinishReason | None = None

    def append(self, token: int, logprob: float, stop_token_id: int) -> None:
        assert self.finish_reason is None, "a finished completion does not grow"
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token == stop_token_id:
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) == self.budget:
            self.finish_reason = FinishReason.LENGTH

    def expert_ids(self) -> np.ndarray | None:
        """As `Completion.expert_ids`."""
        return np.concatenate(self.experts) if self.experts else None


class Decoder(Protocol):
    """Continues a batch; rows are in the order of the samples it is given."""

    prompt_experts: list[list[np.ndarray]]
    """What each prompt adds to `Running.experts`: one piece, or none in a model without experts."""

    def step(self, active: Sequence[Running]) -> None:
        """Grows every sample by at least one token, none of them finished."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order; a row may be named several times."""
        ...


def log_distribution(head: nn.Linear, hidden_XD: Tensor, temperature: float) -> Tensor:
    """[..., V] float32 log-probabilities, which are what is recorded: at `temperature`, or at 1 where that is 0."""
    return (head(hidden_XD).float() / (temperature or 1.0)).log_softmax(-1)


def probabilities(logprobs_XV: Tensor, temperature: float) -> Tensor:
    """[..., V] float64, what is drawn from: at temperature 0 the most probable token alone, the first of equals.

    They sum to 1 as well as float32 log-probabilities do; `choose` draws in proportion.
    """
    if temperature == 0:
        return F.one_hot(logprobs_XV.argmax(-1), logprobs_XV.shape[-1]).double()
    return logprobs_XV.double().exp()


def choose(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """[B] ids in proportion to the weights: inverts the distribution function at numbers from [0, 1), float64."""
    cumulative_BV = weights_BV.cumsum(-1)
    thresholds_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    ids_B = torch.searchsorted(cumulative_BV, thresholds_B1, right=True).squeeze(1)
    return ids_B.clamp(max=weights_BV.shape[1] - 1)


def uniforms(active: Sequence[Running], count: int, temperature: float) -> Tensor:
    """[B, count] each sample's own next random numbers, float64; zeros at temperature 0, which draws none."""
    if temperature == 0:
        return torch.zeros(len(active), count, dtype=torch.float64)
    return torch.tensor([[sample.draws.random() for _ in range(count)] for sample in active], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """What running each prompt once gives."""

    ids_T: Tensor
    hidden_TD: Tensor
    layout: SequenceLayout
    cache: LatentCache
    experts: list[list[np.ndarray]]
    """As `Decoder.prompt_experts`."""


def prefill(model: DeepseekV3ForCausalLM, prompts: Sequence[Prompt], room: int) -> Prefill:
    """Runs each prompt once, into a cache of `room` tokens per prompt."""
    layout = SequenceLayout.from_lengths([len(prompt.token_ids) for prompt in prompts])
    head = model.lm_head.weight
    cache = LatentCache(model.config, len(prompts), room, dtype=head.dtype, device=head.device)
    ids_T = torch.tensor([token for prompt in prompts for token in prompt.token_ids])
    output = model(ids_T, layout, cache)
    ids_TLK = pack_ids(output.expert_ids, model.config.n_routed_experts)
    pieces = [] if ids_TLK is None else np.split(ids_TLK, layout.offsets[1:-1])
    experts = [[piece] for piece in pieces] or [[] for _ in prompts]
    return Prefill(ids_T=ids_T, hidden_TD=output.hidden_TD, layout=layout, cache=cache, experts=experts)


class PlainDecoder:
    """One token per step and sample."""

    def __init__(
        self, model: DeepseekV3ForCausalLM, prompts: Sequence[Prompt], params: SamplingParams, room: int
    ) -> None:
        self.model = model
        self.params = params
        start = prefill(model, prompts, room)
        self.cache, self.prompt_experts = start.cache, start.experts
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
        logprobs_BV = log_distribution(self.model.lm_head, self.hidden_BD, temperature)
        draws_B = uniforms(active, 1, temperature).squeeze(1)
        ids_B = choose(probabilities(logprobs_BV, temperature), draws_B)
        logprobs_B = logprobs_BV.gather(1, ids_B[:, None]).squeeze(1)
        for sample, token, logprob in zip(active, ids_B.tolist(), logprobs_B.tolist(), strict=True):
            sample.append(token, logprob, self.params.stop_token_id)
        self.is_ahead = False

    def select(self, rows: Tensor) -> None:
        self.hidden_BD = self.hidden_BD[rows]
        self.cache.select(rows)
