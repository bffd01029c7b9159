"""Pins which prompts come next.

1. Without a setting the walk is the source's own, place by place.
2. Short prompts first in the first epoch, all of them once; then shuffled.
3. A solved prompt's turns pass with the probability that it was solved, decided by seed and place alone.
4. What was solved often enough is left out, and comes back while too few would be left.
5. Tries and successes are counted once per group that a step took, unscored completions not at all.
6. A run continued from its state gets the same prompts.
"""

import io
from collections import Counter
from typing import Any

import pytest
import torch

from grpo.curriculum import Curriculum, CurriculumConfig, count_solved
from grpo.rollouts import RolloutState
from rewards import Score
from rollout.prompts import PromptSource
from rollout.sample import CompletionGroup, Prompt
from tests.grpo.test_grpo_rollouts import SOURCE, ScriptedPool, make, names
from tests.grpo.test_grpo_samples import make_group, scores

PROMPTS = [Prompt(id=f"p{i}", text="", token_ids=[1] * (1 + i * 7 % 5)) for i in range(10)]
SHORT = PromptSource(PROMPTS, seed=3)


def walk(config: CurriculumConfig, count: int, solved: dict[str, tuple[int, int]], step: int = 1) -> list[str]:
    curriculum, place, found = Curriculum(config, SHORT), 0, []
    while len(found) < count:
        taken, place = curriculum.take(place, step, (), solved)
        found += [prompt.id for prompt in taken]
    return found


def test_plain_walk() -> None:
    curriculum = Curriculum(CurriculumConfig(), SHORT)
    for place in range(30):
        assert curriculum.take(place, 3, ["p4"], {"p1": (9, 9)}) == SHORT.take(place, 3, ["p4"])


def test_short_prompts_first() -> None:
    order = walk(CurriculumConfig(short_first=True), 20, {})
    sizes = {prompt.id: len(prompt.token_ids) for prompt in PROMPTS}
    assert sorted(order[:10]) == sorted(sizes), "each once"
    assert [sizes[name] for name in order[:10]] == sorted(sizes.values())
    assert order[10:] == [prompt.id for prompt in SHORT.take(10, 10)[0]]
    with pytest.raises(ValueError, match="11 different prompts are needed, the data has 10"):
        Curriculum(CurriculumConfig(short_first=True), SHORT).take(0, 11, (), {})


def test_turns_pass_with_the_solve_rate() -> None:
    """Over 2,000 turns: p0 was always solved, p1 in 3 of 4 tries, p2 never; the others are new."""
    solved = {"p0": (4, 4), "p1": (8, 6), "p2": (8, 0)}
    found = Counter(walk(CurriculumConfig(prioritize_unsolved=True), 2000, solved))
    others = [found[f"p{i}"] for i in range(2, 10)]
    assert max(others) - min(others) <= 1, "each epoch has each of them once"
    turns = max(others)
    assert abs(found["p1"] / turns - 0.25) < 0.1 and abs(found["p0"] / turns - 0.05) < 0.05 and found["p0"] > 0
    again = walk(CurriculumConfig(prioritize_unsolved=True), 200, solved)
    assert again == walk(CurriculumConfig(prioritize_unsolved=True), 200, solved)


def test_solved_prompts_are_dropped() -> None:
    config = CurriculumConfig(drop_solved=0.9)
    solved = {"p0": (10, 9), "p1": (20, 18), "p2": (10, 8), "p3": (16, 16)}
    found = Counter(walk(config, 70, solved))
    assert set(found) == {prompt.id for prompt in PROMPTS} - {"p0", "p1", "p3"}
    assert set(found.values()) == {10}
    assert set(walk(config, 7, solved, step=7)) == set(found), "seven are left, seven are needed"
    assert len(set(walk(config, 8, solved, step=8))) == 8, "eight are needed: the dropped ones return"


def test_counts_by_hand() -> None:
    groups = [make_group("p", [1, 1, 1]), make_group("q", [1, 1, 1], failed=[2])]
    counted = count_solved({"p": (4, 1)}, groups, [scores(1.0, None, 0.5), scores(2.0, 0.9, 1.0)], at=1.0)
    assert counted == {"p": (6, 2), "q": (2, 1)}


def by_id(group: CompletionGroup, step: int) -> list[Score]:
    """Even prompts are solved by both completions, odd ones by one."""
    return [Score(value=1.0), Score(value=1.0 - int(group.prompt.id[1:]) % 2)]


@pytest.mark.parametrize("settings", [{"drop_solved": 0.9}, {"prioritize_unsolved": True}])
def test_a_continued_run_gets_the_same_prompts(settings: dict[str, Any]) -> None:
    """40 prompts in steps of 8: the first epoch ends in step 4, and from then on only odd ones are unsolved."""
    config = CurriculumConfig(**settings)

    def steps(rollouts: Any, first: int, last: int) -> list[list[str]]:
        found = []
        for step in range(first, last):
            found.append(names(rollouts.take(step)))
            rollouts.set_version(step + 1)
        return found

    whole = make(ScriptedPool(), by_id, size=8, curriculum=config)
    expected = steps(whole, 0, 9)
    late = [int(name[1:]) % 2 for step in expected[5:] for name in step]
    assert sum(late) / len(late) > 0.75 and (sum(late) == len(late) or "prioritize_unsolved" in settings)

    first = make(ScriptedPool(), by_id, size=8, curriculum=config)
    steps(first, 0, 6)
    file = io.BytesIO()
    torch.save(first.state.to_plain(), file)
    file.seek(0)
    state = RolloutState.from_plain(torch.load(file, weights_only=True), SOURCE)
    assert state == first.state and sum(tries for tries, _ in state.solved.values()) == 6 * 8 * 2
    rest = make(ScriptedPool(), by_id, state=state, size=8, curriculum=config)
    rest._next_step = 6
    rest.set_version(6)
    assert steps(rest, 6, 9) == expected[6:]
    for rollouts in (whole, first, rest):
        rollouts.close()


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"drop_solved must be from 0 to 1, got 1.5; 0.9 is usual"):
        CurriculumConfig(drop_solved=1.5)
