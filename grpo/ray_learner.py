"""The other ranks of a learner in Ray actors; the process that starts them becomes rank 0.

with started_ranks(4, functools.partial(serve_rank, config), num_threads=1):
    group = LearnerGroup(build_learner(config))
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rollout.ray_actor import START_TIMEOUT_S, start_ray

_EXPLAIN_S = 5.0
"""After an error, a rank that failed has so long to say so."""


class Rank:
    """Runs in the actor's process. That of rank 0 does nothing: it holds the GPU that the driver uses."""

    def gpus(self) -> list[str]:
        return [str(gpu) for gpu in ray.get_gpu_ids()]

    def serve(self, environment: dict[str, str], serve: Callable[[], None]) -> None:
        os.environ.update(environment)
        serve()


@contextlib.contextmanager
def started_ranks(
    num_ranks: int, serve: Callable[[], None], *, num_threads: int, slots_beside: int = 0
) -> Iterator[None]:
    """Reserves a CPU, and a GPU where there are some, for each rank, rank 0's on this host; starts `serve` as the ranks
    1 and up, and sets the environment that makes this process rank 0. They end with the block.

    `slots_beside` CPUs are for others, if a Ray of our own is started. Raises RuntimeError if the cluster has no room,
    and what a rank raised in place of the closed connection that rank 0 saw of it.
    """
    owns_ray = not ray.is_initialized()
    if owns_ray:
        start_ray(num_ranks + slots_beside)
    host = ray.util.get_node_ip_address()
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if ray.cluster_resources().get("GPU", 0) else {})
    place = placement_group([bundle | {f"node:{host}": 0.001}, *[bundle] * (num_ranks - 1)], strategy="PACK")
    try:
        if not place.wait(START_TIMEOUT_S):
            raise RuntimeError(
                f"no room for {num_ranks} ranks of the learner in the cluster: each needs {bundle}, free is "
                f"{ray.available_resources()}; add hosts or lower mesh.ranks"
            )
        serving = _start(place, host, bundle, num_ranks, serve, num_threads)
        try:
            yield
        except Exception:
            failed, _ = ray.wait(serving, timeout=_EXPLAIN_S)
            ray.get(failed)  # raises the reason, if a rank is the reason
            raise
    finally:
        remove_placement_group(place)  # Ray ends what still sits in it
        if owns_ray:
            ray.shutdown()


def _start(
    place: Any, host: str, bundle: dict[str, float], num_ranks: int, serve: Callable[[], None], num_threads: int
) -> list[Any]:
    threads = {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
    remote: Any = ray.remote(num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0.0))(Rank)
    actors = [
        remote.options(
            runtime_env={"env_vars": threads},
            scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=index),
        ).remote()
        for index in range(num_ranks)
    ]
    gpus = ray.get([actor.gpus.remote() for actor in actors], timeout=START_TIMEOUT_S)[0]
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = str(probe.getsockname()[1])
    environment = {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks)}
    os.environ.update(environment | {"RANK": "0"} | ({"LOCAL_RANK": gpus[0]} if gpus else {}))
    return [actors[rank].serve.remote(environment | {"RANK": str(rank)}, serve) for rank in range(1, num_ranks)]
