"""Weights from the learner to engines in Ray actors: the calls go through Ray, the tensors over the fitting link."""

from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from rollout.engine import EngineConfig, WeightStream
from rollout.weight_source import Link, deliver
from rollout.weight_transport import Broadcast, ByValue, CudaIpc, GroupAddress, open_store


class RayWeights:
    """The sender of a pool's actors, each of which has `call(method, argument)` for its engine."""

    def __init__(self, actors: Sequence[Any], config: EngineConfig) -> None:
        """Engines on their own GPUs meet the learner for broadcasts here; replaced actors need a new sender."""
        self._actors = actors
        self._link = self._choose_link(config)

    def _choose_link(self, config: EngineConfig) -> Link:
        if not torch.cuda.is_available() or config.resolved().kind == "native":  # the native engine runs on CPUs
            return ByValue()
        if config.placement == "colocated":
            return CudaIpc()
        size = len(self._actors) + 1
        store = open_store(size)
        host = ray.util.get_node_ip_address()
        addresses = [GroupAddress(host, store.port, rank, size, "nccl") for rank in range(size)]
        joining = [
            actor.call.remote("join_weight_group", address)
            for actor, address in zip(self._actors, addresses[1:], strict=True)
        ]
        group = addresses[0].connect(store)
        ray.get(joining)
        return Broadcast(group)

    def post(self, method: str, argument: Any) -> Callable[[], object]:
        """Starts an engine method on every actor; what it returns waits for all."""
        shared = ray.put(argument)  # once, for all engines; freed when the last has read it
        calls = [actor.call.remote(method, shared) for actor in self._actors]
        return lambda: ray.get(calls)

    def deliver(self, weights: WeightStream, version: int) -> None:
        """One complete sync of every engine; see `rollout.weight_source.deliver`."""
        deliver(weights, version, self.post, self._link)
