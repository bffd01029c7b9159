"""Learning-rate schedules as functions of the step.

lr = learning_rate(step, peak=3e-4, warmup_steps=10, total_steps=100, decay="cosine")
"""

import math
from typing import Literal

Decay = Literal["constant", "cosine"]


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, decay: Decay, final_share: float = 0.05
) -> float:
    """Linear warm-up over the first `warmup_steps`, then constant, or cosine down to `final_share` of the peak.

    `step` counts from 0; the first step already has a positive rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if decay == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
