"""The engine interface, and the one place that builds an engine by name.

An engine holds the weights of one policy version and continues prompts. `native` is this project's own model code
(exact, runs anywhere); `vllm` is fast. Both give log-probabilities of the tokens they sampled, at the sampling
temperature.

    engine = build_engine(EngineConfig(kind="native"), "checkpoint_dir")
"""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from rollout.sample import CompletionGroup, Prompt, SamplingParams

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
    num_threads: int = 1
    """CPU threads of each Ray actor."""
    kv_cache_gib: int = 1
    """Memory of vLLM's key-value cache on CPU."""
    placement: Literal["colocated", "separate"] = "colocated"
    """With CUDA: engines share the learner's GPU, and sleep while it learns, or have their own."""

    def __post_init__(self) -> None:
        if self.num_engines < 1:
            raise ValueError(f"num_engines must be >= 1, got {self.num_engines}")
        if self.num_speculative_tokens < 0:
            raise ValueError(f"num_speculative_tokens must be >= 0, got {self.num_speculative_tokens}")
        if self.transport == "local" and self.num_engines != 1:
            raise ValueError(f"transport 'local' runs exactly 1 engine, got num_engines={self.num_engines}; use 'ray'")

    def resolved(self) -> "EngineConfig":
        """The same with `auto` decided. Raises ValueError if vLLM is asked for and not installed."""
        installed = importlib.util.find_spec("vllm") is not None
        if self.kind == "auto":
            return replace(self, kind="vllm" if installed else "native")
        if self.kind == "vllm" and not installed:
            raise ValueError("engine 'vllm' needs vLLM, which is not installed; use the engine 'native'")
        return self


class Engine(Protocol):
    """One copy of the policy that can sample, score and take new weights."""

    version: int
    """Policy version of the weights it holds."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[CompletionGroup]:
        """One group per prompt, in the order given. Raises ValueError for a prompt that leaves no room to continue."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (temperature 1) of each token given those before it; one fewer than tokens per sequence."""
        ...

    def load_weights(self, weights: WeightStream, version: int) -> None:
        """Replaces all weights, in one sync from this process.

        Raises SyncError naming each tensor that is missing, unexpected, misshapen, given twice or not held as it was
        sent. From the first replaced tensor to the end of the next complete sync the engine refuses to sample.
        """
        ...

    def reject_weights(self, reason: str) -> None:
        """Refuses to sample, with SyncError and this reason, until the next complete sync."""
        ...

    def sleep(self) -> None:
        """Gives its accelerator memory to the learner; a sync must follow. Nothing to give on a CPU."""
        ...

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Takes memory back, `weights` before the sync and `kv_cache` after it."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; it cannot be used afterwards."""
        ...


def build_engine(config: EngineConfig, model: str) -> Engine:
    """Builds one engine in this process from the Hugging Face checkpoint folder `model`."""
    if config.resolved().kind == "native":
        from rollout.native_engine import NativeEngine

        return NativeEngine(config, model)
    from rollout.vllm_engine import VLLMEngine  # heavy and optional, hence not at the top

    return VLLMEngine(config, model)


def check_prompt_lengths(prompts: Sequence[Prompt], max_model_len: int) -> None:
    """Raises ValueError naming the first prompt that leaves no room for a token."""
    for prompt in prompts:
        if len(prompt.token_ids) >= max_model_len:
            raise ValueError(
                f"prompt {prompt.id} has {len(prompt.token_ids)} tokens, which leaves no room within "
                f"max_model_len={max_model_len}; raise it or drop the prompt"
            )
