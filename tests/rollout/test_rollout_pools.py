"""Pools, prompt source, probe: the parts of rollout that need no vLLM.

Pinned: (1) two native engines in Ray actors give what one in this process gives, in any order; (2) weights reach every
Ray engine; (3) a NaN and a single wrong engine fail the probe; (4) prompt batches are stateless, each epoch a
permutation.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

from models import hf_tensors, save_pretrained
from rollout.engine import EngineConfig
from rollout.native_engine import NativeEngine
from rollout.pool import LocalPool, build_pool
from rollout.probe import ProbeAnswer
from rollout.prompts import PromptSource
from rollout.sample import SamplingParams
from rollout.weight_sync import SyncError, probe_sequences, push_weights
from tests.models.test_models_parity import CORNERS, sharp_model
from tests.rollout.test_rollout_native_engine import make_prompts

PARAMS = SamplingParams(num_completions=3, max_tokens=8, stop_token_id=3, seed=6)


@pytest.mark.slow
def test_ray_pool_equals_local_pool(tmp_path: Path) -> None:
    model, other = sharp_model(CORNERS["groups"]), sharp_model(CORNERS["groups"], seed=8)
    save_pretrained(model, tmp_path / "model")
    prompts = make_prompts(5)
    engine = EngineConfig(kind="native", transport="ray", num_engines=2, max_model_len=64)
    local_config = EngineConfig(kind="native", transport="local", max_model_len=64)
    local = LocalPool(local_config, str(tmp_path / "model"))
    remote = build_pool(engine, str(tmp_path / "model"))
    try:
        for version, weights in ((0, None), (1, other)):
            if weights is not None:
                for pool in (local, remote):
                    pool.load_weights(hf_tensors(weights), version)
            expected = {g.prompt.id: [c.token_ids for c in g.completions] for g in local.generate(prompts, PARAMS)}
            groups = list(remote.generate(prompts, PARAMS))
            assert expected == {g.prompt.id: [c.token_ids for c in g.completions] for g in groups}
            assert {c.policy_version for g in groups for c in g.completions} == {version}
            sequences = [prompt.token_ids for prompt in prompts]
            first, second = remote.score(sequences)
            assert first == second
            learner = NativeEngine(local_config, str(tmp_path / "model"))
            learner.load_weights(hf_tensors(weights or model), version)
            for pool in (local, remote):
                drift = push_weights(pool, hf_tensors(weights or model), version, sequences, learner.score, 1e-5)
                assert drift is not None and drift < 1e-5
    finally:
        remote.close()


class FixedScores(LocalPool):
    """A pool whose engines answer every probe with the scores given, for [1, 2, 3] or for 2, 3 decoded after 1."""

    def __init__(self, scores: list[list[list[float]]], decoded: bool) -> None:
        right = [[-1.0, -2.0]]
        self._answers = [
            ProbeAnswer(right if decoded else wrong, [[1, 2, 3]], wrong if decoded else right) for wrong in scores
        ]
        self.calls: list[str] = []

    def probe(self, sequences: Sequence[Sequence[int]]) -> list[ProbeAnswer]:
        self.calls.append("probe")
        return self._answers

    def load_weights(self, weights: object, version: int) -> None:
        self.calls.append("load")

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        self.calls.append(f"wake {part}")

    def reject_weights(self, reason: str) -> None:
        self.calls.append("reject")


@pytest.mark.parametrize("decoded", [False, True], ids=["scored", "decoded"])
@pytest.mark.parametrize(
    ("engines", "failing"),
    [
        ([[[-1.0, -2.0]], [[-1.0, -2.0]]], None),
        ([[[-1.0, -2.0]], [[-1.0, -2.01]]], 1),
        ([[[-1.0, float("nan")]], [[-1.0, -2.0]]], 0),
        ([[[-1.0, float("-inf")]]], 0),
    ],
)
def test_every_engine_must_pass_the_probe(engines: list[list[list[float]]], failing: int | None, decoded: bool) -> None:
    pool = FixedScores(engines, decoded)

    def push(version: int = 4, probe_every: int = 1) -> float | None:
        return push_weights(pool, [], version, [[1, 2, 3]], lambda sequences: [[-1.0, -2.0]], 1e-3, probe_every)

    order = ["wake weights", "load", "wake kv_cache", "probe"]
    if failing is None:
        assert push() == 0.0
        assert pool.calls == order
    else:
        with pytest.raises(SyncError, match=f"version 4, engine {failing}"):
            push()
        assert pool.calls == [*order, "reject"], "engines that failed the probe must not go on"
    pool.calls.clear()
    assert push(version=5, probe_every=3) is None, "5 is no multiple of 3"
    assert pool.calls == order[:-1]


def test_probe_sequences_are_fixed_and_cover_the_vocabulary() -> None:
    probe = probe_sequences(make_prompts(9), 97, max_tokens=5)
    assert probe == probe_sequences(make_prompts(9), 97, max_tokens=5)
    assert [len(sequence) for sequence in probe] == [3, 5, 5, 5, 32, 32, 32, 32]
    assert len({token for sequence in probe for token in sequence}) > 60


def test_prompt_batches_are_stateless_epochs() -> None:
    prompts = make_prompts(10)
    source = PromptSource(prompts, seed=1)
    batches = [[p.id for p in source.batch(step, 3)] for step in range(6)]
    assert batches == [[p.id for p in PromptSource(prompts, seed=1).batch(step, 3)] for step in range(6)]
    for epoch in (batches[:3], batches[3:]):
        assert len({name for batch in epoch for name in batch}) == 9, "no prompt twice in an epoch"
    assert batches[:3] != batches[3:]
    assert batches != [[p.id for p in PromptSource(prompts, seed=2).batch(step, 3)] for step in range(6)]
    with pytest.raises(ValueError, match="a step needs 11 different prompts, the data has 10"):
        source.batch(0, 11)
    with pytest.raises(ValueError, match="prompt id 'p0' occurs twice"):
        PromptSource([prompts[0], prompts[0]], seed=0)
    with pytest.raises(ValueError, match="no prompt"):
        PromptSource([], seed=0)


def test_seeds_of_completions_are_their_own() -> None:
    seeds = {PARAMS.seed_of(f"p{prompt}", index) for prompt in range(50) for index in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)
    assert PARAMS.seed_of("p1", 0) == SamplingParams(max_tokens=1, stop_token_id=0, seed=6).seed_of("p1", 0)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="transport 'local' runs exactly 1 engine, got num_engines=2; use 'ray'"):
        EngineConfig(transport="local", num_engines=2)
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        SamplingParams(max_tokens=1, temperature=-1, stop_token_id=0)
