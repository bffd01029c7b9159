"""The engine interface, and the one place that builds an engine by name.

An engine holds the weights of one policy version and continues prompts. `native` is this project's own model code
(exact, runs anywhere); `vllm` is fast. Both give log-probabilities of the tokens they sampled, at the sampling
temperature.

    engine = build_engine(EngineConfig(kind="native"), "checkpoint_dir")
    groups = engine.generate(prompts, params)
"""

import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from rollout.sample import CompletionGroup, FinishReason, Prompt, SamplingParams
from rollout.stream import Inbox, Request, Sampled, assemble, outcome, requests_of

WeightStream = Iterable[tuple[str, torch.Tensor]]
"""(checkpoint name, tensor) pairs, each name once."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which engines, how many and how large."""

    kind: Literal["auto", "vllm", "native"] = "auto"
    """`vllm` is fast, `native` is this project's own model code; `auto` takes vLLM where it is installed."""
    transport: Literal["ray", "local"] = "ray"
    """Engines in Ray actors, or a single one in this process."""
    num_engines: int = 1
    """Copies of the model, each in its own Ray actor."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the engine's weights and activations."""
    max_model_len: int = 2048
    """Longest prompt plus completion, in tokens."""
    max_num_seqs: int = 256
    """Sequences that one engine decodes at once."""
    num_speculative_tokens: int = 0
    """Tokens drafted by the model's prediction modules between two passes of the model; the distribution stays the
    same. Engine `native` only, up to the model's `num_nextn_predict_layers`."""
    record_experts: bool = True
    """Record which experts each token used, for the learner to replay; costs 1 or 2 bytes per token, layer and expert.
    """
    num_threads: int = 1
    """CPU threads of each Ray actor."""
    placement: Literal["colocated", "separate"] = "colocated"
    """Whether each engine shares its GPU with a rank of the learner, and sleeps while that learns, or has GPUs of its
    own; the same without GPUs."""
    sleep_while_learning: bool = True
    """Colocated on a GPU: the engine gives its memory to the learner between rollouts. Off where both have room."""
    tensor_parallel_size: int = 1
    """GPUs of one host that hold one copy of the model together. Engine `vllm`, placement `separate`. New weights pass
    through the host's memory to each of them, and the probe, not a read-back, tells whether they hold them."""
    request_timeout_s: float = 3600.0
    """Longest time from handing a request to an engine until its completion is there; the engine is replaced then."""
    stall_timeout_s: float = 600.0
    """Longest time that an engine with work may spend without finishing a decoding step; it is replaced then."""
    max_restarts: int = 3
    """Engines replaced in a row, no completion in between, before the run is given up."""
    kv_cache_gib: int = 1
    """Memory of vLLM's key-value cache on CPU."""
    gpu_memory_share: float | None = None
    """Share of a GPU's memory for vLLM, its weights included; None for 0.45 beside a learner and 0.9 alone."""

    def __post_init__(self) -> None:
        if self.num_engines < 1:
            raise ValueError(f"num_engines must be >= 1, got {self.num_engines}")
        if self.gpu_memory_share is not None and not 0 < self.gpu_memory_share <= 1:
            raise ValueError(f"gpu_memory_share must be above 0 and at most 1, got {self.gpu_memory_share}")
        if self.num_speculative_tokens < 0:
            raise ValueError(f"num_speculative_tokens must be >= 0, got {self.num_speculative_tokens}")
        if self.tensor_parallel_size < 1 or self.max_restarts < 0:
            raise ValueError(
                f"need tensor_parallel_size >= 1 and max_restarts >= 0, got {self.tensor_parallel_size} and "
                f"{self.max_restarts}"
            )
        if not (self.request_timeout_s > 0 and self.stall_timeout_s > 0):
            raise ValueError(
                f"request_timeout_s and stall_timeout_s must be > 0, got {self.request_timeout_s} and "
                f"{self.stall_timeout_s}"
            )
        if self.tensor_parallel_size > 1 and (self.kind == "native" or self.placement == "colocated"):
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} needs the engine 'vllm' and placement 'separate', "
                f"got {self.kind!r} and {self.placement!r}"
            )
        if self.transport == "local" and self.num_engines != 1:
            raise ValueError(f"transport 'local' runs exactly 1 engine, got num_engines={self.num_engines}; use 'ray'")

    @property
    def sleeps(self) -> bool:
        return self.placement == "colocated" and self.sleep_while_learning and torch.cuda.is_available()

    @property
    def gpu_share(self) -> float:
        """`gpu_memory_share`, or what it is by default."""
        if self.gpu_memory_share is not None:
            return self.gpu_memory_share
        return 0.45 if self.placement == "colocated" else 0.9

    def resolved(self) -> "EngineConfig":
        """The same with `auto` decided. Raises ValueError if vLLM is asked for and not installed."""
        installed = importlib.util.find_spec("vllm") is not None
        if self.kind == "auto":
            return replace(self, kind="vllm" if installed else "native")
        if self.kind == "vllm" and not installed:
            raise ValueError("engine 'vllm' needs vLLM, which is not installed; use the engine 'native'")
        return self


class Batch(Protocol):
    """The requests that an engine works on at the moment."""

    @property
    def room(self) -> int:
        """How many more requests it takes."""
        ...

    def __len__(self) -> int: ...

    def admit(self, requests: Sequence[Request]) -> None:
        """Begins these too. Raises ValueError for a prompt that leaves no room to continue."""
        ...

    def step(self) -> list[Sampled]:
        """Grows every request that has a place by a token or more; those that finished, which leave the batch."""
        ...

    def pause(self) -> list[Sampled]:
        """Empties the batch; what each request has so far, as finish reason `paused`."""
        ...


class Engine(ABC):
    """One copy of the policy that can sample, score and take new weights."""

    max_model_len: int
    """Longest prompt plus completion, in tokens."""
    version: int = 0
    """Policy version of the weights it holds."""
    steps: int = 0
    """Decoding steps done; stands still while the engine does."""

    @abstractmethod
    def start_batch(self, params: SamplingParams) -> Batch:
        """An empty batch, one at a time."""

    def stream(self, inbox: Inbox, params: SamplingParams, collect_s: float = 0.0) -> Iterator[list[Sampled]]:
        """Completions as they finish, those of one decoding step together, until the inbox is closed and empty.

        Those of all steps in `collect_s` seconds come together, and the last at once. Requests begin as others finish.
        When the inbox is paused, all that is left comes as finish reason `paused`.
        """
        self.check_usable()
        batch = self.start_batch(params)
        finished: list[Sampled] = []
        given = time.monotonic()
        try:
            while not inbox.is_paused:
                requests = inbox.take(batch.room, wait=len(batch) == 0)
                finished += inbox.passing()
                if not (requests or finished or len(batch)):
                    break
                fitting = [request for request in requests if not self._is_full(request, params)]
                finished += [
                    outcome(request, [], [], FinishReason.LENGTH, self.version)
                    for request in requests
                    if self._is_full(request, params)
                ]
                if fitting:
                    batch.admit(fitting)
                if len(batch):
                    finished += batch.step()
                    self.steps += 1
                if finished and (len(batch) == 0 or time.monotonic() - given >= collect_s):
                    yield finished
                    finished, given = [], time.monotonic()
            left = finished + [outcome(request, [], [], FinishReason.PAUSED, self.version) for request in inbox.drain()]
            if left := left + batch.pause():
                yield left
        finally:
            batch.pause()

    def _is_full(self, request: Request, params: SamplingParams) -> bool:
        """Whether what the completion already has, an environment's tokens included, leaves no room for another."""
        has = len(request.sampled_token_ids)
        return has > 0 and (has >= params.max_tokens or len(request.prompt_token_ids) + has >= self.max_model_len)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[CompletionGroup]:
        """One group per prompt, in the order given. Raises ValueError for a prompt that leaves no room to continue."""
        inbox = Inbox([request for prompt in prompts for request in requests_of(prompt, params)])
        inbox.close()
        finished = (sampled for step in self.stream(inbox, params) for sampled in step)
        groups = {group.prompt.id: group for group in assemble(prompts, params, finished)}
        return [groups[prompt.id] for prompt in prompts]

    @abstractmethod
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (temperature 1) of each token given those before it; one fewer than tokens per sequence."""

    @abstractmethod
    def load_weights(self, weights: WeightStream, version: int) -> None:
        """Replaces all weights, in one sync from this process.

        Raises SyncError naming each tensor that is missing, unexpected, misshapen, given twice or not held as it was
        sent. From the first replaced tensor to the end of the next complete sync the engine refuses to sample.
        """

    @abstractmethod
    def check_usable(self) -> None:
        """Raises SyncError if the weights are not whole and checked."""

    @abstractmethod
    def reject_weights(self, reason: str) -> None:
        """Refuses to sample, with SyncError and this reason, until the next complete sync."""

    @abstractmethod
    def sleep(self) -> None:
        """Gives its accelerator memory to the learner; a sync must follow. Nothing to give on a CPU."""

    @abstractmethod
    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Takes memory back, `weights` before the sync and `kv_cache` after it."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the engine holds; it cannot be used afterwards."""


def build_engine(config: EngineConfig, model: str) -> Engine:
    """Builds one engine in this process from the Hugging Face checkpoint folder `model`."""
    if config.resolved().kind == "native":
        from rollout.native_engine import NativeEngine

        return NativeEngine(config, model)
    from rollout.vllm_engine import VLLMEngine  # heavy and optional, hence not at the top

    return VLLMEngine(config, model)


def check_prompt_lengths(requests: Sequence[Request], max_model_len: int) -> None:
    """Raises ValueError naming the first prompt that leaves no room for a token."""
    for request in requests:
        if len(request.prompt_token_ids) >= max_model_len:
            raise ValueError(
                f"prompt {request.prompt_id} has {len(request.prompt_token_ids)} tokens, which leaves no room within "
                f"max_model_len={max_model_len}; raise it or drop the prompt"
            )
