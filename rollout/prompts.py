"""Where prompts come from: an endless, seeded, stateless walk over a fixed list.

source = PromptSource(prompts, seed=0)
batch = source.batch(step=7, size=16)       # the same whenever and wherever it is asked for
"""

import random
from collections.abc import Sequence

from rollout.sample import Prompt


class PromptSource:
    """Every prompt once per epoch, each epoch in its own order; a batch depends on `seed`, `step` and `size` alone."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Raises ValueError for no prompts, or for an id that occurs twice."""
        if not prompts:
            raise ValueError("there is no prompt to train on")
        ids = [prompt.id for prompt in prompts]
        if len(set(ids)) < len(ids):
            repeated = next(name for name in ids if ids.count(name) > 1)
            raise ValueError(f"prompt id {repeated!r} occurs twice; ids must be unique")
        self.prompts = list(prompts)
        self.seed = seed

    def batch(self, step: int, size: int) -> list[Prompt]:
        """The prompts of one step. Raises ValueError if a batch would need a prompt twice."""
        if size > len(self.prompts):
            raise ValueError(f"a step needs {size} different prompts, the data has {len(self.prompts)}")
        per_epoch = len(self.prompts) // size
        epoch, place = divmod(step, per_epoch)
        order = list(range(len(self.prompts)))
        random.Random(f"prompts {self.seed} {epoch}").shuffle(order)
        return [self.prompts[i] for i in order[place * size : (place + 1) * size]]
