"""Pins the sender to Ray actors: every engine holds what was sent, an error names itself, and an engine that takes the
place of a dead one gets the same weights again, or none.
"""

from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from models import hf_tensors, save_pretrained
from rollout.engine import EngineConfig
from rollout.manifest import SyncError
from rollout.native_engine import NativeEngine
from rollout.ray_actor import start_ray
from rollout.ray_weights import RayWeights
from rollout.weight_source import WeightSource
from rollout.weight_transport import ByValue
from tests.models.test_models_parity import CORNERS, sharp_model

CONFIG = EngineConfig(kind="native", dtype="bfloat16")


class Holder:
    """An engine in an actor."""

    def __init__(self, model: str) -> None:
        self.engine = NativeEngine(CONFIG, model)

    def call(self, method: str, argument: Any) -> Any:
        return getattr(self.engine, method)(argument)

    def holds(self) -> tuple[int, list[list[float]]]:
        return self.engine.version, self.engine.score([[5, 6, 7, 8]])


@pytest.mark.slow
def test_every_actor_gets_the_weights_and_so_does_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByValue, "chunk_bytes", 20_000)
    model = sharp_model(CORNERS["plain"])
    save_pretrained(model, tmp_path / "model")
    start_ray(3)
    try:
        holder: Any = Holder
        start = ray.remote(num_cpus=1)(holder).remote
        actors = [start(str(tmp_path / "model")) for _ in range(2)]
        learner = sharp_model(CORNERS["plain"], seed=2)
        weights = RayWeights(actors, CONFIG)
        weights.deliver(WeightSource(learner), 3)
        first, second = ray.get([actor.holds.remote() for actor in actors])
        assert first == second and first[0] == 3
        reference = NativeEngine(CONFIG, str(tmp_path / "model"))
        reference.load_weights(WeightSource(learner), 3)
        assert first[1] == reference.score([[5, 6, 7, 8]])

        ray.kill(actors[0])
        actors[0] = start(str(tmp_path / "model"))
        weights.replace(actors, actors[0])
        assert ray.get(actors[0].holds.remote()) == first

        lacking = [(name, tensor) for name, tensor in hf_tensors(learner) if name != "model.norm.weight"]
        with pytest.raises(SyncError, match=r"missing model\.norm\.weight"):
            weights.deliver(lacking, 4)
        for actor in actors:
            with pytest.raises(SyncError, match="this engine must not sample"):
                ray.get(actor.holds.remote())
        ray.kill(actors[1])
        actors[1] = start(str(tmp_path / "model"))
        weights.replace(actors, actors[1])  # there is no complete sync to repeat
        with pytest.raises(SyncError, match="it has the first checkpoint's weights"):
            ray.get(actors[1].holds.remote())
        weights.deliver(WeightSource(learner), 5)
        with torch.no_grad():
            learner.lm_head.weight.mul_(1.01)
        with pytest.raises(SyncError, match="the learner no longer has the weights of version 5: lm_head"):
            weights.replace(actors, actors[0])
        assert ray.get(actors[1].holds.remote())[0] == 5, "the others go on"
    finally:
        ray.shutdown()
