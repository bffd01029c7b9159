"""Verified weight sync: after every push the engines must score fixed sequences as the learner does.

A push that lost a tensor, hit the wrong layer or left a stale copy behind shows here and stops the run. Not covered: a
stale tensor that moves no probed log-probability beyond the limit yet, as with a tiny learning rate; it shows once the
weights have moved on.

    drift = push_weights(pool, learner.named_weights(), version, probe, learner.score(probe), limit=1e-3)
"""

import math
import random
from collections.abc import Sequence

from rollout.engine import WeightStream
from rollout.pool import EnginePool
from rollout.sample import Prompt


class SyncError(RuntimeError):
    """An engine does not hold the weights it was given."""


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
    expected: Sequence[Sequence[float]],
    limit: float,
) -> float:
    """Loads `weights` into every engine and compares its scores of `probe` with the learner's, `expected`.

    Returns the largest difference found. Raises SyncError above `limit`, naming the engine and the token.
    """
    pool.load_weights(weights, version)
    worst = 0.0
    for engine, scores in enumerate(pool.score(probe)):
        difference = largest_difference(expected, scores)
        # `not <=` and not `>`: a NaN compares false with everything, and must not pass.
        if not difference <= limit:
            raise SyncError(
                f"after the push of version {version}, engine {engine} scores the probe differently from the learner: "
                f"log-probabilities differ by up to {difference:.3g}, allowed {limit:.3g}. The engine does not hold "
                "the learner's weights, or computes another model; with bfloat16 the limit must be larger"
            )
        worst = max(worst, difference)
    return worst
