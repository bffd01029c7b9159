"""Pins sampling with top-k and top-p: what is kept, and that the learner's probabilities are the sampler's.

1. The kept set and its probabilities by hand; equal ones at the k-th place stay; top-p looks at what top-k left.
2. The native engine records the set of each token, drafted tokens and paused completions included.
3. With it the learner's log-probabilities equal the recorded ones to 1e-5; without it they do not.
4. What an environment wrote has no set, and a checkpoint of unfinished completions keeps the others'.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo.advantages import AdvantageConfig
from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.packing import pack
from grpo.rollouts import RolloutState
from grpo.samples import build_samples
from models import load_pretrained, save_pretrained
from rewards import Score
from rollout.decoding import kept_tokens, restricted
from rollout.engine import EngineConfig
from rollout.environment import observed, unanswered
from rollout.native_engine import NativeEngine
from rollout.prompts import PromptSource
from rollout.sample import NOTHING_KEPT, Completion, CompletionGroup, FinishReason, Prompt, SamplingParams
from rollout.stream import requests_of
from tests.models.test_models_mtp import CONFIG as WITH_MODULES
from tests.models.test_models_parity import BASE, sharp_model

PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.06, 0.04])
PROMPTS = [Prompt(id=str(i), text="", token_ids=[i + 1, 40 + i, 7]) for i in range(3)]


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.2, 4: 0.06, 5: 0.04}),
        (1, 1.0, {1: 1.0}),
        (2, 1.0, {1: 0.5, 2: 0.25, 3: 0.25}),  # the third equals the second
        (4, 1.0, {0: 1 / 9, 1: 4 / 9, 2: 2 / 9, 3: 2 / 9}),
        (99, 1.0, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.2, 4: 0.06, 5: 0.04}),
        (0, 0.39, {1: 1.0}),
        (0, 0.5, {1: 2 / 3, 2: 1 / 3}),  # of equals the first
        (0, 0.85, {0: 1 / 9, 1: 4 / 9, 2: 2 / 9, 3: 2 / 9}),
        (4, 0.85, {1: 0.5, 2: 0.25, 3: 0.25}),  # 0.8 of the whole is 0.89 of the four
        (0, 1e-9, {1: 1.0}),
    ],
)
def test_kept_set_by_hand(top_k: int, top_p: float, kept: dict[int, float]) -> None:
    logprobs_NV = restricted(PROBABILITIES.log().repeat(2, 1), top_k, top_p)
    assert [ids.tolist() for ids in kept_tokens(logprobs_NV)] == [list(kept)] * 2
    found = {token: p for token, p in enumerate(logprobs_NV[1].exp().tolist()) if p}
    assert found == pytest.approx(kept, rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept")
    save_pretrained(sharp_model(BASE), path / "plain")
    save_pretrained(sharp_model(WITH_MODULES), path / "drafting")
    return path


def build(groups: Sequence[CompletionGroup], temperature: float) -> list[TrainingSample]:
    scores = [[Score(value=float(i)) for i in range(len(group.completions))] for group in groups]
    return build_samples(groups, scores, AdvantageConfig(), temperature=temperature, version=0)[0]


@pytest.mark.parametrize("name", ["plain", "drafting"])
@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 0.8, 1.0), (5, 1.0, 0.7), (12, 0.9, 1.3), (1, 1.0, 1.0)]
)
def test_the_learner_sees_the_samplers_probabilities(
    top_k: int, top_p: float, temperature: float, name: str, folder: Path
) -> None:
    drafts = 1 if name == "drafting" else 0
    config = EngineConfig(kind="native", max_model_len=48, num_speculative_tokens=drafts)
    engine = NativeEngine(config, str(folder / name))
    params = SamplingParams(
        num_completions=3, max_tokens=20, temperature=temperature, top_k=top_k, top_p=top_p, stop_token_id=96, seed=3
    )
    groups = engine.generate(PROMPTS, params)
    sizes = [len(ids) for group in groups for c in group.completions for ids in c.kept_ids or ()]
    assert len(sizes) == sum(group.num_tokens for group in groups)
    assert max(sizes) < 80 and (top_k == 0 or max(sizes) <= top_k), "all was kept, or more than k"
    learner = Learner(load_pretrained(folder / name), LearnerConfig(lr=0.0, token_budget=60), total_steps=1)
    samples = build(groups, temperature)
    assert learner.update(samples)["mismatch/abs_max"] < 1e-5
    assert learner.update([replace(s, kept_ids=None) for s in samples])["mismatch/abs_max"] > 0.05


def test_a_paused_completion_goes_on_with_its_sets(folder: Path) -> None:
    engine = NativeEngine(EngineConfig(kind="native", max_model_len=48), str(folder / "plain"))
    params = SamplingParams(max_tokens=12, top_p=0.7, stop_token_id=96, seed=5)
    whole = engine.generate(PROMPTS[:1], params)[0].completions[0]
    (request,) = requests_of(PROMPTS[0], params)
    batch = engine.start_batch(params)
    batch.admit([request])
    for _ in range(4):
        batch.step()
    (paused,) = batch.pause()
    so_far = paused.completion
    assert so_far.kept_ids is not None and 0 < len(so_far.kept_ids) == len(so_far.token_ids) < len(whole.token_ids)
    batch.admit([replace(request, so_far=so_far)])
    finished = batch.step()
    while not finished:
        finished = batch.step()
    completion = finished[0].completion
    assert completion.token_ids == whole.token_ids and whole.kept_ids is not None and completion.kept_ids is not None
    assert [ids.tolist() for ids in completion.kept_ids] == [ids.tolist() for ids in whole.kept_ids]


def test_greedy_decoding_keeps_no_sets(folder: Path) -> None:
    engine = NativeEngine(EngineConfig(kind="native", max_model_len=48), str(folder / "plain"))
    params = SamplingParams(max_tokens=4, top_p=0.7, temperature=0, stop_token_id=96)
    assert engine.generate(PROMPTS[:1], params)[0].completions[0].kept_ids is None


def test_answers_and_checkpoints() -> None:
    ids = tuple(np.array(part, np.int32) for part in ([1, 2], [3]))
    turn = Completion(
        token_ids=[1, 3], logprobs=[-1.0, 0.0], finish_reason=FinishReason.PAUSED, version_spans=((0, 2),), seed=1,
        kept_ids=ids,
    )  # fmt: skip
    answered = observed(turn, [8, 9])
    assert answered.kept_ids == (*ids, NOTHING_KEPT, NOTHING_KEPT)
    assert unanswered(answered).kept_ids == ids
    state = RolloutState(carried=(CompletionGroup(prompt=PROMPTS[0], completions=[turn]),))
    again = RolloutState.from_plain(state.to_plain(), PromptSource(PROMPTS, seed=0))
    kept = again.carried[0].completions[0].kept_ids
    assert kept is not None and [part.tolist() for part in kept] == [[1, 2], [3]]
    (sample,) = build([CompletionGroup(prompt=PROMPTS[0], completions=[answered, turn])], 1.0)[:1]
    assert sample.kept_counts == [0, 0, 0, 2, 1, 0, 0] and sample.kept_ids is not None
    assert sample.kept_ids.tolist() == [1, 2, 3]
    (batch,) = pack([replace(sample, kept_ids=None), sample], 99, "token")
    assert batch.kept is not None and batch.kept.rows_J.tolist() == [2, 2, 3] and batch.kept.ids_J.tolist() == [1, 2, 3]


@pytest.mark.parametrize("wrong", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}])
def test_wrong_limits_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="top_k >= 0 and top_p above 0 and at most 1"):
        SamplingParams(max_tokens=1, stop_token_id=0, **wrong)
