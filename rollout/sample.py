"""What rollout takes and gives: prompts, sampling parameters, completions and groups. Plain data, no tensors.

prompt = Prompt(id="7", text="1+1=", token_ids=[5, 9], row={"answer": "2"})
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question, ready for an engine."""

    id: str
    """Unique within the data set; a group is keyed by it, never by the text."""
    text: str
    """The whole prompt as the model sees it, template included."""
    token_ids: list[int]
    """The same, tokenized."""
    prefill: str = ""
    """Last part of `text` that is the beginning of the answer, forced on the model; it is scored with the completion.
    """
    row: Mapping[str, Any] = field(default_factory=dict)
    """The data set row it came from; rewards read the gold answer here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to continue each prompt."""

    num_completions: int = 1
    """G, independent completions per prompt."""
    max_tokens: int
    """Longest completion, in tokens; one that reaches it finishes with `length`."""
    temperature: float = 1.0
    """Logits are divided by it; 0 picks the most probable token."""
    top_k: int = 0
    """Draw from the k most probable tokens only; 0 for all. No effect at temperature 0."""
    top_p: float = 1.0
    """Of those, draw from the fewest most probable ones that together have this probability; 1 for all."""
    stop_token_id: int
    """Ends a completion and is part of it."""
    turn_token_ids: frozenset[int] = frozenset()
    """Tokens behind which a completion comes back as `paused`; they are part of it. For environment.py."""
    seed: int = 0
    """With the prompt's id and the completion's index it fixes every random draw."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"need top_k >= 0 and top_p above 0 and at most 1, got {self.top_k} and {self.top_p}")
        if self.max_tokens < 1 or self.num_completions < 1:
            raise ValueError(
                f"max_tokens and num_completions must be >= 1, got {self.max_tokens} and {self.num_completions}"
            )

    @property
    def is_restricted(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary, which is then recorded."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

    def seed_of(self, prompt_id: str, index: int) -> int:
        """63-bit seed of one completion; independent of which others are sampled beside it."""
        digest = hashlib.blake2b(f"{self.seed}/{prompt_id}/{index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """It emitted the stop token."""
    LENGTH = "length"
    """It reached `max_tokens` or the model's longest sequence."""
    ERROR = "error"
    """The engine could not finish it; such a completion is counted and never trained on."""
    PAUSED = "paused"
    """Not ended: the pool was told to stop, or a token of `turn_token_ids` came. `EnginePool.generate` continues it."""


NOTHING_KEPT = np.empty(0, np.int32)
"""In place of the kept tokens: none are recorded, the whole vocabulary counts."""
ENVIRONMENT = -1
"""In place of a policy version: these tokens were written by an environment, see environment.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled continuation, with everything recorded that must not be recomputed."""

    token_ids: list[int]
    """[L] sampled tokens, the stop token included when it was emitted, and what an environment wrote between them."""
    logprobs: list[float]
    """[L] log-probability of each sampled token as it was drawn: at the sampling temperature, among the tokens that
    top_k and top_p kept; 0.0 for the environment's."""
    finish_reason: FinishReason
    version_spans: tuple[tuple[int, int], ...]
    """(policy version, number of tokens) in order: which weights sampled which tokens. Version 0 is the checkpoint the
    engine started from, ENVIRONMENT no weights at all. More than one span where an environment answered, or where a
    completion was paused and continued under new weights."""
    seed: int
    """Seed of its random draws."""
    expert_ids: np.ndarray | None = field(default=None, compare=False, repr=False)
    """[prompt + L - 1, layers with experts, K] experts that each token but the last used, see router_replay.py; None
    if they were not recorded or there are none."""
    kept_ids: tuple[np.ndarray, ...] | None = field(default=None, compare=False, repr=False)
    """[L] int32 arrays: the tokens that top_k and top_p kept where each token was drawn, `NOTHING_KEPT` for the
    environment's; None if the whole vocabulary was open."""
    environment_state: Any = field(default=None, compare=False, repr=False)
    """Of a paused completion, what its environment needs to go on."""

    def __post_init__(self) -> None:
        sizes = len(self.token_ids), len(self.logprobs), sum(size for _, size in self.version_spans)
        assert len(set(sizes)) == 1, f"numbers of tokens, log-probabilities and versioned tokens differ: {sizes}"

    @property
    def oldest_version(self) -> int:
        """Of the weights that sampled its first token; it needs one."""
        return self.version_spans[0][0]  # the first turn is the policy's

    @property
    def newest_version(self) -> int:
        """Of the weights that sampled its last token; it needs one."""
        return next(version for version, _ in reversed(self.version_spans) if version != ENVIRONMENT)

    @property
    def observations(self) -> list[list[int]]:
        """Tokens of each of the environment's answers."""
        ends = accumulate(size for _, size in self.version_spans)
        spans = zip(self.version_spans, ends, strict=True)
        return [self.token_ids[end - size : end] for (version, size), end in spans if version == ENVIRONMENT]

    @property
    def versions(self) -> list[int]:
        """[L] the policy version that sampled each token, or ENVIRONMENT."""
        return [version for version, size in self.version_spans for _ in range(size)]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionGroup:
    """One prompt and its completions, the unit over which advantages are computed."""

    prompt: Prompt
    completions: list[Completion]
    """G of them, in sampling order."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing of it waits to be continued."""
        return all(completion.finish_reason is not FinishReason.PAUSED for completion in self.completions)

    @property
    def num_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)
