"""In which order supervised training sees its samples: endless, drawn from a seed, the same after a resume.

steps = ordered_steps(store.lengths, samples_per_step=64, tokens_per_step=0, seed=0)
places = next(steps)
"""

import itertools
import random
from collections.abc import Iterator

import numpy as np


def ordered_steps(
    lengths: np.ndarray, *, samples_per_step: int, tokens_per_step: int, seed: int, curriculum_steps: int = 0
) -> Iterator[list[int]]:
    """The samples of each optimizer step, without end; every sample once per epoch, each epoch in its own order.

    A step has `samples_per_step` samples or, with `tokens_per_step`, as many as fit into that. Over the first
    `curriculum_steps` only those up to a length are taken, at first the shortest ones that make a step, at the end all;
    the short ones are seen more often then. Raises ValueError if there are fewer samples than a step takes.
    """
    if not tokens_per_step and samples_per_step > len(lengths):
        raise ValueError(
            f"samples_per_step={samples_per_step} exceeds the {len(lengths)} samples of the data; lower it"
        )
    if tokens_per_step and max(lengths) > tokens_per_step:
        raise ValueError(f"a sample of {max(lengths)} tokens exceeds tokens_per_step={tokens_per_step}; raise it")
    ascending = np.sort(lengths)
    places = _epochs(len(lengths), seed)
    waiting: list[int] = []  # the sample that did not fit into the last step
    for step in itertools.count():
        limit = _limit(ascending, step, curriculum_steps, min(samples_per_step, len(lengths)))
        chosen, tokens = waiting, sum(int(lengths[place]) for place in waiting)
        waiting = []
        while tokens_per_step or len(chosen) < samples_per_step:
            place = next(places)
            length = int(lengths[place])
            if length > limit:
                continue
            if tokens_per_step and tokens + length > tokens_per_step:
                waiting = [place]
                break
            chosen.append(place)
            tokens += length
        yield chosen


def _limit(ascending: np.ndarray, step: int, curriculum_steps: int, fewest: int) -> int:
    """The longest sample that the step may take."""
    if step >= curriculum_steps:
        return int(ascending[-1])
    share = (step + 1) / (curriculum_steps + 1)
    return int(ascending[max(fewest, round(share * len(ascending))) - 1])


def _epochs(count: int, seed: int) -> Iterator[int]:
    rng = random.Random(f"documents {seed}")
    while True:
        yield from rng.sample(range(count), count)
