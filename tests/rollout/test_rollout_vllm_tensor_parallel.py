"""A real vLLM whose model lies over two processes, here on CPU.

Pinned: (1) it agrees with the native engine before and after a sync; (2) its slices cannot be read back against the
manifest, so an expert that is lost behind the check of what arrived is found by the probe.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from models import hf_tensors, save_pretrained
from rollout.engine import EngineConfig
from rollout.manifest import SyncError
from rollout.native_engine import NativeEngine
from rollout.pool import LocalPool
from rollout.vllm_engine import VLLMEngine
from rollout.weight_sync import probe_sequences, push_weights
from tests.models.test_models_parity import CORNERS, sharp_model
from tests.rollout.test_rollout_native_engine import make_prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
CONFIG = CORNERS["v3_like"]
FIRST, OTHER = sharp_model(CONFIG), sharp_model(CONFIG, seed=11)
LOST = "model.layers.1.mlp.experts.3.down_proj.weight"
PROBE = probe_sequences(make_prompts(4), CONFIG.vocab_size)
LIMIT = 1e-4
TWO = EngineConfig(
    kind="vllm",
    transport="local",
    placement="separate",
    tensor_parallel_size=2,
    record_experts=False,
    max_model_len=64,
    max_num_seqs=8,
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPool]:
    folder = tmp_path_factory.mktemp("two_slices")
    save_pretrained(FIRST, folder)
    environment = dict(os.environ)
    pool = LocalPool(TWO, str(folder))
    yield pool
    pool.close()
    os.environ.clear()
    os.environ.update(environment)


def native(model: Any, folder: Any) -> NativeEngine:
    save_pretrained(model, folder)
    return NativeEngine(EngineConfig(kind="native", transport="local"), str(folder))


def test_new_weights_reach_every_slice(pool: LocalPool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = native(FIRST, tmp_path / "first"), native(OTHER, tmp_path / "other")
    [scores], expected = pool.score(PROBE), first.score(PROBE)
    assert max(abs(a - b) for x, y in zip(scores, expected, strict=True) for a, b in zip(x, y, strict=True)) < LIMIT
    with pytest.raises(SyncError, match="differ"):  # the engine still has FIRST: the probe can tell
        push_weights(pool, hf_tensors(FIRST), 1, PROBE, other.score, LIMIT)
    drift = push_weights(pool, hf_tensors(OTHER), 2, PROBE, other.score, LIMIT)
    assert drift is not None and drift < LIMIT

    load = VLLMEngine._load

    def lose_one(engine: VLLMEngine, tensors: list[tuple[str, Tensor]]) -> None:
        load(engine, [(name, tensor) for name, tensor in tensors if name != LOST])

    monkeypatch.setattr(VLLMEngine, "_load", lose_one)
    with pytest.raises(SyncError):
        push_weights(pool, hf_tensors(FIRST), 3, PROBE, first.score, LIMIT)
    monkeypatch.undo()
    drift = push_weights(pool, hf_tensors(OTHER), 4, PROBE, other.score, LIMIT)
    assert drift is not None and drift < LIMIT


def test_experts_cannot_be_recorded_in_other_processes_on_cpu(tmp_path: Any) -> None:
    save_pretrained(FIRST, tmp_path)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2 on CPU: .* set record_experts to False"):
        LocalPool(
            EngineConfig(kind="vllm", transport="local", placement="separate", tensor_parallel_size=2), str(tmp_path)
        )
