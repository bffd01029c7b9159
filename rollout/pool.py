"""Engine pools: several engines behind one interface, here or in Ray actors.

`LocalPool` runs one engine in this process; `RayPool` (ray_pool.py) runs any number, each in its own process. They give
the same completions for the same seeds, up to float rounding of the engines' batches.

    pool = build_pool(EngineConfig(num_engines=2), "checkpoint_dir")
    for group in pool.generate(prompts, params): ...
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

from rollout.engine import EngineConfig, WeightStream, build_engine
from rollout.probe import ProbeAnswer, probe_engine
from rollout.sample import CompletionGroup, SamplingParams
from rollout.stream import Inbox, Request, Sampled, Work, assemble, requests_of


class EnginePool(ABC):
    """What the trainer needs of its engines, wherever they run."""

    @abstractmethod
    def generate(
        self, work: Sequence[Work], params: SamplingParams, *, stop: threading.Event | None = None
    ) -> Iterator[CompletionGroup]:
        """Groups as they become complete, in no promised order.

        Once `stop` is set, by any thread, what is unfinished comes as it is, its completions with finish reason
        `paused`. Such a group given as `work` later is continued, with the same seeds and what is left of its
        `max_tokens`, under the weights that the engines hold then.
        """

    @abstractmethod
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """Each engine's `Engine.score` of the same sequences."""

    @abstractmethod
    def load_weights(self, weights: WeightStream, version: int) -> None:
        """Gives every engine these weights; returns when all hold them. Raises SyncError as `Engine.load_weights`."""

    @abstractmethod
    def probe(self, sequences: Sequence[Sequence[int]]) -> list[ProbeAnswer]:
        """Each engine's answer to the same probe."""

    @abstractmethod
    def reject_weights(self, reason: str) -> None:
        """Every engine refuses to sample until the next complete sync."""

    @abstractmethod
    def sleep(self) -> None:
        """Every engine gives its share of a common GPU to the learner; `wake` and a sync must follow."""

    @abstractmethod
    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Every engine takes memory back: `weights` before the sync, `kv_cache` after it."""

    @property
    def counters(self) -> dict[str, float]:
        """What went wrong so far, by metric name."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Stops the engines and the processes they run in; also in the middle of `generate`."""


class StreamingPool(EnginePool):
    """A pool of which single completions can be asked."""

    def generate(
        self, work: Sequence[Work], params: SamplingParams, *, stop: threading.Event | None = None
    ) -> Iterator[CompletionGroup]:
        yield from assemble(work, params, self.stream([requests_of(one, params) for one in work], params, stop))

    @abstractmethod
    def stream(
        self,
        groups: Sequence[Sequence[Request]],
        params: SamplingParams,
        stop: threading.Event | None,
        later: Inbox | None = None,
    ) -> Iterator[Sampled]:
        """Single completions as they finish, one for every request; requests of a group go to the same engine.

        `later`, made with the same `stop`, is for requests that come while this runs, each a group of its own and
        before those that wait, and for completions to be given out with the others; then this ends when that is closed
        and all is finished. Once `stop` is set, what comes to `later` may stay in it.
        """


class LocalPool(StreamingPool):
    """One engine in this process."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        self._engine = build_engine(config, model)

    def stream(
        self,
        groups: Sequence[Sequence[Request]],
        params: SamplingParams,
        stop: threading.Event | None,
        later: Inbox | None = None,
    ) -> Iterator[Sampled]:
        inbox = later or Inbox(stop=stop)
        inbox.put([request for group in groups for request in group])
        if later is None:
            inbox.close()
        for finished in self._engine.stream(inbox, params):
            yield from finished

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        return [self._engine.score(sequences)]

    def load_weights(self, weights: WeightStream, version: int) -> None:
        self._engine.load_weights(weights, version)

    def probe(self, sequences: Sequence[Sequence[int]]) -> list[ProbeAnswer]:
        return [probe_engine(self._engine, sequences)]

    def reject_weights(self, reason: str) -> None:
        self._engine.reject_weights(reason)

    def sleep(self) -> None:
        self._engine.sleep()

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        self._engine.wake(part)

    def close(self) -> None:
        self._engine.close()


def build_pool(config: EngineConfig, model: str, slots_beside: int = 0) -> StreamingPool:
    """Starts the engines of `config` with the checkpoint folder `model`; if Ray is not running yet, with that many
    slots for other processes."""
    if config.transport == "local":
        return LocalPool(config, model)
    from rollout.ray_pool import RayPool  # Ray starts processes: only for those who ask

    return RayPool(config, model, slots_beside=slots_beside)
