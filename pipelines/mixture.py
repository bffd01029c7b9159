"""Several tasks in one run: each prompt carries its task, each task has rewards of its own.

    parts = parse_mixture(("2*ledger=train.jsonl", "countdown-mini=more.jsonl"))
    source = MixedSource({"ledger": ledger_prompts, "countdown-mini": countdown_prompts}, [2, 1], seed=0)
    rubric = TaskRubric({"ledger": ..., "countdown-mini": ...}, task_of)

Of every three prompts two are of the ledger then, whatever the sizes of the two files: a task whose prompts are used up
begins its next epoch by itself.
"""

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipelines.tasks import Task, get_task
from rewards import Rubric, Sample, Score
from rollout.prompts import PromptSource
from rollout.sample import Prompt


@dataclass(frozen=True, kw_only=True)
class TaskPart:
    """One task of a mixture."""

    task: Task
    data: str | None
    """File or hub id of its prompts; None where the task generates them or names its own hub id."""
    weight: int
    """Prompts of it in each cycle of the mixture."""


def parse_mixture(specs: Sequence[str]) -> list[TaskPart]:
    """Parts from `[weight*]task[=data]`. Raises ValueError for an unknown task, or one that is named twice."""
    parts = []
    for spec in specs:
        head, _, data = spec.partition("=")
        weight, star, name = head.rpartition("*")
        if star and (not weight.isdecimal() or int(weight) < 1):
            raise ValueError(f"mixture {spec!r}: {weight!r} is not a whole number above 0; write e.g. 2*{name}=FILE")
        parts.append(TaskPart(task=get_task(name), data=data or None, weight=int(weight) if star else 1))
    names = [part.task.name for part in parts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"mixture names {', '.join(twice)} twice; put the prompts of a task into one file")
    return parts


class MixedSource(PromptSource):
    """A walk that takes the tasks in turns, as often as their weights say, and each task's prompts in a shuffled order
    of their own. What it calls an epoch is as many turns as there are prompts."""

    def __init__(self, prompts: Mapping[str, Sequence[Prompt]], weights: Sequence[int], seed: int) -> None:
        """Raises ValueError for a task without prompts, or for an id that occurs twice."""
        for name, of_task in prompts.items():
            if not of_task:
                raise ValueError(f"task {name} has no prompt to train on")
        super().__init__([prompt for of_task in prompts.values() for prompt in of_task], seed)
        self._sizes = [len(of_task) for of_task in prompts.values()]
        self._weights = list(weights)
        # Turns of one task are spread over the cycle: weights 4 and 2 give A B A A B A.
        turns = [((turn + 0.5) / weight, part) for part, weight in enumerate(weights) for turn in range(weight)]
        self._cycle = [part for _, part in sorted(turns)]

    @functools.lru_cache(maxsize=2)  # noqa: B019  one source lives as long as a run
    def order(self, epoch: int) -> list[int]:
        """Places in `prompts`, as they come in that epoch; a small task with a large weight stands there repeatedly."""
        first = epoch * len(self.prompts)
        return [self._index(place) for place in range(first, first + len(self.prompts))]

    def _index(self, place: int) -> int:
        cycle, slot = divmod(place, len(self._cycle))
        part = self._cycle[slot]
        turn = cycle * self._weights[part] + self._cycle[:slot].count(part)
        epoch, at = divmod(turn, self._sizes[part])
        return sum(self._sizes[:part]) + self._order_within(part, epoch)[at]

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _order_within(self, part: int, epoch: int) -> list[int]:
        order = list(range(self._sizes[part]))
        random.Random(f"prompts {self.seed} {part} {epoch}").shuffle(order)
        return order


class TaskRubric(Rubric):
    """Judges every sample by the rubric of its task.

    Metrics are named as ever, and once more under the task's name with the whole reward beside them:
    `math_answer`, `ledger/math_answer`, `ledger/reward`.
    """

    def __init__(self, rubrics: Mapping[str, Rubric], task_of: Mapping[str, str]) -> None:
        """`task_of`: a prompt's id -> the name of its task."""
        by_name = {function.name: function for rubric in rubrics.values() for function in rubric.rewards}
        super().__init__(list(by_name.values()))
        self._rubrics, self._task_of = dict(rubrics), dict(task_of)

    def score(self, sample: Sample) -> Score:
        return self._named(self._task_of[sample.group_id], self._rubric(sample).score(sample))

    def score_groups(self, groups: Sequence[Sequence[Sample]]) -> list[list[Score]]:
        """Each task's groups at once, in the groups' order."""
        scores: list[list[Score]] = [[] for _ in groups]
        tasks = [self._task_of[group[0].group_id] if group else "" for group in groups]
        for name, rubric in self._rubrics.items():
            places = [place for place, task in enumerate(tasks) if task == name]
            for place, of_group in zip(places, rubric.score_groups([groups[at] for at in places]), strict=True):
                scores[place] = [self._named(name, score) for score in of_group]
        return scores

    def _rubric(self, sample: Sample) -> Rubric:
        return self._rubrics[self._task_of[sample.group_id]]

    @staticmethod
    def _named(task: str, score: Score) -> Score:
        of_task = dict(score.metrics) if score.value is None else {**score.metrics, "reward": score.value}
        return replace(score, metrics={**score.metrics, **{f"{task}/{name}": x for name, x in of_task.items()}})
