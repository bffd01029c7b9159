"""Which prompts come next: by their length, and by how often they have been solved.

    prompts, place = Curriculum(config, source).take(place, count, avoid, solved)
    solved = count_solved(solved, groups, scores, at=config.solved_at)

Nothing is remembered here: `place` and `solved` are part of `RolloutState`, so a resumed run gets the same prompts.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rewards import Score
from rollout.prompts import PromptSource
from rollout.sample import CompletionGroup, FinishReason, Prompt

Solved = Mapping[str, tuple[int, int]]
"""Prompt id -> (completions that were scored, those that solved it), since the run began."""

_LEAST_CHANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """In which order prompts come, and which come less often."""

    short_first: bool = False
    """In the first epoch prompts come by their number of tokens, the shortest first; later epochs are shuffled."""
    prioritize_unsolved: bool = False
    """A prompt's turn passes unused with the probability that it was solved (Kimi k1.5, arXiv:2501.12599), 0.95 at
    most. New prompts always have theirs."""
    drop_solved: float = 0.0
    """Prompts solved in at least this share of their tries are left out (ScaleRL, arXiv:2510.13786, there 0.9), but
    return while fewer than are needed would be left; 0 drops none."""
    solved_at: float = 1.0
    """The reward from which on a completion counts as solved."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_solved <= 1:
            raise ValueError(f"drop_solved must be from 0 to 1, got {self.drop_solved}; 0.9 is usual, 0 drops none")

    @property
    def counts(self) -> bool:
        """Whether it matters how often a prompt was solved."""
        return self.prioritize_unsolved or self.drop_solved > 0


class Curriculum:
    """A `PromptSource` whose order and turns follow a config; without one set, its plain walk."""

    def __init__(self, config: CurriculumConfig, source: PromptSource) -> None:
        self.config, self.source = config, source
        sizes = [len(prompt.token_ids) for prompt in source.prompts]
        self._short_first = sorted(source.order(0), key=lambda index: sizes[index])  # of equals, as they were shuffled

    def take(self, place: int, count: int, avoid: Iterable[str], solved: Solved) -> tuple[list[Prompt], int]:
        """As `PromptSource.take`, given how often each prompt was solved."""
        config, prompts = self.config, self.source.prompts
        under_way = set(avoid)
        is_plain = not (config.short_first or config.counts)
        if is_plain or count > len(prompts) - len(under_way):
            return self.source.take(place, count, under_way)  # which refuses what cannot be had
        left = sum(prompt.id not in under_way and not self._is_dropped(prompt, solved) for prompt in prompts)
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, index = divmod(place, len(prompts))
            prompt = prompts[self._order(epoch)[index]]
            is_out = left >= count and self._is_dropped(prompt, solved)
            if prompt.id not in under_way and not is_out and self._has_turn(prompt, place, solved):
                taken.append(prompt)
                under_way.add(prompt.id)
            place += 1
        return taken, place

    def _order(self, epoch: int) -> Sequence[int]:
        return self._short_first if epoch == 0 and self.config.short_first else self.source.order(epoch)

    def _is_dropped(self, prompt: Prompt, solved: Solved) -> bool:
        tries, successes = solved.get(prompt.id, (0, 0))
        return self.config.drop_solved > 0 and tries > 0 and successes / tries >= self.config.drop_solved

    def _has_turn(self, prompt: Prompt, place: int, solved: Solved) -> bool:
        tries, successes = solved.get(prompt.id, (0, 0))
        if not (self.config.prioritize_unsolved and tries):
            return True
        chance = max(_LEAST_CHANCE, 1 - successes / tries)
        return random.Random(f"turn {self.source.seed} {place}").random() < chance


def count_solved(
    solved: Solved, groups: Sequence[CompletionGroup], scores: Sequence[Sequence[Score]], at: float
) -> dict[str, tuple[int, int]]:
    """The counts with these groups added; completions without a reward, or that the engine failed, are no tries."""
    counts = dict(solved)
    for group, group_scores in zip(groups, scores, strict=True):
        finished = zip(group.completions, group_scores, strict=True)
        kept = [score for completion, score in finished if completion.finish_reason is not FinishReason.ERROR]
        values = [score.value for score in kept if score.value is not None]
        tries, successes = counts.get(group.prompt.id, (0, 0))
        counts[group.prompt.id] = (tries + len(values), successes + sum(value >= at for value in values))
    return counts
