"""The native engine: samples with the project's own model code, latent cache and absorbed attention.

Slower than vLLM at real sizes, but the learner's own numbers, with nothing to install: for machines without vLLM, for
tests, and to tell whether a difference is vLLM's or ours. A completion depends on its seed alone, up to float rounding
of its batch.
With `num_speculative_tokens` the model's prediction modules draft tokens (speculative.py): the same distribution in
fewer passes, though not the same completions for the same seeds.
"""

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from models import DeepseekV3ForCausalLM, SequenceLayout, hf_tensors, load_pretrained
from rollout.decoding import Decoder, PlainDecoder, Running
from rollout.engine import EngineConfig, check_prompt_lengths
from rollout.manifest import SyncError
from rollout.sample import Completion, CompletionGroup, Prompt, SamplingParams
from rollout.speculative import DraftCount, SpeculativeDecoder
from rollout.weight_receiver import Held, WeightReceiver


class ModelReceiver(WeightReceiver):
    """Receives weights into our own model, all of which can be read back."""

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        self.model = model
        self._targets = dict(hf_tensors(model))  # views: copying into them fills the stacked parameters
        shapes = {name: tensor.shape for name, tensor in self._targets.items()}
        super().__init__(shapes, model.lm_head.weight.device)
        self._held_dtypes = {name: {tensor.dtype} for name, tensor in self._targets.items()}

    def _load(self, tensors: list[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            if not tensor.is_floating_point() or tensor.itemsize < 2:
                raise SyncError(f"{name} has dtype {tensor.dtype}, floats of 16 bits or more are due")
            self._targets[name].copy_(tensor)

    def _held(self) -> Iterable[Held]:
        return [(name, "the model", tensor) for name, tensor in self._targets.items()]


class NativeEngine(ModelReceiver):
    """Implements `rollout.engine.Engine` in this process."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        super().__init__(load_pretrained(model, dtype=getattr(torch, config.dtype)))
        self.config = config
        self.max_model_len = min(config.max_model_len, self.model.config.max_position_embeddings)
        self._drafts = DraftCount()
        available = self.model.config.num_nextn_predict_layers
        if config.num_speculative_tokens > available:
            raise ValueError(
                f"num_speculative_tokens={config.num_speculative_tokens} needs as many prediction modules, {model} has "
                f"{available} (num_nextn_predict_layers); lower it, or train a model with more"
            )

    @property
    def draft_acceptance(self) -> float:
        """Share of speculative tokens that were accepted since the last change of weights; 0 without any."""
        return self._drafts.acceptance

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[CompletionGroup]:
        self.check_usable()
        check_prompt_lengths(prompts, self.max_model_len)
        per_batch = max(1, self.config.max_num_seqs // params.num_completions)
        groups: list[CompletionGroup] = []
        for start in range(0, len(prompts), per_batch):
            groups += self._generate_batch(prompts[start : start + per_batch], params)
        return groups

    def _generate_batch(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[CompletionGroup]:
        samples = [self._start(i, prompt, index, params)
                   for i, prompt in enumerate(prompts) for index in range(params.num_completions)]  # fmt: skip
        decoder = self._prefill(prompts, params)
        decoder.select(torch.tensor([sample.prompt for sample in samples]))
        active = samples
        while active:
            decoder.step(active)
            kept = [row for row, sample in enumerate(active) if sample.finish_reason is None]
            if len(kept) < len(active):
                decoder.select(torch.tensor(kept, dtype=torch.long))
                active = [active[row] for row in kept]
        return self._collect(prompts, samples)

    def _start(self, prompt_index: int, prompt: Prompt, index: int, params: SamplingParams) -> Running:
        seed = params.seed_of(prompt.id, index)
        budget = min(params.max_tokens, self.max_model_len - len(prompt.token_ids))
        return Running(prompt=prompt_index, seed=seed, budget=budget, draws=random.Random(seed))

    def _prefill(self, prompts: Sequence[Prompt], params: SamplingParams) -> Decoder:
        """Runs each prompt once, whatever the number of completions."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        room = min(longest + params.max_tokens, self.max_model_len)
        if num_drafts := self.config.num_speculative_tokens:
            return SpeculativeDecoder(self.model, prompts, params, room, num_drafts, self._drafts)
        return PlainDecoder(self.model, prompts, params, room)

    def _collect(self, prompts: Sequence[Prompt], samples: list[Running]) -> list[CompletionGroup]:
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
        self.check_usable()
        layout = SequenceLayout.from_lengths([len(sequence) for sequence in sequences])
        ids_T = torch.tensor([token for sequence in sequences for token in sequence])
        logprobs_TV = self.model.lm_head(self.model(ids_T, layout).hidden_TD).float().log_softmax(-1)
        logprobs_T = logprobs_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1).tolist()
        starts, ends = layout.offsets[:-1], layout.offsets[1:]
        return [logprobs_T[start : end - 1] for start, end in zip(starts, ends, strict=True)]

    def _end_load(self) -> None:
        self._drafts = DraftCount()

    def close(self) -> None:
        del self.model, self._targets
