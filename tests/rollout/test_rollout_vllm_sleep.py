"""Pins what vLLM is told around the learner's turn, with a stand-in for its LLM: only a GPU can show the memory.

Sleep discards weights and cache; the weights' memory comes back before the sync, the cache's after it; in between, and
until the sync is complete, the engine refuses to sample.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from models import hf_tensors
from rollout.manifest import SyncError
from rollout.vllm_engine import VLLMEngine
from rollout.weight_receiver import WeightReceiver
from tests.models.test_models_parity import CORNERS, sharp_model

MODEL = sharp_model(CORNERS["plain"])


class FakeLLM:
    """Writes down the calls that change memory or weights."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            shown = options if name in ("sleep", "wake_up", "finish_weight_update") else ""
            self.calls.append(f"{name} {shown}".strip())

        return call


class FakeVLLM:
    __version__ = "0.32.0"


def make_engine(shares_gpu: bool) -> tuple[Any, list[str]]:
    engine: Any = VLLMEngine.__new__(VLLMEngine)
    shapes = {name: tensor.shape for name, tensor in hf_tensors(MODEL)}
    WeightReceiver.__init__(engine, shapes, MODEL.lm_head.weight.device)
    engine.llm, engine._vllm, engine.config = FakeLLM(), FakeVLLM(), SimpleNamespace()
    engine.config.sleeps, engine.config.tensor_parallel_size = shares_gpu, 1
    engine._asleep, engine._updating, engine._places = set(), False, []
    return engine, engine.llm.calls


def test_sleep_sync_and_wake() -> None:
    engine, calls = make_engine(shares_gpu=True)
    engine.check_usable()
    engine.sleep()
    engine.sleep()
    assert calls == ["sleep {'level': 2}"], "once, and without a copy of the weights"
    engine.wake("weights")
    with pytest.raises(SyncError, match="it sleeps, and gave up its weights; a complete sync makes it usable again"):
        engine.check_usable()
    engine.load_weights(hf_tensors(MODEL), 4)
    engine.wake("kv_cache")
    engine.wake("kv_cache")
    assert calls[1:] == [
        "wake_up {'tags': ['weights']}",
        "start_weight_update",
        "update_weights",
        "finish_weight_update {'weight_version': '4'}",
        "reset_prefix_cache",
        "wake_up {'tags': ['kv_cache']}",
    ]
    engine.check_usable()


def test_an_engine_with_memory_of_its_own_does_not_sleep() -> None:
    engine, calls = make_engine(shares_gpu=False)
    engine.sleep()
    engine.wake("weights")
    engine.wake("kv_cache")
    assert calls == []
    engine.check_usable()


def test_older_versions_are_not_told_the_weights_version(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = make_engine(shares_gpu=False)
    monkeypatch.setattr(FakeVLLM, "__version__", "0.25.1")
    engine.load_weights(hf_tensors(MODEL), 4)
    assert "finish_weight_update {}" in calls
