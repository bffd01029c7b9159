"""Where prompts come from: an endless, seeded, stateless walk over a fixed list.

source = PromptSource(prompts, seed=0)
prompts, place = source.take(place=0, count=16)     # the same whenever and wherever it is asked for
"""

import functools
import random
from collections.abc import Iterable, Sequence

from rollout.sample import Prompt


class PromptSource:
    """Every prompt once per epoch, each epoch in its own order, which depends on `seed` alone."""

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

    def take(self, place: int, count: int, avoid: Iterable[str] = ()) -> tuple[list[Prompt], int]:
        """`count` prompts from `place` of the endless walk on, and the place behind them.

        None occurs twice and none is in `avoid` (ids that are under way); such prompts are passed over, which happens
        where one epoch meets the next. Raises ValueError if the data has fewer prompts than that.
        """
        under_way = set(avoid)
        if count > len(self.prompts) - len(under_way):
            beside = f" beside {len(under_way)} under way" if under_way else ""
            raise ValueError(f"{count} different prompts are needed{beside}, the data has {len(self.prompts)}")
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, index = divmod(place, len(self.prompts))
            prompt = self.prompts[self.order(epoch)[index]]
            if prompt.id not in under_way:
                taken.append(prompt)
                under_way.add(prompt.id)
            place += 1
        return taken, place

    @functools.lru_cache(maxsize=2)  # noqa: B019  one source lives as long as a run
    def order(self, epoch: int) -> list[int]:
        """Places in `prompts`, as they come in that epoch."""
        order = list(range(len(self.prompts)))
        random.Random(f"prompts {self.seed} {epoch}").shuffle(order)
        return order
