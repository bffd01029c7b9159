"""An engine in a Ray actor: its process, its place in the cluster, its stack when it hangs.

Each engine has a placement group of one bundle, so it can be on any host, and is put on another one when its host is
lost.
"""

import faulthandler
import gc
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rollout.engine import EngineConfig, build_engine
from rollout.probe import ProbeAnswer, probe_engine
from rollout.sample import SamplingParams
from rollout.stream import Inbox, Key, Request, Sampled

START_TIMEOUT_S = 1200.0
"""Longest time for a place in the cluster and for loading the model."""
STACK_TIMEOUT_S = 20.0
COLLECT_S = 0.05
"""Finished completions travel together for so long: an object of Ray costs a millisecond, a tiny model's step two."""


@dataclass(frozen=True)
class Address:
    """Where an engine's process runs."""

    host: str
    node_id: str
    pid: int
    stack_file: str
    """On that host; the process writes its stack there on SIGUSR1."""


class EngineActor:
    """Runs in the actor's process: an engine, and the inboxes of the calls to it.

    `stream` works in one thread; the methods of the group `control` answer from another meanwhile.
    """

    def __init__(self, config: EngineConfig, model: str) -> None:
        folder = Path(tempfile.gettempdir()) / "grpo-engine-stacks"
        folder.mkdir(exist_ok=True)
        self._stack_file = (folder / str(os.getpid())).open("w")
        faulthandler.register(signal.SIGUSR1, self._stack_file)  # written by C code, also while Python hangs
        torch.set_num_threads(config.num_threads)
        self.engine = build_engine(config, model)
        self._lock = threading.Lock()
        self._call, self._newest = 0, Inbox()
        gc.collect()
        gc.freeze()  # a million objects of imported modules need not be looked at again and again

    def ready(self) -> Address:
        context = ray.get_runtime_context()
        host = ray.util.get_node_ip_address()
        return Address(host, context.get_node_id(), os.getpid(), self._stack_file.name)

    def stream(self, call: int, requests: Sequence[Request], params: SamplingParams) -> Iterator[list[Sampled]]:
        inbox = self._inbox(call)
        inbox.put(requests)
        yield from self.engine.stream(inbox, params, COLLECT_S)

    def _inbox(self, call: int) -> Inbox:
        # Methods of two groups run in no order: whichever of `stream` and `submit` comes first makes the inbox.
        with self._lock:
            if call > self._call:
                self._call, self._newest = call, Inbox()
            return self._newest if call == self._call else Inbox()  # an older call is over, nobody reads its inbox

    @ray.method(concurrency_group="control")
    def submit(self, call: int, requests: Sequence[Request]) -> None:
        self._inbox(call).put(requests)

    @ray.method(concurrency_group="control")
    def end(self, call: int) -> None:
        """Nothing more will be asked, or waited for, in this call."""
        self._inbox(call).close()

    @ray.method(concurrency_group="control")
    def pause(self, call: int) -> None:
        self._inbox(call).pause()

    @ray.method(concurrency_group="control")
    def steps(self) -> int:
        return self.engine.steps

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.engine.score(sequences)

    def probe(self, sequences: Sequence[Sequence[int]]) -> ProbeAnswer:
        return probe_engine(self.engine, sequences)

    def call(self, method: str, argument: Any) -> Any:
        """A step of a weight sync, see `rollout.weight_receiver`."""
        return getattr(self.engine, method)(argument)


@dataclass
class RemoteEngine:
    """The driver's view of one engine: its actor, and what it was asked and has not answered."""

    index: int
    actor: Any
    place: Any
    """Its placement group."""
    address: Address
    stream: Any = None
    """Ray's generator of the call going on."""
    waiting: dict[Key, tuple[Request, float]] = field(default_factory=dict)
    """Handed out and not come back, with the time of handing out, seconds of the pool's clock."""
    steps: int = -1
    """Last count heard of it."""
    moved: float = 0.0
    """When the count last changed or something came."""
    asked: Any = None
    """The question for the count that is under way."""

    def watch(self, now: float) -> None:
        """Asks how many steps it has done, and takes note of the answer to the question before."""
        if self.asked is not None and ray.wait([self.asked], timeout=0)[0]:
            steps: Any = ray.get(self.asked)
            self.asked = None
            if steps != self.steps:
                self.steps, self.moved = steps, now
        if self.asked is None:
            self.asked = self.actor.steps.remote()

    def trouble(self, now: float, config: EngineConfig) -> str | None:
        """Why it should be replaced, if it should."""
        key, since = min(((key, since) for key, (_, since) in self.waiting.items()), key=lambda pair: pair[1])
        if now - since > config.request_timeout_s:
            return f"it got request {key} {now - since:.0f} s ago, request_timeout_s is {config.request_timeout_s}"
        if now - self.moved > config.stall_timeout_s:
            return f"it has done no step for {now - self.moved:.0f} s, stall_timeout_s is {config.stall_timeout_s}"
        return None

    def status(self, now: float) -> str:
        where = f"engine {self.index} (pid {self.address.pid} on {self.address.host})"
        if not self.waiting:
            return f"{where}: nothing to do"
        where += f" holds {len(self.waiting)} requests, last step {now - self.moved:.0f} s ago"
        oldest = sorted(self.waiting, key=lambda key: self.waiting[key][1])[:8]
        ages = (f"{prompt_id}/{i} for {now - self.waiting[prompt_id, i][1]:.0f} s" for prompt_id, i in oldest)
        return f"{where}; longest waiting: {', '.join(ages)}"

    def kill(self) -> None:
        """Ends the process, whatever it does, and gives its place back; Ray ends what still sits in a removed place."""
        ray.kill(self.actor)
        remove_placement_group(self.place)


def bundle_of(config: EngineConfig) -> dict[str, float]:
    """What one engine takes of a host."""
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    return {"CPU": 1.0} | ({"GPU": float(config.tensor_parallel_size)} if has_gpus else {})


def check_room(config: EngineConfig) -> None:
    """Raises ValueError if the cluster as it is cannot hold all engines."""
    bundle, whole = bundle_of(config), ray.cluster_resources()
    lacking = [name for name, amount in bundle.items() if whole.get(name, 0) < amount * config.num_engines]
    if lacking:
        raise ValueError(
            f"num_engines={config.num_engines} need {bundle} each, the cluster has "
            f"{ {name: whole.get(name, 0) for name in bundle} }; lower it or add hosts"
        )


def start_engines(config: EngineConfig, model: str, indices: Sequence[int], actor_class: type) -> list[RemoteEngine]:
    """Engines at places of their own. Raises RuntimeError if the cluster has no room for one in START_TIMEOUT_S."""
    bundle = bundle_of(config)
    # A colocated learner's rank takes the other half of the GPU, in the same placement group.
    gpus = bundle.get("GPU", 0.0)
    claimed = gpus / 2 if config.placement == "colocated" else gpus
    threads = str(config.num_threads)
    # Thread counts are read when the process starts; KMP_BLOCKTIME=0 lets idle OpenMP threads sleep at once.
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "KMP_BLOCKTIME": "0"}
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": claimed, "concurrency_groups": {"control": 1}}
    remote: Any = ray.remote(**options)(actor_class)
    engines: list[RemoteEngine] = []
    places = [placement_group([bundle]) for _ in indices]
    try:
        for place in places:
            if not place.wait(START_TIMEOUT_S):
                raise RuntimeError(
                    f"no room for an engine in the cluster: it needs {bundle} on one host, free is "
                    f"{ray.available_resources()}; add hosts or lower num_engines={config.num_engines}"
                )
        actors = [
            remote.options(
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=0),
            ).remote(config, model)
            for place in places
        ]
        addresses = ray.get([actor.ready.remote() for actor in actors], timeout=START_TIMEOUT_S)
        engines = [RemoteEngine(*one) for one in zip(indices, actors, places, addresses, strict=True)]
    finally:
        if not engines:
            for place in places:
                remove_placement_group(place)  # and with it what has been started there
    return engines


def stack_of(address: Address) -> str:
    """What each thread of the engine's process is doing, asked by a task on its host; says so if there is no answer."""
    here = NodeAffinitySchedulingStrategy(address.node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_dump_stack).options(scheduling_strategy=here)
    try:
        return ray.get(task.remote(address.pid, address.stack_file), timeout=STACK_TIMEOUT_S)
    except (RayError, GetTimeoutError) as error:
        return f"no stack: {type(error).__name__} on {address.host}"


def _dump_stack(pid: int, stack_file: str) -> str:
    before = os.path.getsize(stack_file)
    os.kill(pid, signal.SIGUSR1)
    size, deadline = before, time.monotonic() + 3
    while time.monotonic() < deadline:
        time.sleep(0.2)  # the writer gives no sign of its end: it is done when the file has stopped growing
        last, size = size, os.path.getsize(stack_file)
        if before < last == size:
            return Path(stack_file).read_text()[before:]
    return "no stack: the process does not take signals, it is stopped or hangs in the kernel"


def start_ray(num_engines: int) -> None:
    """Joins the cluster that RAY_ADDRESS names; without it starts a Ray of our own, with a slot for each engine.

    Quiet, without dashboard or usage report. A cluster that happens to run on this machine is left alone.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
        return
    ray.init(
        address="local",
        num_cpus=num_engines,
        include_dashboard=False,
        configure_logging=True,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=512 * 2**20,
    )
