"""Verified weight sync: `push_weights` is the one call of the trainer.

Two kinds of check. The manifest (manifest.py): every tensor arrived, and where it can be read back is held, bit for bit
as it was sent. The probe: the engines score fixed sequences, and decode after them, as the learner does; that covers
what cannot be read back, and an engine that holds the right weights but computes another model.

    drift = push_weights(pool, learner.named_weights(), version, probe, learner.score, limit=1e-3)
"""

import math
import random
from collections.abc import Callable, Sequence

from rollout.engine import WeightStream
from rollout.manifest import SyncError
from rollout.pool import EnginePool
from rollout.probe import ProbeAnswer
from rollout.sample import Prompt

__all__ = ["SyncError", "largest_difference", "probe_sequences", "push_weights"]

Score = Callable[[Sequence[Sequence[int]]], list[list[float]]]
"""Log-probability of each token given those before it; one fewer than tokens per sequence."""


def probe_sequences(prompts: Sequence[Prompt], vocab_size: int, *, max_tokens: int = 64) -> list[list[int]]:
    """Fixed sequences to score: the beginning of four prompts, and four of random tokens, which reach every expert."""
    rng = random.Random(0)
    real = [list(prompt.token_ids[:max_tokens]) for prompt in prompts[:4] if len(prompt.token_ids) > 1]
    return real + [[rng.randrange(vocab_size) for _ in range(32)] for _ in range(4)]


def largest_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Largest |log-probability difference| over all tokens of all sequences; NaN if any is NaN."""
    differences = [abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    # max() alone would keep or lose a NaN depending on where it stands
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def push_weights(
    pool: EnginePool,
    weights: WeightStream,
    version: int,
    probe: Sequence[Sequence[int]],
    score: Score,
    limit: float,
    probe_every: int = 1,
) -> float | None:
    """Wakes the engines, loads `weights` into each, and lets every `probe_every`-th version pass the probe.

    `score` is the learner's. Returns the largest difference of log-probabilities between learner and engines, None
    without a probe. Raises SyncError for tensors that did not arrive or are not held as sent, and above `limit`, naming
    the engine; the engines then refuse to sample until the next complete sync.
    """
    pool.wake("weights")
    pool.load_weights(weights, version)
    pool.wake("kv_cache")  # only now: beside the learner's weights and a staging buffer there may be no room for it
    if version % probe_every:
        return None
    ours = score(probe)
    worst = 0.0
    for engine, answer in enumerate(pool.probe(probe)):
        difference = _probe_difference(ours, answer, score)
        # `not <=` and not `>`: a NaN compares false with everything, and must not pass.
        if not difference <= limit:
            problem = (
                f"after the push of version {version}, engine {engine} scores the probe differently from the learner: "
                f"log-probabilities differ by up to {difference:.3g}, allowed {limit:.3g}. The engine does not hold "
                "the learner's weights, or computes another model; with bfloat16 the limit must be larger"
            )
            pool.reject_weights(problem)
            raise SyncError(problem)
        worst = max(worst, difference)
    return worst


def _probe_difference(ours: list[list[float]], answer: ProbeAnswer, score: Score) -> float:
    decoded = score(answer.decoded)
    ends = [s[len(s) - len(of) :] for s, of in zip(decoded, answer.decoded_logprobs, strict=True)]
    return largest_difference([*ours, *ends], [*answer.scores, *answer.decoded_logprobs])
