"""Weights from the learner to engines in Ray actors: the calls go through Ray, the tensors over the fitting link."""

from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from rollout.engine import EngineConfig, WeightStream
from rollout.manifest import Manifest
from rollout.weight_source import Delivered, Link, Post, deliver, model_of
from rollout.weight_transport import Broadcast, ByValue, CudaIpc, GroupAddress, open_store


def post_to(actors: Sequence[Any], timeout_s: float) -> Post:
    """Calls a method of the engine in every actor, each of which has `call(method, argument)` for it.

    Raises ray's GetTimeoutError if an answer takes longer than `timeout_s`.
    """

    def post(method: str, argument: Any) -> Callable[[], list[Any]]:
        shared = ray.put(argument)  # once, for all engines; freed when the last has read it
        calls = [actor.call.remote(method, shared) for actor in actors]
        return lambda: ray.get(calls, timeout=timeout_s)

    return post


class RayWeights:
    """The sender of a pool's actors."""

    def __init__(self, actors: Sequence[Any], config: EngineConfig) -> None:
        self._actors, self._config = actors, config
        self._link: Link | None = None
        self._begun = False
        self._last: tuple[WeightStream, Manifest] | None = None
        """The sync that every engine has completed; None from the beginning of the next one until it has succeeded."""

    def _post(self, actors: Sequence[Any]) -> Post:
        return post_to(actors, self._config.request_timeout_s)

    def deliver(self, weights: WeightStream, version: int) -> None:
        """One complete sync of every engine; see `rollout.weight_source.deliver`.

        Raises ray's error if an actor dies or does not answer: `replace` it, and deliver to all of them again.
        """
        last = Delivered(self._last[1].version, model_of(self._last[0])) if self._last else None
        self._begun, self._last = True, None
        self._link = self._link or choose_link(self._actors, self._config)
        self._last = weights, deliver(weights, version, self._post(self._actors), self._link, last=last)

    def replace(self, actors: Sequence[Any], new: Any) -> None:
        """Goes on with these actors, and repeats the last sync for `new` among them, from the learner: nothing is kept.

        Raises SyncError if the learner's weights have changed since, or if they came as a stream that is spent. In the
        middle of a sync there is none to repeat; then, too, the new engine refuses to sample until it has had one.
        """
        self._actors, self._link = actors, None  # a broadcast group cannot change its members
        if self._begun:
            self._post([new])(
                "reject_weights", "it has the first checkpoint's weights, in the place of another engine"
            )()
        if self._last is not None:
            weights, manifest = self._last
            deliver(weights, manifest.version, self._post([new]), ByValue(), same_as=manifest)


def choose_link(actors: Sequence[Any], config: EngineConfig) -> Link:
    """The fitting link; engines with GPUs of their own meet the learner here."""
    if not torch.cuda.is_available() or config.resolved().kind == "native":  # the native engine runs on CPUs
        return ByValue()
    if config.placement == "colocated":
        return CudaIpc()
    size = len(actors) + 1
    store = open_store(size)
    host = ray.util.get_node_ip_address()
    addresses = [GroupAddress(host, store.port, rank, size, "nccl") for rank in range(size)]
    joining = [
        actor.call.remote("join_weight_group", address) for actor, address in zip(actors, addresses[1:], strict=True)
    ]
    group = addresses[0].connect(store)
    ray.get(joining)
    return Broadcast(group)
