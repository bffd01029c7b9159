"""Pins training by adapters and the syncs that follow it.

1. After each of three steps, sampler and learner agree to 1e-4; from the second sync on, frozen modules are not sent.
2. What is not sent is checked all the same: at the learner, and in what the engine holds; an engine that lost its
   weights gets them all.
3. The KL reference is the frozen model itself, in the same memory, and does not move.
4. A run cut off and continued from its checkpoint ends with the same bits.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.batch import TrainingSample
from grpo.checkpoint import load_checkpoint, save_checkpoint
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from models import hf_tensors, save_pretrained
from models.lora import LoRAConfig, WithoutAdapters, add_lora
from rollout.engine import EngineConfig
from rollout.manifest import SyncError
from rollout.native_engine import NativeEngine
from rollout.pool import LocalPool
from rollout.weight_source import ByReference, Chunk, Delivered, Post, call_here, deliver, model_of
from rollout.weight_sync import probe_sequences, push_weights
from tests.grpo.test_grpo_gradients import make_samples
from tests.grpo.test_grpo_learner import same_bits, snapshot
from tests.models.test_models_parity import BASE, sharp_model
from tests.rollout.test_rollout_native_engine import make_prompts

CONFIG = LearnerConfig(lr=1e-2)
ATTENTION = LoRAConfig(rank=4, alpha=8, targets=("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
PROBE = probe_sequences(make_prompts(4), BASE.vocab_size)
# The one size that vLLM's MLA kernel for CPU knows.
MLA = replace(BASE, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64)


def make_learner(lora: LoRAConfig = ATTENTION, config: LearnerConfig = CONFIG, sizes: Any = BASE) -> Learner:
    model = sharp_model(sizes)
    add_lora(model, lora, seed=0)
    return Learner(model, config, total_steps=20)


def samples(learner: Learner) -> list[TrainingSample]:
    return make_samples(learner.model)


class Counting(ByReference):
    """Notes what crosses in each sync."""

    chunk_bytes = 20_000

    def __init__(self) -> None:
        self.names: list[list[str]] = []
        self.num_bytes: list[int] = []

    def begin(self) -> None:
        self.names.append([])
        self.num_bytes.append(0)

    def send(self, chunk: Chunk, post: Post) -> Callable[[], Any]:
        self.names[-1] += chunk.names
        self.num_bytes[-1] += sum(tensor.nbytes for tensor in chunk.tensors)
        return super().send(chunk, post)


@pytest.fixture
def engine(tmp_path: Path) -> NativeEngine:
    save_pretrained(sharp_model(BASE, seed=9), tmp_path / "other")
    return NativeEngine(EngineConfig(kind="native", transport="local", max_model_len=64), str(tmp_path / "other"))


class Syncs:
    """Of one learner and one engine, as pools do them; `link` notes what crosses."""

    def __init__(self, learner: Learner, engine: NativeEngine, link: Counting | None = None) -> None:
        self.learner, self.engine, self.link = learner, engine, link or Counting()
        self._last: Delivered | None = None

    def run(self, version: int) -> set[str]:
        """Every tensor's name."""
        weights = self.learner.named_weights()
        self.link.begin()
        manifest = deliver(weights, version, call_here(self.engine), self.link, last=self._last)
        self._last = Delivered(version, model_of(weights))
        return set(manifest.tensors)


def largest(ours: list[list[float]], theirs: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("targets", [ATTENTION.targets, ("experts",), ()])
def test_sampler_and_learner_agree_after_each_step(targets: tuple[str, ...], engine: NativeEngine) -> None:
    learner = make_learner(replace(ATTENTION, targets=targets))
    syncs = Syncs(learner, engine)
    before, names = learner.score(PROBE), set(dict(hf_tensors(learner.model)))
    for version in range(1, 5):
        assert syncs.run(version) == names and engine.version == version
        assert largest(engine.score(PROBE), learner.score(PROBE)) < 1e-4
        learner.update(samples(learner))
    assert largest(before, learner.score(PROBE)) > 0.1, "three steps move the policy, or this shows nothing"
    parts = {ATTENTION.targets: ["self_attn."], ("experts",): ["mlp.experts."]}
    link, adapted = syncs.link, parts.get(targets, ["self_attn.", "mlp.experts."])
    assert set(link.names[0]) == names
    assert set(link.names[1]) == {name for name in names if any(part in name for part in adapted)}
    assert link.num_bytes[1] == link.num_bytes[2] < link.num_bytes[0]
    if targets == ATTENTION.targets:
        assert link.num_bytes[1] < 0.3 * link.num_bytes[0]


def test_the_whole_model_is_sent_where_it_is_trained(engine: NativeEngine) -> None:
    learner = Learner(sharp_model(BASE), CONFIG, total_steps=20)
    syncs = Syncs(learner, engine)
    names = [syncs.run(version) for version in (1, 2)]
    assert [set(sent) for sent in syncs.link.names] == names


def test_an_engine_that_lost_its_weights_gets_them_all(engine: NativeEngine) -> None:
    learner = make_learner()
    syncs = Syncs(learner, engine)
    syncs.run(1)
    lost: list[Callable[[], object]] = [
        lambda: engine.reject_weights("it slept"),
        lambda: engine.start_weights(7),  # a sync that broke off
        lambda: deliver(hf_tensors(sharp_model(BASE, seed=4)), 8, call_here(engine)),  # another version
    ]
    for version, lose in enumerate(lost, 2):
        lose()
        assert syncs.run(version) == set(syncs.link.names[-1])
        assert largest(engine.score(PROBE), learner.score(PROBE)) < 1e-4
    other = Syncs(make_learner(), engine)  # the pool goes on with another learner
    other._last = syncs._last
    assert other.run(9) == set(other.link.names[-1])


def test_what_is_not_sent_is_checked(engine: NativeEngine) -> None:
    learner = make_learner()
    syncs = Syncs(learner, engine)
    syncs.run(1)
    frozen = "model.layers.1.mlp.experts.3.down_proj.weight"
    with torch.no_grad():
        engine._targets[frozen][0, 0] += 1e-3
    with pytest.raises(SyncError, match=f"holds other values than were sent: {frozen}"):
        syncs.run(2)
    syncs.run(3)
    with torch.no_grad():
        dict(learner.model.named_parameters())["model.norm.weight"][0] += 1e-3
    with pytest.raises(SyncError, match=r"arrived altered: model\.norm\.weight has other values"):
        syncs.run(4)


def test_a_lost_chunk_is_not_taken_for_a_frozen_one(engine: NativeEngine) -> None:
    class Losing(Counting):
        def send(self, chunk: Chunk, post: Post) -> None:
            super().send(chunk.without(lambda name: name == "model.layers.0.self_attn.o_proj.weight"), post)

    learner = make_learner()
    syncs = Syncs(learner, engine)
    syncs.run(1)
    learner.update(samples(learner))
    syncs.link = Losing()
    with pytest.raises(SyncError, match=r"model\.layers\.0\.self_attn\.o_proj\.weight has other values than were sent"):
        syncs.run(2)


@pytest.mark.parametrize("whole", [False, True])
def test_a_snapshot_stays(whole: bool, engine: NativeEngine) -> None:
    learner = Learner(sharp_model(BASE), CONFIG, total_steps=20) if whole else make_learner()
    weights, scores = learner.named_weights().snapshot(), learner.score(PROBE)
    learner.update(samples(learner))
    deliver(weights, 1, call_here(engine))
    assert largest(engine.score(PROBE), scores) < 1e-4 < largest(learner.score(PROBE), scores)
    assert weights.is_frozen("model.norm.weight") is not whole
    assert not weights.is_frozen("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_takes_what_changed_and_keeps_the_rest(tmp_path: Path) -> None:
    save_pretrained(sharp_model(MLA), tmp_path / "base")
    environment = dict(os.environ)
    pool = LocalPool(EngineConfig(kind="vllm", transport="local", max_model_len=64), str(tmp_path / "base"))
    try:
        for targets in (ATTENTION.targets, ("kv_b_proj",), ("experts",)):
            learner = make_learner(replace(ATTENTION, targets=targets), sizes=MLA)
            for version in range(1, 5):
                drift = push_weights(pool, learner.named_weights(), version, PROBE, learner.score, limit=1e-4)
                assert drift is not None and drift < 1e-4
                learner.update(samples(learner))
    finally:
        pool.close()
        os.environ.clear()
        os.environ.update(environment)


def test_the_reference_is_the_frozen_model() -> None:
    learner = make_learner(config=replace(CONFIG, objective=ObjectiveConfig(kl_coef=0.1)))
    copied = Learner(make_learner().model, replace(CONFIG, objective=ObjectiveConfig(kl_coef=0.1)), total_steps=20)
    plain = sharp_model(BASE)
    copied.reference = plain.requires_grad_(False)
    assert isinstance(learner.reference, WithoutAdapters)
    assert learner.update(samples(learner))["policy/kl_to_reference"] == 0
    copied.update(samples(copied))
    for _ in range(2):
        report = learner.update(samples(learner))
        assert report == pytest.approx(copied.update(samples(copied)), rel=1e-5, abs=1e-7)
        assert report["policy/kl_to_reference"] > 1e-3
    assert learner.reference.lm_head is learner.model.lm_head


@pytest.mark.parametrize("targets", [(), ATTENTION.targets])
def test_a_continued_run_ends_with_the_same_bits(targets: tuple[str, ...], tmp_path: Path) -> None:
    lora = replace(ATTENTION, targets=targets)
    learner = make_learner(lora)
    learner.update(samples(learner))
    save_checkpoint(tmp_path, learner, 1, {})
    policy = tmp_path / "checkpoints" / "step_000001" / "policy"
    assert {path.name for path in (policy / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    resumed = make_learner(lora)
    assert load_checkpoint(tmp_path, resumed)[0] == 1
    for each in (learner, resumed):
        each.update(samples(each))
    assert same_bits(snapshot(learner.model), snapshot(resumed.model))
    adapters = [
        {n: p.detach() for n, p in each.model.named_parameters() if ".lora_" in n} for each in (learner, resumed)
    ]
    assert same_bits(*adapters)
    with pytest.raises(ValueError, match="tensors do not fit the model"):
        load_checkpoint(tmp_path, make_learner(LoRAConfig(rank=2)))
