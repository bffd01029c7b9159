"""The native engine: samples with the project's own model code, latent cache and absorbed attention.

Slower than vLLM, but the learner's own numbers, with nothing to install: for machines without vLLM, for tests, and to
tell whether a difference is vLLM's or ours. A completion depends on its seed alone, up to float rounding of its batch.

Shapes: B sequences being decoded, V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models import LatentCache, SequenceLayout, load_hf_tensors, load_pretrained
from rollout.engine import EngineConfig, WeightStream, check_prompt_lengths
from rollout.sample import Completion, CompletionGroup, FinishReason, Prompt, SamplingParams


@dataclass
class _Running:
    """A completion while it is being sampled."""

    prompt: int
    """Index into the prompts."""
    seed: int
    budget: int
    """Tokens it may still grow to in total."""
    draws: random.Random
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class NativeEngine:
    """Implements `rollout.engine.Engine` in this process."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        self.config = config
        self.version = 0
        self.model = load_pretrained(model, dtype=getattr(torch, config.dtype))
        self.max_model_len = min(config.max_model_len, self.model.config.max_position_embeddings)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[CompletionGroup]:
        check_prompt_lengths(prompts, self.max_model_len)
        per_batch = max(1, self.config.max_num_seqs // params.num_completions)
        groups: list[CompletionGroup] = []
        for start in range(0, len(prompts), per_batch):
            groups += self._generate_batch(prompts[start : start + per_batch], params)
        return groups

    def _generate_batch(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[CompletionGroup]:
        samples = [self._start(i, prompt, index, params)
                   for i, prompt in enumerate(prompts) for index in range(params.num_completions)]  # fmt: skip
        hidden_BD, cache = self._prefill(prompts, params)
        rows = torch.tensor([sample.prompt for sample in samples])
        hidden_BD = hidden_BD[rows]
        cache.select(rows)
        active = samples
        while True:
            next_ids = self._sample(self.model.lm_head(hidden_BD).float(), active, params)
            kept = [row for row, sample in enumerate(active) if sample.finish_reason is None]
            if not kept:
                break
            if len(kept) < len(active):
                active = [active[row] for row in kept]
                next_ids = [next_ids[row] for row in kept]
                cache.select(torch.tensor(kept))
            hidden_BD = self.model.decode(torch.tensor(next_ids), cache).hidden_TD
        return self._collect(prompts, samples)

    def _start(self, prompt_index: int, prompt: Prompt, index: int, params: SamplingParams) -> _Running:
        seed = params.seed_of(prompt.id, index)
        budget = min(params.max_tokens, self.max_model_len - len(prompt.token_ids))
        return _Running(prompt=prompt_index, seed=seed, budget=budget, draws=random.Random(seed))

    def _prefill(self, prompts: Sequence[Prompt], params: SamplingParams) -> tuple[Tensor, LatentCache]:
        """Runs each prompt once, whatever the number of completions; the hidden state of its last token, and the
        cache.
        """
        layout = SequenceLayout.from_lengths([len(prompt.token_ids) for prompt in prompts])
        room = min(max(layout.lengths) + params.max_tokens, self.max_model_len)
        head = self.model.lm_head.weight
        cache = LatentCache(self.model.config, len(prompts), room, dtype=head.dtype, device=head.device)
        ids_T = torch.tensor([token for prompt in prompts for token in prompt.token_ids])
        hidden_TD = self.model(ids_T, layout, cache).hidden_TD
        return hidden_TD[torch.tensor(layout.offsets[1:]) - 1], cache

    def _sample(self, logits_BV: Tensor, active: list[_Running], params: SamplingParams) -> list[int]:
        """Draws one token per sequence: inverts the distribution function at the sample's own next random number."""
        logprobs_BV = (logits_BV / (params.temperature or 1.0)).log_softmax(-1)
        if params.temperature == 0:
            ids_B = logits_BV.argmax(-1)
        else:
            cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
            draws_B = torch.tensor([sample.draws.random() for sample in active], dtype=torch.float64)
            ids_B = torch.searchsorted(cumulative_BV, (draws_B * cumulative_BV[:, -1])[:, None], right=True).squeeze(1)
            ids_B = ids_B.clamp(max=logits_BV.shape[1] - 1)
        ids = ids_B.tolist()
        logprobs = logprobs_BV.gather(1, ids_B[:, None]).squeeze(1).tolist()
        for sample, token, logprob in zip(active, ids, logprobs, strict=True):
            sample.token_ids.append(token)
            sample.logprobs.append(logprob)
            if token == params.stop_token_id:
                sample.finish_reason = FinishReason.STOP
            elif len(sample.token_ids) == sample.budget:
                sample.finish_reason = FinishReason.LENGTH
        return ids

    def _collect(self, prompts: Sequence[Prompt], samples: list[_Running]) -> list[CompletionGroup]:
        completions: list[list[Completion]] = [[] for _ in prompts]
        for sample in samples:
            assert sample.finish_reason is not None
            completions[sample.prompt].append(
                Completion(
                    token_ids=sample.token_ids,
                    logprobs=sample.logprobs,
                    finish_reason=sample.finish_reason,
                    policy_version=self.version,
                    seed=sample.seed,
                )
            )
        return [CompletionGroup(prompt=p, completions=c) for p, c in zip(prompts, completions, strict=True)]

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        layout = SequenceLayout.from_lengths([len(sequence) for sequence in sequences])
        ids_T = torch.tensor([token for sequence in sequences for token in sequence])
        logprobs_TV = self.model.lm_head(self.model(ids_T, layout).hidden_TD).float().log_softmax(-1)
        logprobs_T = logprobs_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1).tolist()
        starts, ends = layout.offsets[:-1], layout.offsets[1:]
        return [logprobs_T[start : end - 1] for start, end in zip(starts, ends, strict=True)]

    def load_weights(self, weights: WeightStream, version: int) -> None:
        load_hf_tensors(self.model, weights, source=f"weights of version {version}")
        self.version = version

    def close(self) -> None:
        del self.model
