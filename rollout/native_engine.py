"""The native engine: samples with the project's own model code, latent cache and absorbed attention.

Slower than vLLM at real sizes, but the learner's own numbers, with nothing to install: for machines without vLLM, for
tests, and to tell whether a difference is vLLM's or ours. A completion depends on its seed alone, up to float rounding
of its batch.
With `num_speculative_tokens` the model's prediction modules draft tokens (speculative.py): the same distribution in
fewer passes, though not the same completions for the same seeds.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from models import DeepseekV3ForCausalLM, SequenceLayout, hf_tensors, load_pretrained
from rollout.decoding import Decoder, PlainDecoder, Running
from rollout.engine import Engine, EngineConfig, check_prompt_lengths
from rollout.manifest import SyncError
from rollout.sample import FinishReason, SamplingParams
from rollout.speculative import DraftCount, SpeculativeDecoder
from rollout.stream import Request, Sampled, outcome
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


class NativeEngine(ModelReceiver, Engine):
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

    def start_batch(self, params: SamplingParams) -> "NativeBatch":
        return NativeBatch(self, params)

    def prefill(self, contexts: Sequence[Sequence[int]], params: SamplingParams, room: int) -> Decoder:
        """A decoder that has seen each context, with room for that many tokens in each row."""
        if num_drafts := self.config.num_speculative_tokens:
            return SpeculativeDecoder(self.model, contexts, params, room, num_drafts, self._drafts)
        return PlainDecoder(self.model, contexts, params, room)

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


class NativeBatch:
    """Implements `rollout.engine.Batch`. What is admitted takes its first step alone and then joins the others."""

    def __init__(self, engine: NativeEngine, params: SamplingParams) -> None:
        self._engine, self._params = engine, params
        self._active: list[Running] = []
        self._decoder: Decoder | None = None
        """Rows of `_active`; none where that is empty."""
        self._finished: list[Sampled] = []

    @property
    def room(self) -> int:
        return self._engine.config.max_num_seqs - len(self._active)

    def __len__(self) -> int:
        return len(self._active) + len(self._finished)

    @torch.inference_mode()
    def admit(self, requests: Sequence[Request]) -> None:
        check_prompt_lengths(requests, self._engine.max_model_len)
        started = [self._start(request) for request in requests]
        # Each distinct context runs once, whatever the number of its completions.
        contexts = [(*r.prompt_token_ids, *r.sampled_token_ids) for r in requests]
        rows = {context: row for row, context in enumerate(dict.fromkeys(contexts))}
        room = max(len(s.request.prompt_token_ids) + s.budget for s in started)
        decoder = self._engine.prefill(list(rows), self._params, room)
        for sample, context in zip(started, contexts, strict=True):
            sample.experts += decoder.context_experts[rows[context]]
        decoder.select(torch.tensor([rows[context] for context in contexts]))
        if started := self._step(decoder, started):
            if self._decoder is None:
                self._decoder = decoder
            else:
                self._decoder.join(decoder)
            self._active += started

    def _start(self, request: Request) -> Running:
        budget = min(self._params.max_tokens, self._engine.max_model_len - len(request.prompt_token_ids))
        return Running(request=request, budget=budget, token_ids=list(request.sampled_token_ids), logprobs=[])

    @torch.inference_mode()
    def step(self) -> list[Sampled]:
        if self._decoder is not None:
            self._active = self._step(self._decoder, self._active)
            if not self._active:
                self._decoder = None
        finished, self._finished = self._finished, []
        return finished

    def _step(self, decoder: Decoder, active: list[Running]) -> list[Running]:
        """Those still going on after one step; the decoder keeps their rows."""
        decoder.step(active)
        kept = [row for row, sample in enumerate(active) if sample.finish_reason is None]
        if len(kept) < len(active):
            decoder.select(torch.tensor(kept, dtype=torch.long))
            self._finished += [self._outcome(sample) for sample in active if sample.finish_reason is not None]
        return [active[row] for row in kept]

    def pause(self) -> list[Sampled]:
        left = self._finished + [self._outcome(sample) for sample in self._active]
        self._active, self._decoder, self._finished = [], None, []
        return left

    def _outcome(self, sample: Running) -> Sampled:
        new = sample.token_ids[len(sample.request.sampled_token_ids) :]
        reason = sample.finish_reason or FinishReason.PAUSED
        experts = sample.expert_ids() if self._engine.config.record_experts else None
        return outcome(sample.request, new, sample.logprobs, reason, self._engine.version, experts, sample.kept)
