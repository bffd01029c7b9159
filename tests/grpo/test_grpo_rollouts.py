"""Pins how the groups of a step come together, with a pool whose every move is scripted.

1. Groups are scored while others are still sampled, and come in their prompts' order.
2. Dynamic sampling replaces groups without spread, up to its limit, and says which.
3. Partial rollouts stop the engines when a step has its groups; the others go on in the next step, older ones first.
4. With overlap the next steps are sampled while the learner works, never with weights older than `max_policy_lag`;
   engines are still while they get new weights, and go on afterwards.
5. What has become too old is sampled again. A saved state continues where it was.
6. What sampling or scoring raises reaches the caller.
"""

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from grpo.rollouts import Batch, RolloutConfig, Rollouts, RolloutState
from rewards import Score
from rollout.pool import EnginePool
from rollout.prompts import PromptSource
from rollout.sample import Completion, CompletionGroup, FinishReason, Prompt, SamplingParams
from rollout.stream import Work

LIMIT_S = 20.0
SOURCE = PromptSource([Prompt(id=f"p{i}", text="", token_ids=[1]) for i in range(40)], seed=0)
ORDER = [prompt.id for prompt in SOURCE.take(0, 40)[0]]


class ScriptedPool(EnginePool):
    """Finishes one group after the other, the last given first; `before` is called for each and may wait."""

    def __init__(self, before: Callable[[str], object] = lambda name: None) -> None:
        self.before, self.version = before, 0
        self.asked: list[list[str]] = []

    def generate(
        self, work: Sequence[Work], params: SamplingParams, *, stop: threading.Event | None = None
    ) -> Iterator[CompletionGroup]:
        assert stop is not None
        self.asked.append([one.id if isinstance(one, Prompt) else one.prompt.id for one in work])
        for one in reversed(work):
            prompt, so_far = (one, []) if isinstance(one, Prompt) else (one.prompt, one.completions)
            if so_far and not any(c.finish_reason is FinishReason.PAUSED for c in so_far):
                yield CompletionGroup(prompt=prompt, completions=so_far)
                continue
            self.before(prompt.id)
            reason = FinishReason.PAUSED if stop.is_set() else FinishReason.STOP
            yield CompletionGroup(prompt=prompt, completions=[self._grow(i, so_far, reason) for i in range(2)])

    def _grow(self, index: int, so_far: list[Completion], reason: FinishReason) -> Completion:
        """One token more, of the present version."""
        before = so_far[index] if so_far else None
        return Completion(
            token_ids=[*(before.token_ids if before else []), 5],
            logprobs=[*(before.logprobs if before else []), -1.0],
            finish_reason=reason,
            version_spans=(*(before.version_spans if before else ()), (self.version, 1)),
            seed=index,
            expert_ids=np.full((2, 1, 1), 3, np.uint8),
        )

    def score(self, sequences: object) -> list[Any]:
        raise NotImplementedError

    load_weights = probe = reject_weights = sleep = wake = score  # type: ignore[assignment]

    def close(self) -> None:
        pass


def two_values(group: CompletionGroup, step: int) -> list[Score]:
    return [Score(value=0.0), Score(value=1.0)]


def make(
    pool: EnginePool,
    score: Callable[[CompletionGroup, int], list[Score]] = two_values,
    state: RolloutState | None = None,
    size: int = 3,
    **config: Any,
) -> Rollouts:
    return Rollouts(
        RolloutConfig(**config), pool, SOURCE, score, lambda step: SamplingParams(max_tokens=9, stop_token_id=0),
        prompts_per_step=size, state=state or RolloutState(), first_step=0, last_step=9,
    )  # fmt: skip


def names(batch: Batch) -> list[str]:
    return [group.prompt.id for group in batch.groups]


def test_groups_are_scored_while_others_are_sampled() -> None:
    scored: list[str] = []
    first_score = threading.Event()

    def score(group: CompletionGroup, step: int) -> list[Score]:
        scored.append(group.prompt.id)
        first_score.set()
        return two_values(group, step)

    def before(name: str) -> None:
        if name == ORDER[0]:  # sampled last
            assert first_score.wait(LIMIT_S), "no group was scored before the last one was sampled"

    rollouts = make(ScriptedPool(before), score)
    batch = rollouts.take(0)
    assert scored == [ORDER[2], ORDER[1], ORDER[0]]
    assert names(batch) == ORDER[:3] and len(batch.scores) == 3 and batch.replaced == []
    with pytest.raises(AssertionError, match="step 1 needs weights of version 1, engines hold 0"):
        rollouts.take(1)
    rollouts.set_version(1)
    assert names(rollouts.take(1)) == ORDER[3:6]
    rollouts.close()


def flat_for(*flat: str) -> Callable[[CompletionGroup, int], list[Score]]:
    def score(group: CompletionGroup, step: int) -> list[Score]:
        same = group.prompt.id in flat
        return [Score(value=1.0), Score(value=1.0 if same else 0.0)]

    return score


def test_groups_without_spread_are_replaced() -> None:
    pool = ScriptedPool()
    rollouts = make(pool, flat_for(ORDER[1], ORDER[3]), max_oversampling=2)
    batch = rollouts.take(0)
    assert pool.asked == [ORDER[:3], [ORDER[3]], [ORDER[4]]], "no more than are missing"
    assert names(batch) == [ORDER[0], ORDER[2], ORDER[4]]
    assert sorted(group.prompt.id for group, _ in batch.replaced) == sorted([ORDER[1], ORDER[3]])
    assert len(batch.sampled) == len(batch.sampled_scores) == 5
    rollouts.set_version(1)
    assert names(rollouts.take(1)) == ORDER[5:8]
    rollouts.close()


def test_dynamic_sampling_ends_at_its_limit() -> None:
    pool = ScriptedPool()
    batch = make(pool, flat_for(*ORDER[1:]), max_oversampling=1.4).take(0)  # 4.2 prompts: 4
    assert names(batch) == [ORDER[0]] and len(batch.replaced) == 3
    assert pool.asked == [ORDER[:3], [ORDER[3]]]
    without = make(ScriptedPool(), flat_for(*ORDER)).take(0)
    assert names(without) == ORDER[:3], "off, groups without spread stay"


def test_unfinished_groups_go_on_in_the_next_step() -> None:
    pool = ScriptedPool()
    enough = threading.Event()

    def score(group: CompletionGroup, step: int) -> list[Score]:
        return two_values(group, step)

    rollouts = make(pool, score, size=2, partial_share=1.0, max_policy_lag=1)

    def before(name: str) -> None:
        if name in ORDER[:2] and pool.version == 0:  # the last two of four in flight
            assert rollouts._stop.wait(LIMIT_S), "two groups are there, the engines should stop"
            enough.set()

    pool.before = before
    first = rollouts.take(0)
    assert pool.asked == [ORDER[:4]] and enough.is_set()
    assert names(first) == ORDER[2:4]
    carried = rollouts.state.carried
    assert [group.prompt.id for group in carried] == [ORDER[1], ORDER[0]]
    pool.version = 1
    rollouts.set_version(1)
    second = rollouts.take(1)
    assert pool.asked[1] == [ORDER[1], ORDER[0], *ORDER[4:6]]
    of_first = {group.prompt.id: group for group in second.groups}
    spans = {name: group.completions[0].version_spans for name, group in of_first.items()}
    assert set(spans) <= {ORDER[0], ORDER[1], ORDER[4], ORDER[5]} and len(spans) == 2
    assert all(s == ((0, 1), (1, 1)) for name, s in spans.items() if name in ORDER[:2])
    rollouts.close()


def paused_group(name: str, version: int) -> CompletionGroup:
    pool = ScriptedPool()
    pool.version = version
    prompt = next(prompt for prompt in SOURCE.prompts if prompt.id == name)
    return CompletionGroup(prompt=prompt, completions=[pool._grow(i, [], FinishReason.PAUSED) for i in range(2)])


def test_a_saved_state_continues() -> None:
    state = RolloutState(place=5, carried=(paused_group(ORDER[1], 0), paused_group(ORDER[4], 0)))
    file = io.BytesIO()
    torch.save(state.to_plain(), file)
    file.seek(0)
    restored = RolloutState.from_plain(torch.load(file, weights_only=True), SOURCE)
    assert restored == state
    first, expected = restored.carried[0].completions[0].expert_ids, state.carried[0].completions[0].expert_ids
    assert first is not None and expected is not None and (first == expected).all() and first.dtype == np.uint8
    pool = ScriptedPool()
    rollouts = make(pool, state=restored)
    assert names(rollouts.take(0)) == [ORDER[1], ORDER[4], ORDER[5]]
    assert rollouts.state == RolloutState(place=6)
    with pytest.raises(ValueError, match=f"prompts that the data lacks: .'{ORDER[1]}'"):
        RolloutState.from_plain(state.to_plain(), PromptSource([SOURCE.prompts[0]], seed=0))


def test_what_is_too_old_is_sampled_again() -> None:
    pool = ScriptedPool()
    pool.version = 3
    old, young = paused_group(ORDER[0], 1), paused_group(ORDER[1], 2)
    rollouts = Rollouts(
        RolloutConfig(partial_share=0.5, max_policy_lag=1), pool, SOURCE, two_values,
        lambda step: SamplingParams(max_tokens=9, stop_token_id=0), prompts_per_step=2,
        state=RolloutState(place=2, carried=(old, young)), first_step=3, last_step=9,
    )  # fmt: skip
    batch = rollouts.take(3)
    assert batch.restarted == 1
    spans = {group.prompt.id: group.completions[0].version_spans for group in [*batch.groups, *rollouts.state.carried]}
    assert spans[ORDER[0]] == ((3, 1),) and spans[ORDER[1]] == ((2, 1), (3, 1))
    rollouts.close()


def test_overlap_is_bounded_and_still_during_a_sync() -> None:
    sampling, begun = threading.Event(), {name: threading.Event() for name in ORDER}

    def before(name: str) -> None:
        begun[name].set()
        sampling.set()

    pool = ScriptedPool(before)
    rollouts = make(pool, size=1, overlap=True, max_policy_lag=1)
    assert names(rollouts.take(0)) == [ORDER[0]]
    assert begun[ORDER[1]].wait(LIMIT_S), "step 1 is sampled while the learner is at step 0"
    assert names(rollouts.take(1)) == [ORDER[1]]
    assert not begun[ORDER[2]].wait(0.2), "step 2 must wait for version 1"
    with rollouts.paused():
        sampling.clear()
        pool.version = 1
        rollouts.set_version(1)
        assert not sampling.wait(0.2), "the engines sample while they get new weights"
    assert begun[ORDER[2]].wait(LIMIT_S)
    batch = rollouts.take(2)
    assert names(batch) == [ORDER[2]] and batch.groups[0].completions[0].version_spans == ((1, 1),)
    rollouts.close()


def test_a_sync_pauses_what_is_under_way() -> None:
    """The group begun under version 0 goes on under version 1."""
    pool = ScriptedPool()
    rollouts = make(pool, size=1, overlap=True, max_policy_lag=1)
    held = threading.Event()

    def before(name: str) -> None:
        if name == ORDER[1] and pool.version == 0:
            held.set()
            assert rollouts._stop.wait(LIMIT_S)

    pool.before = before
    rollouts.take(0)
    assert held.wait(LIMIT_S)
    with rollouts.paused():
        pool.version = 1
        rollouts.set_version(1)
    (group,) = rollouts.take(1).groups
    assert group.completions[0].version_spans == ((0, 1), (1, 1))
    rollouts.close()


def test_what_was_sampled_ahead_is_sampled_again_by_a_resumed_run() -> None:
    begun = threading.Event()
    pool = ScriptedPool(lambda name: begun.set() if name == ORDER[5] else None)
    rollouts = make(pool, overlap=True, max_policy_lag=1)
    rollouts.take(0)
    assert begun.wait(LIMIT_S)
    assert rollouts.state == RolloutState(place=3), "step 1 has been begun and not been taken"
    rollouts.close()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("where", ["sampling", "scoring"])
def test_errors_reach_the_caller(where: str, overlap: bool) -> None:
    def fail(*_: object) -> list[Score]:
        raise ZeroDivisionError(where)

    pool = ScriptedPool(fail if where == "sampling" else lambda name: None)
    rollouts = make(pool, fail if where == "scoring" else two_values, overlap=overlap, max_policy_lag=int(overlap))
    with pytest.raises(ZeroDivisionError, match=where):
        rollouts.take(0)
    rollouts.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_oversampling": 0.5}, "max_oversampling >= 1"),
        ({"overlap": True}, "set max_policy_lag >= 1"),
        ({"partial_share": 0.5}, "set max_policy_lag >= 1"),
    ],
)
def test_wrong_settings_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**config)
