"""The engine interface, and the one place that builds an engine by name.

An engine holds the weights of one policy version and continues prompts. `native` is this project's own model code (exact,
runs anywhere); `vllm` is fast. Both give log-probabilities of the tokens they sampled, at the sampling temperature.

    engine = build_engine(EngineSpec(kind="native", model="checkpoint_dir"))
"""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from rollout.sample import CompletionGroup, Prompt, SamplingParams

EngineKind = Literal["native", "vllm"]
WeightStream = Iterable[tuple[str, torch.Tensor]]
"""(checkpoint name, tensor) pairs, each name once."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Everything needed to build one engine, here or in another process."""

    kind: EngineKind
    model: str
    """Folder of a Hugging Face checkpoint."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_model_len: int = 2048
    """Longest prompt plus completion, in tokens."""
    num_threads: int = 1
    """CPU threads of the engine's process; set by the pool that starts the process."""
    kv_cache_gib: int = 1
    """Memory of vLLM's key-value cache on CPU."""
    max_num_seqs: int = 256
    """Sequences decoded at once."""


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
        """Replaces all weights. Raises ValueError naming each missing, unexpected or misshapen tensor."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; it cannot be used afterwards."""
        ...


def vllm_is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def build_engine(spec: EngineSpec) -> Engine:
    """Builds the engine in this process. Raises ValueError if vLLM is asked for and not installed."""
    if spec.kind == "native":
        from rollout.native_engine import NativeEngine

        return NativeEngine(spec)
    if not vllm_is_installed():
        raise ValueError("engine 'vllm' needs vLLM, which is not installed; use the engine 'native'")
    from rollout.vllm_engine import VLLMEngine  # heavy and optional, hence not at the top

    return VLLMEngine(spec)


def check_prompt_lengths(prompts: Sequence[Prompt], max_model_len: int) -> None:
    """Raises ValueError naming the first prompt that leaves no room for a token."""
    for prompt in prompts:
        if len(prompt.token_ids) >= max_model_len:
            raise ValueError(
                f"prompt {prompt.id} has {len(prompt.token_ids)} tokens, which leaves no room within "
                f"max_model_len={max_model_len}; raise it or drop the prompt"
            )
