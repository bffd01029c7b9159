"""Engines in Ray actors, one process each. Weights reach them through ray_weights.py."""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import ray
import torch

from rollout.engine import EngineConfig, WeightStream, build_engine
from rollout.probe import ProbeAnswer, probe_engine
from rollout.ray_weights import RayWeights, post_to
from rollout.sample import CompletionGroup, Prompt, SamplingParams


class _EngineActor:
    """Runs in the actor's process: an engine."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        torch.set_num_threads(config.num_threads)
        self.engine = build_engine(config, model)

    def ready(self) -> int:
        return self.engine.version

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[CompletionGroup]:
        return self.engine.generate(prompts, params)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.engine.score(sequences)

    def call(self, method: str, argument: Any) -> None:
        getattr(self.engine, method)(argument)

    def probe(self, sequences: Sequence[Sequence[int]]) -> ProbeAnswer:
        return probe_engine(self.engine, sequences)

    def close(self) -> None:
        self.engine.close()


class RayPool:
    """Implements `rollout.pool.EnginePool` over Ray actors; starts a Ray of its own unless one is running already."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _start_ray(config.num_engines)
        threads = str(config.num_threads)
        # Thread counts are read when the process starts; KMP_BLOCKTIME=0 lets idle OpenMP threads sleep at once.
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "KMP_BLOCKTIME": "0"}
        actor = ray.remote(num_cpus=1)(_EngineActor)
        self._actors: list[Any] = [
            actor.options(runtime_env={"env_vars": environment}).remote(config, model)
            for _ in range(config.num_engines)
        ]
        ray.get([actor.ready.remote() for actor in self._actors])
        self._weights = RayWeights(self._actors, config)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Iterator[CompletionGroup]:
        shares = [prompts[i :: len(self._actors)] for i in range(len(self._actors))]
        pending = [
            actor.generate.remote(share, params) for actor, share in zip(self._actors, shares, strict=True) if share
        ]
        while pending:
            done, pending = ray.wait(pending)
            yield from ray.get(done[0])

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        return ray.get([actor.score.remote(sequences) for actor in self._actors])

    def load_weights(self, weights: WeightStream, version: int) -> None:
        self._weights.deliver(weights, version)

    def probe(self, sequences: Sequence[Sequence[int]]) -> list[ProbeAnswer]:
        return ray.get([actor.probe.remote(sequences) for actor in self._actors])

    def reject_weights(self, reason: str) -> None:
        post_to(self._actors)("reject_weights", reason)()

    def sleep(self) -> None:
        post_to(self._actors)("sleep", None)()

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        post_to(self._actors)("wake", part)()

    def close(self) -> None:
        ray.get([actor.close.remote() for actor in self._actors])
        for actor in self._actors:
            ray.kill(actor)
        if self._owns_ray:
            ray.shutdown()


def _start_ray(num_engines: int) -> None:
    """A Ray of our own, quiet, without dashboard or usage report, with a worker slot for each engine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        num_cpus=num_engines,
        include_dashboard=False,
        configure_logging=True,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=512 * 2**20,
    )
