"""Pins the way from completion groups to training samples.

1. Rewards see the prompt without the prefill and the completion with it, and which sample they judge.
2. Each group has its own baseline, whatever its size.
3. Failed completions and those without a score leave the batch, and are counted apart.
4. Groups without spread stay in the batch with advantage 0, and are counted.
5. A training sample is prompt and completion; the mask covers the completion, log-probabilities are the engine's.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from grpo.advantages import AdvantageConfig
from grpo.samples import build_samples, reward_samples, score_groups
from rewards import Rubric, Sample, Score
from rollout.sample import Completion, CompletionGroup, FinishReason, Prompt

UNSCALED = AdvantageConfig(scale="none")


def decode(token_ids: Sequence[Sequence[int]]) -> list[str]:
    return ["".join(chr(96 + token) for token in ids) for ids in token_ids]


def make_group(name: str, lengths: Sequence[int], *, prefill: str = "", failed: Sequence[int] = ()) -> CompletionGroup:
    """Completion i has `lengths[i]` tokens i + 1, sampled at -0.1 each; those in `failed` are an engine's errors."""
    prompt = Prompt(id=name, text=f"ask {name}: {prefill}", token_ids=[20, 21, 22], prefill=prefill, row={"n": name})
    completions = [
        Completion(
            token_ids=[i + 1] * length,
            logprobs=[-0.1] * length,
            finish_reason=FinishReason.ERROR if i in failed else FinishReason.STOP,
            version_spans=((0, length),),
            seed=i,
        )
        for i, length in enumerate(lengths)
    ]
    return CompletionGroup(prompt=prompt, completions=completions)


def scores(*values: float | None) -> list[Score]:
    return [Score(value=value) for value in values]


def test_rewards_see_the_prefill_as_the_models_text() -> None:
    group = make_group("p", [2, 3], prefill="<think>")
    samples = reward_samples([group], decode, step=5)[0]
    assert samples[1] == Sample(
        prompt="ask p: ",
        completion="<think>bbb",
        completion_ids=(2, 2, 2),
        finish_reason="stop",
        row={"n": "p"},
        group_id="p",
        index=1,
        step=5,
    )
    assert samples[0].completion == "<think>aa"


def test_finish_reasons_reach_the_rewards() -> None:
    group = make_group("p", [1, 0], failed=[1])
    assert [sample.finish_reason for sample in reward_samples([group], decode, step=0)[0]] == ["stop", "error"]


def test_prefill_is_scored() -> None:
    def opens(sample: Sample) -> float:
        return float(sample.completion.startswith("<think>") and "<think>" not in sample.prompt)

    groups = [make_group("with", [1, 1], prefill="<think>"), make_group("without", [1, 1, 1])]
    values = [[score.value for score in group] for group in score_groups(groups, Rubric([opens]), decode, step=0)]
    assert values == [[1.0, 1.0], [0.0, 0.0, 0.0]]


def test_texts_stay_with_their_completions() -> None:
    groups = [make_group("p", [1, 2]), make_group("q", [3, 1, 2])]
    texts = [[sample.completion for sample in group] for group in reward_samples(groups, decode, step=0)]
    assert texts == [["a", "bb"], ["aaa", "b", "cc"]]
    scored = score_groups(groups, Rubric([lambda sample: len(sample.completion)]), decode, step=0)
    assert [[score.value for score in group] for group in scored] == [[1, 2], [3, 1, 2]]


def test_sample_by_hand() -> None:
    samples, counts = build_samples([make_group("p", [2, 1])], [scores(3, 1)], UNSCALED, temperature=0.7, version=0)
    first, second = samples
    assert first.token_ids == [20, 21, 22, 1, 1]
    assert first.loss_mask == [False, False, False, True, True]
    assert first.sampling_logprobs == [0.0, 0.0, 0.0, -0.1, -0.1]
    assert (first.advantage, first.temperature) == (1.0, 0.7)
    assert (second.token_ids, second.advantage) == ([20, 21, 22, 2], -1.0)
    assert set(counts.values()) == {0.0}


def test_samples_know_how_old_their_weights_are_and_carry_their_experts() -> None:
    group = make_group("p", [2, 1])
    ids = np.zeros((4, 1, 2), dtype=np.uint8)
    group.completions[0] = replace(group.completions[0], expert_ids=ids, version_spans=((2, 1), (3, 1)))
    (first, second), _ = build_samples([group], [scores(3, 1)], UNSCALED, temperature=1.0, version=5)
    assert first.policy_lags == [0, 0, 0, 3, 2] and second.policy_lags == [0, 0, 0, 5]
    assert first.expert_ids is ids and second.expert_ids is None


def test_each_group_has_its_own_baseline() -> None:
    groups = [make_group("p", [1, 1]), make_group("q", [1] * 5)]
    samples, _ = build_samples(groups, [scores(0, 1), scores(10, 10, 10, 10, 15)], UNSCALED, temperature=1.0, version=0)
    assert [sample.advantage for sample in samples] == [-0.5, 0.5, -1, -1, -1, -1, 4]
    scaled, _ = build_samples(
        groups, [scores(0, 1), scores(10, 10, 10, 10, 15)], AdvantageConfig(), temperature=1.0, version=0
    )
    # deviations sqrt(1/2) and sqrt(20/4)
    assert [sample.advantage for sample in scaled][1::5] == pytest.approx([0.5**0.5, 4 / 5**0.5], rel=1e-5)


def test_failed_and_unscored_completions_leave_the_batch() -> None:
    groups = [make_group("p", [1, 2, 0, 4], failed=[2]), make_group("q", [1, 1, 1, 1])]
    samples, counts = build_samples(
        groups, [scores(4, None, 100, 2), scores(1, 1, 1, 0)], UNSCALED, temperature=1.0, version=0
    )
    # In p the failed completion's reward of 100 must not move the baseline of 3.
    assert [sample.advantage for sample in samples] == [1, -1, 0.25, 0.25, 0.25, -0.75]
    assert [len(sample.token_ids) for sample in samples[:2]] == [4, 7]
    shares = {"samples/failed": 1 / 8, "samples/unscored": 1 / 8}
    assert counts == shares | {"samples/truncated": 0.0, "groups/without_spread": 0.0}


def test_flat_groups_are_kept_and_counted() -> None:
    groups = [make_group("flat", [1, 1]), make_group("spread", [1, 1]), make_group("alone", [1, 1], failed=[0])]
    samples, counts = build_samples(
        groups, [scores(0.5, 0.5), scores(0, 1), scores(1, 1)], AdvantageConfig(), temperature=1.0, version=0
    )
    assert [sample.advantage == 0 for sample in samples] == [True, True, False, False]
    assert counts["groups/without_spread"] == 2 / 3
    assert counts["samples/failed"] == 1 / 6
    assert counts["samples/unscored"] == 1 / 6, "the one left without a baseline"


def test_missing_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        build_samples([make_group("p", [1, 1])], [scores(1)], AdvantageConfig(), temperature=1.0, version=0)
    with pytest.raises(ValueError, match="zip"):
        build_samples([make_group("p", [1, 1])], [], AdvantageConfig(), temperature=1.0, version=0)
