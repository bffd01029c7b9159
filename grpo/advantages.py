"""Group-relative advantages (arXiv:2402.03300 section 4.1.2): each completion against the others of its prompt.

advantages = group_advantages([1.0, 0.0, 0.0, None], scale="std")
"""

import math
from collections.abc import Sequence
from typing import Literal

AdvantageScale = Literal["std", "none"]
"""Divide by the group's standard deviation (GRPO), or not (Dr. GRPO, arXiv:2503.20783)."""

_EPSILON = 1e-6


def group_advantages(rewards: Sequence[float | None], *, scale: AdvantageScale) -> list[float | None]:
    """A_i = r_i - mean(r), divided by std(r) + 1e-6 when `scale` is "std".

    The deviation is the sample's (divisor n - 1), as in verl and TRL; the paper does not say. Completions without a
    reward (None) take no part and stay None. A group whose rewards are all equal gets exact zeros. Raises ValueError if
    fewer than two completions were asked for: there is nothing to compare with. A group in which scoring left fewer
    than two rewards has no baseline either and gets None throughout.
    """
    if len(rewards) < 2:
        raise ValueError(f"a group needs at least 2 completions for its baseline, got {len(rewards)}")
    scored = [reward for reward in rewards if reward is not None]
    if len(scored) < 2:
        return [None] * len(rewards)
    if min(scored) == max(scored):
        return [None if reward is None else 0.0 for reward in rewards]
    mean = math.fsum(scored) / len(scored)
    divisor = 1.0
    if scale == "std":
        variance = math.fsum((reward - mean) ** 2 for reward in scored) / (len(scored) - 1)
        divisor = math.sqrt(variance) + _EPSILON
    return [None if reward is None else (reward - mean) / divisor for reward in rewards]
