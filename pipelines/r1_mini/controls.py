"""Rewards for controls."""

import random

from rewards import Sample


def coin(sample: Sample) -> float:
    """1 or 0 by a coin that knows nothing of the completion, the same whenever it is asked for the same sample."""
    return float(random.Random(f"{sample.group_id} {sample.index} {sample.step}").random() < 0.5)
