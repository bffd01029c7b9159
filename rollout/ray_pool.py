"""Engines in Ray actors, one process each, that may die or hang without harm.

Groups wait in one queue; each engine gets the next when it has fewer than `max_num_seqs` completions on its hands, so
no engine runs dry while another has work left. An engine that dies, or is silent for too long, is killed and replaced:
the new one gets the newest weights and the same requests, whose seeds give the same completions.

Weights reach them through ray_weights.py.
"""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from rollout.engine import EngineConfig, WeightStream
from rollout.pool import StreamingPool
from rollout.probe import ProbeAnswer
from rollout.ray_actor import EngineActor, RemoteEngine, check_room, stack_of, start_engines, start_ray
from rollout.ray_weights import RayWeights, post_to
from rollout.sample import FinishReason, SamplingParams
from rollout.stream import Inbox, Request, Sampled, outcome

Report = Callable[[str], None]
_LOGGER = logging.getLogger(__name__)


class RayPool(StreamingPool):
    """Implements `rollout.pool.StreamingPool` over Ray actors; starts a Ray of its own unless one is running."""

    actor_class: type = EngineActor

    def __init__(
        self, config: EngineConfig, model: str, report: Report = _LOGGER.warning, slots_beside: int = 0
    ) -> None:
        """`report` is told about every engine that is replaced, and why; `slots_beside` is for a Ray of its own."""
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            start_ray(config.num_engines + slots_beside)
        check_room(config)
        self._config, self._model, self._report = config, model, report
        self._call = 0
        self._clock = 0.0
        """Seconds spent looking at the engines: what the caller does between two groups counts against none of them."""
        self._restarts = self._reissued = self._restarts_in_a_row = 0
        self.engines: list[RemoteEngine] = start_engines(config, model, range(config.num_engines), self.actor_class)
        self._weights = RayWeights(self._actors, config)

    @property
    def _actors(self) -> list[Any]:
        return [engine.actor for engine in self.engines]

    def stream(
        self,
        groups: Sequence[Sequence[Request]],
        params: SamplingParams,
        stop: threading.Event | None,
        later: Inbox | None = None,
    ) -> Iterator[Sampled]:
        self._call += 1
        queue = deque(group for group in groups if group)
        tick = min(1.0, self._config.request_timeout_s / 4, self._config.stall_timeout_s / 4)
        if stop is not None or later is not None:
            tick = min(tick, 0.05)  # what another thread sets or puts does not wake ray.wait
        is_paused, looked, check_at = False, time.monotonic(), self._clock + tick
        try:
            while True:
                is_idle = not queue and not any(engine.waiting for engine in self.engines)
                come = later.take(sys.maxsize, wait=is_idle) if later else []
                passing = later.passing() if later else []
                if is_idle and not come and not passing:
                    break
                queue.extendleft([request] for request in come)
                yield from passing
                if stop is not None and stop.is_set() and not is_paused:
                    is_paused = True
                    for engine in self.engines:
                        if engine.waiting:
                            engine.actor.pause.remote(self._call)
                    yield from (_untouched(request) for group in queue for request in group)
                    queue.clear()
                self._hand_out(queue, params)
                in_turn = sorted(self.engines, key=lambda engine: engine.moved)
                busy = {engine.stream: engine for engine in in_turn if engine.waiting}
                ready, _ = ray.wait(list(busy), num_returns=1, timeout=tick) if busy else ([], [])
                now = time.monotonic()
                looked, self._clock = now, self._clock + min(now - looked, 2 * tick)
                for stream in ready:
                    yield from self._receive(busy[stream], params, is_paused)
                if self._clock >= check_at:
                    check_at = self._clock + tick
                    yield from self._replace_silent(params, queue, is_paused)
        finally:
            self._end_call()

    def _hand_out(self, queue: deque[Sequence[Request]], params: SamplingParams) -> None:
        """Gives groups to the engines that have the least to do, while any has room; one message to each."""
        given: dict[int, list[Request]] = {}
        while queue:
            engine = min(self.engines, key=lambda engine: len(engine.waiting))
            if len(engine.waiting) >= self._config.max_num_seqs:
                break
            group = queue.popleft()
            engine.waiting.update({request.key: (request, self._clock) for request in group})
            given.setdefault(engine.index, []).extend(group)
        for index, requests in given.items():
            self._send(self.engines[index], requests, params)

    def _send(self, engine: RemoteEngine, requests: Sequence[Request], params: SamplingParams) -> None:
        if engine.stream is None:
            engine.moved = self._clock  # before its first request it had nothing to do
            stream = engine.actor.stream.options(num_returns="streaming")
            engine.stream = stream.remote(self._call, requests, params)
        else:
            engine.actor.submit.remote(self._call, requests)

    def _receive(self, engine: RemoteEngine, params: SamplingParams, is_paused: bool) -> Iterator[Sampled]:
        """What one step of an engine finished; replaces the engine if it has died."""
        try:
            finished: list[Sampled] = ray.get(next(engine.stream))
        except RayActorError as error:
            yield from self._replace(engine, f"it died: {error}", params, is_paused)
            return
        engine.moved = self._clock
        for sampled in finished:
            # What is not waited for has come from an engine given up, or twice.
            if engine.waiting.pop(sampled.key, None) is not None:
                self._restarts_in_a_row = 0
                yield sampled

    def _replace_silent(
        self, params: SamplingParams, queue: Sequence[Sequence[Request]], is_paused: bool
    ) -> Iterator[Sampled]:
        """The watchdog: replaces engines that let their time pass, after saying who waits for whom, and where."""
        for engine in [engine for engine in self.engines if engine.waiting]:
            engine.watch(self._clock)
            if trouble := engine.trouble(self._clock, self._config):
                state = "\n".join(one.status(self._clock) for one in self.engines)
                self._report(
                    f"{state}\n{len(queue)} groups wait for a free engine\n"
                    f"stack of engine {engine.index}:\n{stack_of(engine.address)}"
                )
                yield from self._replace(engine, trouble, params, is_paused)

    def _replace(
        self, engine: RemoteEngine, reason: str, params: SamplingParams | None = None, is_paused: bool = False
    ) -> Iterator[Sampled]:
        """A new engine with the newest weights and the old one's requests; those come back at once if paused."""
        requests = [request for request, _ in engine.waiting.values()]
        self._report(f"engine {engine.index} is replaced, {len(requests)} requests are begun again: {reason}")
        while True:
            self.engines[engine.index].kill()
            self._restarts += 1
            self._restarts_in_a_row += 1
            if self._restarts_in_a_row > self._config.max_restarts:
                raise RuntimeError(
                    f"engine {engine.index} failed, and so did {self._config.max_restarts} before it with no "
                    f"completion in between (max_restarts={self._config.max_restarts}): {reason}"
                )
            try:
                (new,) = start_engines(self._config, self._model, [engine.index], self.actor_class)
                self.engines[engine.index] = new
                self._weights.replace(self._actors, new.actor)
                break
            except (RayActorError, GetTimeoutError) as error:
                reason = f"the new engine did not start: {error}"
                self._report(f"engine {engine.index}: {reason}")
        if is_paused:
            yield from (_untouched(request) for request in requests)
        elif params is not None and requests:
            self._reissued += len(requests)
            new.waiting = {request.key: (request, self._clock) for request in requests}
            self._send(new, requests, params)

    def _end_call(self) -> None:
        """Engines drop what nobody waits for any more, after an error or when the caller has lost interest."""
        for engine in self.engines:
            if engine.stream is not None:
                (engine.actor.pause if engine.waiting else engine.actor.end).remote(self._call)
            engine.stream, engine.asked = None, None
            engine.waiting.clear()

    def _ask_all(self, method: str, *args: Any) -> list[Any]:
        """Each engine's answer. One that dies, or takes longer than a request may, is replaced and asked again."""
        asked = [(engine.index, getattr(engine.actor, method).remote(*args)) for engine in self.engines]
        answers = []
        for index, answer in asked:
            while True:
                try:
                    answers.append(ray.get(answer, timeout=self._config.request_timeout_s))
                    break
                except (RayActorError, GetTimeoutError) as error:
                    list(self._replace(self.engines[index], f"{method} failed: {error}"))
                    answer = getattr(self.engines[index].actor, method).remote(*args)
        return answers

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        return self._ask_all("score", sequences)

    def load_weights(self, weights: WeightStream, version: int) -> None:
        while True:
            try:
                return self._weights.deliver(weights, version)
            except (RayActorError, GetTimeoutError) as error:
                # Whoever does not answer is replaced, and all of them get the sync again from its beginning.
                self._report(f"the sync of version {version} broke off: {error}")
                self._ask_all("ready")

    def probe(self, sequences: Sequence[Sequence[int]]) -> list[ProbeAnswer]:
        return self._ask_all("probe", sequences)

    def reject_weights(self, reason: str) -> None:
        post_to(self._actors, self._config.request_timeout_s)("reject_weights", reason)()

    def sleep(self) -> None:
        post_to(self._actors, self._config.request_timeout_s)("sleep", None)()

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        post_to(self._actors, self._config.request_timeout_s)("wake", part)()

    @property
    def counters(self) -> dict[str, float]:
        return {"engine/restarts": self._restarts, "engine/reissued": self._reissued}

    def close(self) -> None:
        for engine in self.engines:
            engine.kill()
        self.engines = []
        if self._owns_ray:
            ray.shutdown()


def _untouched(request: Request) -> Sampled:
    return outcome(request, [], [], FinishReason.PAUSED, version=-1)  # no token of it is of this version
