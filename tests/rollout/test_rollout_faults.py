"""Ray engines that die, hang or vanish with their host, mid-step, on a cluster of three nodes: the same completions as
without.

Pinned: (1) kill -9 of an engine; (2) a process that is stopped; (3) one that hangs in C with Python's lock held, whose
stack is reported; (4) a node of three lost; (5) giving up after `max_restarts`; (6) newest weights in the new engine;
(7) an abandoned call leaves nothing behind, and `close` works in the middle of one.
"""

import ctypes
import logging
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError

from models import hf_tensors, save_pretrained
from rollout.engine import EngineConfig
from rollout.pool import LocalPool
from rollout.ray_actor import EngineActor
from rollout.ray_pool import RayPool
from rollout.sample import CompletionGroup, SamplingParams
from tests.models.test_models_parity import CORNERS, sharp_model
from tests.rollout.test_rollout_native_engine import make_prompts

pytestmark = pytest.mark.slow
PARAMS = SamplingParams(num_completions=4, max_tokens=40, stop_token_id=96, seed=6)
PROMPTS = make_prompts(24)
CONFIG = EngineConfig(kind="native", num_engines=2, max_model_len=64, max_num_seqs=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("faults") / "model"
    save_pretrained(sharp_model(CORNERS["groups"]), folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def nodes() -> Iterator[Any]:
    """Three nodes of one CPU each: two for the engines, one to spare. Gives (cluster, nodes other than the head)."""
    # A folder of its own: in the usual one, other programs on this machine would find this cluster and join it.
    with tempfile.TemporaryDirectory() as folder:
        size: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 200 * 2**20, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=size)
        others = {node.node_id: node for node in [cluster.add_node(**size) for _ in range(2)]}
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster, others
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def other_weights() -> dict[str, Any]:
    return dict(hf_tensors(sharp_model(CORNERS["groups"], seed=8)))


@pytest.fixture(scope="module")
def undisturbed(checkpoint: str, other_weights: dict[str, Any]) -> dict[str, list[Any]]:
    """Completions of version 1, by prompt."""
    pool = LocalPool(replace(CONFIG, transport="local", num_engines=1), checkpoint)
    pool.load_weights(other_weights.items(), 1)
    return by_prompt(list(pool.generate(PROMPTS, PARAMS)))


def by_prompt(groups: list[CompletionGroup]) -> dict[str, list[Any]]:
    found = {g.prompt.id: [(c.token_ids, c.version_spans, c.seed) for c in g.completions] for g in groups}
    assert len(found) == len(groups), "a group came twice"
    return found


class Harness:
    """A pool with the weights of version 1, and what it reports."""

    def __init__(self, checkpoint: str, weights: dict[str, Any], config: EngineConfig, pool: type[RayPool]) -> None:
        self.messages: list[str] = []
        self.pool = pool(config, checkpoint, report=self.messages.append)
        self.pool.load_weights(weights.items(), 1)

    def run(self, disturb: Any = lambda: None) -> dict[str, list[Any]]:
        """All groups; `disturb` is called when the first is there and most are not."""
        stream = self.pool.generate(PROMPTS, PARAMS)
        groups = [next(stream)]
        disturb()
        return by_prompt(groups + list(stream))


@pytest.fixture
def start(checkpoint: str, other_weights: dict[str, Any]) -> Iterator[Any]:
    started: list[Harness] = []

    def make(config: EngineConfig = CONFIG, pool: type[RayPool] = RayPool) -> Harness:
        started.append(Harness(checkpoint, other_weights, config, pool))
        return started[-1]

    yield make
    for harness in started:
        harness.pool.close()


def test_kill_9_of_an_engine_and_abandoned_calls(start: Any, undisturbed: dict[str, list[Any]]) -> None:
    harness = start()
    victim = harness.pool.engines[1].address.pid
    assert harness.run(lambda: os.kill(victim, signal.SIGKILL)) == undisturbed
    assert harness.pool.counters["engine/restarts"] == 1 and harness.pool.counters["engine/reissued"] > 0
    assert len(harness.messages) == 1 and "engine 1 is replaced" in harness.messages[0]
    assert harness.pool.engines[1].address.pid != victim
    # A caller that stops listening: the next call starts from nothing.
    stream = harness.pool.generate(PROMPTS, PARAMS)
    next(stream)
    stream.close()
    assert harness.run() == undisturbed
    # One that dies between calls is noticed by the next thing that is asked of it.
    os.kill(harness.pool.engines[0].address.pid, signal.SIGKILL)
    first, second = harness.pool.score([[5, 6, 7]])
    assert first == second and harness.pool.counters["engine/restarts"] == 2
    # And close, with engines at work.
    next(harness.pool.generate(PROMPTS, PARAMS))
    started = time.monotonic()
    harness.pool.close()
    assert time.monotonic() - started < 20


def test_a_stopped_process_is_replaced(start: Any, undisturbed: dict[str, list[Any]]) -> None:
    harness = start(replace(CONFIG, stall_timeout_s=2.0))
    victim = harness.pool.engines[0].address.pid
    assert harness.run(lambda: os.kill(victim, signal.SIGSTOP)) == undisturbed
    assert harness.pool.counters["engine/restarts"] == 1
    watchdog, replaced = harness.messages
    assert f"engine 0 (pid {victim} on" in watchdog and "no stack" in watchdog
    assert "engine 0 is replaced" in replaced and "it has done no step for" in replaced
    assert not Path(f"/proc/{victim}").exists() or "Z" in Path(f"/proc/{victim}/stat").read_text().split()[2]


class HangingActor(EngineActor):
    """Hangs in its third answer, holding Python's lock, if there is a file `hang` beside the model."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        super().__init__(config, model)
        self.marker = Path(model) / "hang"

    def stream(self, *args: Any) -> Iterator[Any]:
        for number, finished in enumerate(super().stream(*args)):
            if number == 2 and self.marker.exists():
                self.marker.unlink()
                ctypes.PyDLL(None).sleep(1000)
            yield finished


class HeldActor(EngineActor):
    """Begins to answer when there is no file `hold` beside the model any more."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        super().__init__(config, model)
        self.marker = Path(model) / "hold"

    def stream(self, *args: Any) -> Iterator[Any]:
        while self.marker.exists():
            time.sleep(0.01)
        yield from super().stream(*args)


class DyingActor(EngineActor):
    def stream(self, *args: Any) -> Iterator[Any]:
        os._exit(3)
        yield


class HangingPool(RayPool):
    actor_class = HangingActor


class HeldPool(RayPool):
    actor_class = HeldActor


class DyingPool(RayPool):
    actor_class = DyingActor


def test_a_hung_request_is_begun_again(start: Any, undisturbed: dict[str, list[Any]], checkpoint: str) -> None:
    (Path(checkpoint) / "hang").touch()
    harness = start(replace(CONFIG, request_timeout_s=5.0), HangingPool)
    assert harness.run() == undisturbed
    watchdog, replaced = harness.messages
    assert "test_rollout_faults.py" in watchdog and "in stream" in watchdog, "the stack of the hung process"
    assert "groups wait for a free engine" in watchdog and "longest waiting: p" in watchdog
    assert "request_timeout_s is 5.0" in replaced


def test_an_engine_that_cannot_start_is_an_error(checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"num_engines=9 need .'CPU': 1.0. each, the cluster has .'CPU': 3.0."):
        RayPool(replace(CONFIG, num_engines=9), checkpoint)
    free = ray.available_resources()["CPU"]
    with pytest.raises(RayActorError, match="num_speculative_tokens=1 needs as many prediction modules"):
        RayPool(replace(CONFIG, num_speculative_tokens=1), checkpoint)
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < free:  # Ray tells nobody when a place is free again
        assert time.monotonic() < deadline, "what was started has not been ended"
        time.sleep(0.2)


def test_giving_up(start: Any) -> None:
    harness = start(replace(CONFIG, num_engines=1, max_restarts=1), DyingPool)
    with pytest.raises(RuntimeError, match=r"engine 0 failed, and so did 1 before it .*max_restarts=1.*it died"):
        list(harness.pool.generate(PROMPTS, PARAMS))


def test_a_lost_node(start: Any, undisturbed: dict[str, list[Any]], nodes: Any, checkpoint: str) -> None:
    cluster, others = nodes
    harness = start(CONFIG, HeldPool)
    used = [engine.address.node_id for engine in harness.pool.engines]
    assert len(set(used)) == 2, "one engine per node"
    lost = next(node for node in used if node in others)
    hold = Path(checkpoint) / "hold"
    hold.touch()

    def lose_a_node() -> None:
        while not all(engine.waiting for engine in harness.pool.engines):
            time.sleep(0.01)
        cluster.remove_node(others[lost], allow_graceful=False)
        hold.unlink()

    with ThreadPoolExecutor(1) as thread:
        losing = thread.submit(lose_a_node)
        assert by_prompt(list(harness.pool.generate(PROMPTS, PARAMS))) == undisturbed
        losing.result()
    assert harness.pool.counters["engine/restarts"] == 1
    assert lost not in [engine.address.node_id for engine in harness.pool.engines]
