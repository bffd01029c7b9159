"""What an engine answers when it is probed: scores of fixed sequences, and a few tokens that it decodes after them.

Scoring reads whole sequences, decoding goes token by token through the key-value cache and, in vLLM, through other
copies of some weights (MLA's absorbed up-projections): a sync must have reached both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.engine import Engine
from rollout.sample import Prompt, SamplingParams


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """One engine's view of the probe."""

    scores: list[list[float]]
    """Log-probability of each token of each sequence but its first."""
    decoded: list[list[int]]
    """The first half of each sequence with the tokens sampled after it."""
    decoded_logprobs: list[list[float]]
    """Log-probabilities of the sampled tokens, as recorded while decoding."""


def probe_engine(engine: Engine, sequences: Sequence[Sequence[int]], num_tokens: int = 3) -> ProbeAnswer:
    """Scores the sequences, and samples `num_tokens` after half of each, of which the first is still prefill's."""
    params = SamplingParams(max_tokens=num_tokens, stop_token_id=sequences[0][0])  # some token of the vocabulary
    prompts = [Prompt(id=f"probe {i}", text="", token_ids=list(s[: -(-len(s) // 2)])) for i, s in enumerate(sequences)]
    completions = [group.completions[0] for group in engine.generate(prompts, params)]
    return ProbeAnswer(
        scores=engine.score(sequences),
        decoded=[[*prompt.token_ids, *c.token_ids] for prompt, c in zip(prompts, completions, strict=True)],
        decoded_logprobs=[c.logprobs for c in completions],
    )
