"""Pins the order around the learner's turn on a shared GPU, with a pool that only writes down what it is asked.

sample, sleep, learn, wake the weights, sync, wake the key-value cache, probe, sample: a sync before the weights are
awake writes into memory that is not there; a sleep after the sync would throw the new weights away.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from grpo.metrics import read_metrics
from rollout.engine import WeightStream
from rollout.pool import LocalPool
from rollout.probe import ProbeAnswer
from rollout.sample import CompletionGroup, SamplingParams
from rollout.stream import Work
from tests.grpo.test_grpo_trainer import ENGINE, make_learner, make_trainer, policy

__all__ = ["policy"]


class WatchedPool(LocalPool):
    def __init__(self, policy: Path, calls: list[str]) -> None:
        super().__init__(ENGINE, str(policy))
        self.calls = calls

    def generate(
        self, work: Sequence[Work], params: SamplingParams, *, stop: threading.Event | None = None
    ) -> Iterator[CompletionGroup]:
        self.calls.append("sample")
        yield from super().generate(work, params, stop=stop)

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        self.calls.append(f"wake {part}")

    def load_weights(self, weights: WeightStream, version: int) -> None:
        self.calls.append(f"sync {version}")
        super().load_weights(weights, version)

    def probe(self, sequences: Sequence[Sequence[int]]) -> list[ProbeAnswer]:
        self.calls.append("probe")
        return super().probe(sequences)


@pytest.mark.parametrize("probe_every", [1, 2])
def test_engines_sleep_while_the_learner_works(policy: Path, tmp_path: Path, probe_every: int) -> None:
    calls: list[str] = []
    learner = make_learner(policy)
    update = learner.update

    def watched_update(samples: Any) -> dict[str, float]:
        calls.append("learn")
        return update(samples)

    learner.update = watched_update  # type: ignore[method-assign]
    pool = WatchedPool(policy, calls)
    make_trainer(policy, tmp_path, learner=learner, pool=pool, steps=2, probe_every=probe_every).run()

    def sync(version: int, probed: bool) -> list[str]:
        return ["wake weights", f"sync {version}", "wake kv_cache"] + ["probe"] * probed

    learned = ["sample", "sleep", "learn"]
    first, second, third = sync(0, True), sync(1, probe_every == 1), sync(2, True)
    assert calls == [*first, *learned, *second, *learned, *third]
    probed = ["sync/probe_difference" in row for row in read_metrics(tmp_path)]
    assert probed == [probe_every == 1, True]
