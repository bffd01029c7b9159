"""Pools, prompt source, probe: the parts of rollout that need no vLLM.

Pinned: (1) two native engines in Ray actors give what one in this process gives, in any order, also when stopped and
continued; each holds little more than it can run; (2) weights reach every Ray engine; 500 steps leave memory flat;
(3) a NaN and a single wrong engine fail the probe; (4) prompt batches are stateless, each epoch a permutation.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import ray

from models import hf_tensors, save_pretrained
from rollout.engine import EngineConfig
from rollout.native_engine import NativeEngine
from rollout.pool import EnginePool, LocalPool, build_pool
from rollout.probe import ProbeAnswer
from rollout.prompts import PromptSource
from rollout.ray_pool import RayPool
from rollout.sample import Prompt, SamplingParams
from rollout.weight_sync import SyncError, probe_sequences, push_weights
from tests.models.test_models_parity import CORNERS, sharp_model
from tests.rollout.test_rollout_native_engine import make_prompts

PARAMS = SamplingParams(num_completions=3, max_tokens=8, stop_token_id=3, seed=6)


@pytest.mark.slow
def test_ray_pool_equals_local_pool(tmp_path: Path) -> None:
    model, other = sharp_model(CORNERS["groups"]), sharp_model(CORNERS["groups"], seed=8)
    save_pretrained(model, tmp_path / "model")
    prompts = make_prompts(20)
    engine = EngineConfig(kind="native", transport="ray", num_engines=2, max_model_len=64, max_num_seqs=8)
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
            assert expected == paused_and_continued(remote, prompts)
            assert {c.oldest_version for g in groups for c in g.completions} == {version}
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


def paused_and_continued(pool: EnginePool, prompts: list[Prompt]) -> dict[str, list[list[int]]]:
    """A run stopped when its first group is there, then continued; engines hold 8 requests or a group more, at most."""
    stop, paused = threading.Event(), []
    for group in pool.generate(prompts, PARAMS, stop=stop):
        stop.set()
        paused.append(group)
        assert isinstance(pool, RayPool)
        assert all(len(engine.waiting) < 8 + PARAMS.num_completions for engine in pool.engines)
    assert sorted(group.prompt.id for group in paused) == sorted(prompt.id for prompt in prompts)
    assert not all(group.is_complete for group in paused)
    return {g.prompt.id: [c.token_ids for c in g.completions] for g in pool.generate(paused, PARAMS)}


@pytest.mark.slow
def test_memory_stays_flat_over_500_steps(tmp_path: Path) -> None:
    model = sharp_model(CORNERS["groups"])
    save_pretrained(model, tmp_path / "model")
    weights = dict(hf_tensors(model))
    prompts, params = make_prompts(2), replace(PARAMS, num_completions=2, max_tokens=2)
    pool = build_pool(EngineConfig(kind="native", num_engines=2, max_model_len=64), str(tmp_path / "model"))
    assert isinstance(pool, RayPool)

    def memory() -> dict[str, float]:
        """MiB that the driver and each engine have for themselves, and of Ray's object store."""
        pids = {"driver": os.getpid()} | {f"engine {e.index}": e.address.pid for e in pool.engines}
        status = {name: Path(f"/proc/{pid}/status").read_text() for name, pid in pids.items()}
        own = {name: int(text.split("RssAnon:")[1].split()[0]) / 2**10 for name, text in status.items()}
        total, free = ray.cluster_resources(), ray.available_resources()
        return own | {"objects": (total["object_store_memory"] - free["object_store_memory"]) / 2**20}

    try:
        for step in range(500):
            pool.load_weights(weights.items(), step)
            assert len(list(pool.generate(prompts, params))) == 2
            if step == 50:
                early = memory()
        late = memory()
    finally:
        pool.close()
    per_step = sum(tensor.nbytes for tensor in weights.values()) / 2**20
    assert late["objects"] < 10 * per_step, f"450 steps left {late} MiB, {early} before"
    assert all(late[name] < early[name] + 10 for name in early), f"450 steps left {late} MiB, {early} before"


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


def test_prompts_are_a_stateless_walk_over_epochs() -> None:
    prompts = make_prompts(10)
    source = PromptSource(prompts, seed=1)

    def walk(source: PromptSource, sizes: list[int]) -> list[str]:
        place, names = 0, []
        for size in sizes:
            taken, place = source.take(place, size)
            names += [prompt.id for prompt in taken]
        return names

    twice = walk(source, [5, 5, 10])
    assert walk(PromptSource(prompts, seed=1), [2, 2, 2, 2, 2, 10]) == twice, "whatever the sizes of the batches"
    assert set(twice[:10]) == set(twice[10:]) == {prompt.id for prompt in prompts}
    assert twice[:10] != twice[10:]
    assert twice != walk(PromptSource(prompts, seed=2), [5, 5, 10])
    under_way = twice[7:9]
    taken, place = source.take(7, 8, avoid=under_way)
    assert len({prompt.id for prompt in taken} | set(under_way)) == 10 and place > 15
    with pytest.raises(ValueError, match="11 different prompts are needed, the data has 10"):
        source.take(0, 11)
    with pytest.raises(ValueError, match="9 different prompts are needed beside 2 under way"):
        source.take(0, 9, avoid=under_way)
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
    with pytest.raises(
        ValueError, match="tensor_parallel_size=2 needs the engine 'vllm' and placement 'separate', got"
    ):
        EngineConfig(kind="vllm", tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"stall_timeout_s must be > 0, got 3600\.0 and 0"):
        EngineConfig(stall_timeout_s=0)
    with pytest.raises(ValueError, match="max_restarts >= 0, got 1 and -1"):
        EngineConfig(max_restarts=-1)
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        SamplingParams(max_tokens=1, temperature=-1, stop_token_id=0)
