"""Pins advantages that look beyond one number per group: baselines, the batch's deviation, and step rewards.

1. Leave-one-out and batch baselines, and the batch's deviation, by hand; uneven groups and unscored completions.
2. RLOO is the unscaled advantage times n / (n - 1). Order and number of groups change nothing within a group.
3. Process supervision by hand (arXiv:2402.03300 section 4.1.3), on lists and from a reward's steps to tokens.
4. Groups are told apart by prompt id, not by their text; truncated completions leave the loss, not the baseline; KL in
   the reward comes off it before the baseline.
5. Mixtures without a meaning are refused.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantages import AdvantageConfig, batch_advantages, group_advantages, process_advantages
from grpo.batch import BatchTotals
from grpo.objective import ObjectiveConfig
from grpo.packing import pack
from grpo.samples import build_samples
from rewards import Gate, Rubric, Sample, Score, reward
from rollout.sample import FinishReason
from tests.grpo.test_grpo_advantages import GROUPS, assert_equal
from tests.grpo.test_grpo_samples import UNSCALED, decode, make_group, scores
from tests.grpo.test_grpo_trainer import make_learner, make_recorder, make_trainer, policy

__all__ = ["policy"]

GROUP_OF_FOUR, GROUP_OF_TWO = [1.0, 0.0, 0.0, None], [4.0, 2.0]
PROCESS = AdvantageConfig(supervision="process")


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        # The means are 1/3 and 3.
        ("group", "none", [[2 / 3, -1 / 3, -1 / 3, None], [1.0, -1.0]]),
        # Of the others: 0, 1/2, 1/2; and 2, 4.
        ("leave_one_out", "none", [[1.0, -0.5, -0.5, None], [2.0, -2.0]]),
        # Of all five rewards: 7/5.
        ("batch", "none", [[-0.4, -1.4, -1.4, None], [2.6, 0.6]]),
        # Squares of the first row sum to 6/9 + 2, over n - 1 = 4.
        ("group", "batch_std", [[x / (math.sqrt(2 / 3) + 1e-6) for x in (2 / 3, -1 / 3, -1 / 3)], None]),
        # Squares of the third row sum to 11.2, over 4.
        ("batch", "batch_std", [[x / (math.sqrt(2.8) + 1e-6) for x in (-0.4, -1.4, -1.4)], None]),
    ],
)
def test_baselines_by_hand(baseline: Any, scale: Any, expected: list[Any]) -> None:
    found = batch_advantages([GROUP_OF_FOUR, GROUP_OF_TWO], AdvantageConfig(baseline=baseline, scale=scale))
    if expected[1] is None:
        second = {"group": (1.0, -1.0), "batch": (2.6, 0.6)}[baseline]
        divisor = math.sqrt(2 / 3 if baseline == "group" else 2.8) + 1e-6
        expected = [[*expected[0], None], [x / divisor for x in second]]
    for group, by_hand in zip(found, expected, strict=True):
        assert_equal(group, by_hand)


@settings(deadline=None)  # a busy machine is slow, not wrong
@given(rewards=GROUPS, other=GROUPS)
def test_leave_one_out_is_the_unscaled_advantage_enlarged(rewards: list[float], other: list[float]) -> None:
    config = AdvantageConfig(baseline="leave_one_out", scale="none")
    found, _ = batch_advantages([rewards, other], config)
    n = len(rewards)
    by_hand = [r - (math.fsum(rewards) - r) / (n - 1) for r in rewards]
    assert found == pytest.approx(by_hand, abs=1e-9)
    assert found == pytest.approx([a and a * n / (n - 1) for a in group_advantages(rewards, scale="none")], abs=1e-9)


@settings(deadline=None)
@given(groups=st.lists(GROUPS, min_size=1, max_size=5), scale=st.sampled_from(["std", "none"]))
def test_each_group_for_itself(groups: list[list[float]], scale: Any) -> None:
    found = batch_advantages(groups, AdvantageConfig(scale=scale))
    assert found == [group_advantages(group, scale=scale) for group in groups]


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch"])
def test_no_spread_anywhere_is_exactly_zero(baseline: Any) -> None:
    found = batch_advantages([[0.1] * 3, [0.1, None, 0.1]], AdvantageConfig(baseline=baseline, scale="batch_std"))
    assert found == [[0.0] * 3, [0.0, None, 0.0]]


def test_a_flat_group_among_others() -> None:
    """Nothing to learn from its own mean; something from the batch's, 0.6."""
    groups = [[1.0, 1.0], [1.0, 0.0, 0.0]]
    assert batch_advantages(groups, AdvantageConfig())[0] == [0.0, 0.0]
    assert batch_advantages(groups, AdvantageConfig(scale="batch_std"))[0] == [0.0, 0.0]
    assert batch_advantages(groups, AdvantageConfig(baseline="batch", scale="none"))[0] == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch"])
def test_a_lone_reward_and_a_lone_completion(baseline: Any) -> None:
    config = AdvantageConfig(baseline=baseline, scale="none")
    found = batch_advantages([[None, 9.0], [1.0, 0.0]], config)
    others = [1.0, -1.0] if baseline == "leave_one_out" else [0.5, -0.5]
    assert found == [[None, None], others], "the lone 9 moves no mean"
    with pytest.raises(ValueError, match="at least 2 completions for its baseline, got 1"):
        batch_advantages([[1.0, 0.0], [1.0]], config)


def test_process_supervision_by_hand() -> None:
    """Step rewards 1, 0 and 2, 1: mean 1, deviation sqrt(2/3), so -d and d for 0 and 2."""
    d = 1 / (math.sqrt(2 / 3) + 1e-6)
    first, second, third = process_advantages(
        [[(2, 1.0), (4, 0.0)], [(1, 2.0), (3, 1.0)], None], [5, 3, 2], scale="std"
    )
    assert first == pytest.approx([-d, -d, -d, -d, 0.0])
    assert second == pytest.approx([d, 0.0, 0.0])
    assert third is None
    (plain, _) = process_advantages([[(1, 3.0), (2, 0.0)], [(1, 0.0)]], [2, 1], scale="none")
    assert plain == pytest.approx([2.0 - 1.0, -1.0]), "of both steps, then of the second"


@pytest.mark.parametrize("scale", ["std", "none"])
def test_process_supervision_at_the_edges(scale: Any) -> None:
    assert process_advantages([[(2, 0.3)], [(1, 0.3), (2, 0.3)]], [2, 2], scale=scale) == [[0.0, 0.0]] * 2
    assert process_advantages([[(2, 0.3)], []], [2, 2], scale=scale) == [None, None]
    with pytest.raises(ValueError, match="at least 2 completions for its baseline, got 1"):
        process_advantages([[(1, 1.0), (2, 0.0)]], [2], scale=scale)


def test_from_a_rewards_steps_to_tokens() -> None:
    """Texts are aaaa and bb behind the forced "<t>"; steps end behind characters 3 (nothing sampled), 5, 7 and 5."""
    group = make_group("p", [4, 2, 3, 3], prefill="<t>", failed=[3])
    steps = [((3, 9.0), (5, 1.0), (7, 0.0)), ((5, 2.0),), (), ((4, 5.0),)]
    given_scores = [Score(value=0.0, steps=one) for one in steps]
    samples, counts = build_samples([group], [given_scores], PROCESS, temperature=1.0, version=0, decode=decode)
    mean, rewards = 3.0, [9.0, 1.0, 0.0, 2.0]
    d = 1 / (math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3) + 1e-6)
    assert [len(sample.token_ids) for sample in samples] == [7, 5]
    assert samples[0].token_advantages == pytest.approx([0.0] * 3 + [-5 * d, -5 * d, -3 * d, -3 * d])
    assert samples[1].token_advantages == pytest.approx([0.0] * 3 + [-d, -d])
    assert counts["samples/unscored"] == counts["samples/failed"] == 1 / 4
    (batch,) = pack(samples, 99, "token")
    assert batch.advantages_N.tolist() == pytest.approx([-5 * d, -5 * d, -3 * d, -3 * d, -d, -d])


def test_steps_pass_a_rubric_with_weights_and_gates() -> None:
    @reward(weight=2.0)
    def steps(completion: str) -> Score:
        return Score(value=0.5, steps=((1, 0.0), (len(completion), 1.0)))

    @reward(weight=1.0)
    def other(completion: str) -> Score:
        return Score(value=float(completion == "abc"), steps=((2, 0.25),))

    rubric = Rubric([steps, other], gates=[Gate(reward="steps", only_if="other")])
    assert rubric.score(Sample(prompt="", completion="abc")).steps == ((1, 0.0), (2, 0.25), (3, 2.0))
    assert rubric.score(Sample(prompt="", completion="abcd")).steps == ((2, 0.25),)


def test_steps_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"steps of a Score end at characters \[3, 2\]; give them in order"):
        Score(value=0.0, steps=((3, 1.0), (2, 1.0)))
    with pytest.raises(ValueError, match="step up to character 3 must be finite, got nan"):
        Score(value=0.0, steps=((3, math.nan),))

    @reward
    def beyond(completion: str) -> Score:
        return Score(value=1.0, steps=((9, 1.0),))

    score = beyond.score(Sample(prompt="", completion="abc"))
    assert score.value is None and "a step ends at character 9 of 3" in score.info["error"]


def test_prompts_of_one_text_are_two_groups() -> None:
    groups = [make_group(name, [1, 1]) for name in ("p", "q")]
    assert groups[0].prompt.token_ids == groups[1].prompt.token_ids
    samples, _ = build_samples(groups, [scores(0, 1), scores(5, 7)], UNSCALED, temperature=1.0, version=0)
    assert [sample.advantage for sample in samples] == [-0.5, 0.5, -1.0, 1.0]


def test_truncated_completions_leave_the_loss_but_not_the_baseline() -> None:
    group = make_group("p", [2, 3, 1])
    group.completions[1] = replace(group.completions[1], finish_reason=FinishReason.LENGTH)
    for train_truncated, expected in ((True, [-3.0, 0.0, 3.0]), (False, [-3.0, 3.0])):
        samples, counts = build_samples(
            [group], [scores(0, 3, 6)], UNSCALED, temperature=1.0, version=0, train_truncated=train_truncated
        )
        assert [sample.advantage for sample in samples] == expected
        assert counts["samples/truncated"] == (0 if train_truncated else 1 / 3)
        tokens = 6 if train_truncated else 3
        assert BatchTotals.of(samples) == BatchTotals(samples=len(expected), tokens=tokens, positive_tokens=1)


def test_kl_comes_off_the_reward() -> None:
    """Rewards 0, 3, 6 lose 1, 2 and 0: -1, 1, 6, whose mean is 2."""
    group = make_group("p", [2, 3, 1, 1], failed=[3])
    samples, _ = build_samples(
        [group], [scores(0, 3, 6, 50)], UNSCALED, temperature=1.0, version=0,
        penalize=lambda drafts: [{5: 1.0, 6: 2.0, 4: 0.0}[len(draft.token_ids)] for draft in drafts],
    )  # fmt: skip
    assert [sample.advantage for sample in samples] == [-3.0, -1.0, 4.0]


def by_token(sample: Sample) -> Score:
    """Each number of the text is a step, and even ones are right."""
    ends = [match.end() for match in re.finditer(r"\d+", sample.completion)]
    rights = [float(token % 2 == 0) for token in sample.completion_ids]
    return Score(value=0.0, steps=tuple(zip(ends, rights, strict=True)))


def test_a_trainer_with_step_rewards(policy: Path, tmp_path: Path) -> None:
    """All completions have the same value; what they learn from are the steps."""
    learner = make_recorder(policy)
    make_trainer(policy, tmp_path / "run", learner=learner, steps=1, reward=by_token, advantages=PROCESS).run()
    (batch,) = learner.batches
    for group in (batch[0:4], batch[4:8], batch[8:12]):
        completions = [sample.token_ids[3:] for sample in group]
        steps = [[(n, float(token % 2 == 0)) for n, token in enumerate(ids, 1)] for ids in completions]
        expected = process_advantages(steps, [len(ids) for ids in completions], scale="std")
        assert [sample.token_advantages for sample in group] == [[0.0] * 3 + (one or []) for one in expected]
    assert any(any(sample.token_advantages or ()) for sample in batch)
    learner = make_learner(policy, objective=ObjectiveConfig(loss="gmpo"))
    with pytest.raises(ValueError, match="choose another loss than gmpo"):
        make_trainer(policy, tmp_path / "other", learner=learner, advantages=PROCESS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"baseline": "batch", "scale": "std"}, "mixes batch and group; set scale to batch_std or none"),
        ({"supervision": "process", "baseline": "leave_one_out"}, "got 'leave_one_out' and 'std'"),
        ({"supervision": "process", "scale": "batch_std"}, "set baseline to group and scale to std or none"),
    ],
)
def test_mixtures_without_a_meaning_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdvantageConfig(**wrong)
