"""A pool of engines whose completions call an environment between turns, see environment.py.

Each completion proceeds alone: while its environment works, the engines sample others, and an answered one goes back
to them at once.

    pool = EnvironmentPool(build_pool(config, model), Tools({"calculator": calculator}), encode, decode, vocab_size)
    for group in pool.generate(prompts, params): ...
"""

import asyncio
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

from rollout.engine import WeightStream
from rollout.environment import (
    Decode,
    Done,
    Encode,
    Environment,
    current_turn,
    ending_token_ids,
    num_answers,
    observed,
    unanswered,
)
from rollout.pool import EnginePool, StreamingPool
from rollout.probe import ProbeAnswer
from rollout.sample import Completion, CompletionGroup, FinishReason, Prompt, SamplingParams
from rollout.stream import Inbox, Key, Request, Sampled, Work, assemble, requests_of

_LOGGER = logging.getLogger(__name__)


class EnvironmentPool(EnginePool):
    """A pool whose completions call `environment`.

    A completion ends: with the reason `stop`, when the environment says done or after a stop token in its last turn, or
    as its last possible token;
    `length`, when `max_tokens` (which counts the environment's tokens too) or the model's longest sequence is reached,
    when the observation would leave no room for another token and therefore is left out, or when turn `max_turns`
    called the environment, which is not asked then; `error`, when a step raised, took longer than `step_timeout_s` or
    answered with nothing. Such a step is logged and counted.
    """

    def __init__(
        self,
        pool: StreamingPool,
        environment: Environment,
        encode: Encode,
        decode: Decode,
        vocab_size: int,
        *,
        max_turns: int = 8,
        step_timeout_s: float = 60.0,
        max_concurrent_steps: int = 16,
    ) -> None:
        """`max_turns` bounds the policy's turns in a completion. A step's time begins when it is one of the
        `max_concurrent_steps`.
        """
        if max_turns < 1 or max_concurrent_steps < 1 or not step_timeout_s > 0:
            raise ValueError(
                f"need max_turns >= 1, max_concurrent_steps >= 1 and step_timeout_s > 0, got {max_turns}, "
                f"{max_concurrent_steps} and {step_timeout_s}"
            )
        self.pool, self.environment, self.encode, self.decode = pool, environment, encode, decode
        self.max_turns, self.step_timeout_s = max_turns, step_timeout_s
        self.max_concurrent_steps = max_concurrent_steps
        self.turn_token_ids = ending_token_ids(environment.turn_ends, decode, vocab_size)
        self.num_steps = self.num_failed = self.num_timeouts = 0

    def generate(
        self, work: Sequence[Work], params: SamplingParams, *, stop: threading.Event | None = None
    ) -> Iterator[CompletionGroup]:
        prompts = {one.id: one for one in (one if isinstance(one, Prompt) else one.prompt for one in work)}
        params = replace(params, turn_token_ids=self.turn_token_ids)
        rollout = _Rollout(self, params, stop or threading.Event())
        groups = [[rollout.begin(prompts[r.prompt_id], r) for r in requests_of(one, params)] for one in work]
        yield from assemble(work, params, rollout.run(groups))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        return self.pool.score(sequences)

    def load_weights(self, weights: WeightStream, version: int) -> None:
        self.pool.load_weights(weights, version)

    def probe(self, sequences: Sequence[Sequence[int]]) -> list[ProbeAnswer]:
        return self.pool.probe(sequences)

    def reject_weights(self, reason: str) -> None:
        self.pool.reject_weights(reason)

    def sleep(self) -> None:
        self.pool.sleep()

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        self.pool.wake(part)

    @property
    def counters(self) -> dict[str, float]:
        return self.pool.counters | {
            "environment/steps": self.num_steps,
            "environment/failed": self.num_failed,
            "environment/timeouts": self.num_timeouts,
        }

    def close(self) -> None:
        self.pool.close()


class _Rollout:
    """One call of `generate`: the engines' stream in the caller's thread, environment steps in an event loop's."""

    def __init__(self, owner: EnvironmentPool, params: SamplingParams, stop: threading.Event) -> None:
        self._owner, self._params, self._stop = owner, params, stop
        self._requests: dict[Key, Request] = {}
        self._states: dict[Key, Any] = {}
        """Of completions that are not whole."""
        self._inbox = Inbox(stop=stop)
        """On their way back: requests to the engines, whole completions to the caller."""
        self._num_open = 0
        self._steps: list[Future[None]] = []
        self._slots = asyncio.Semaphore(owner.max_concurrent_steps)

    def begin(self, prompt: Prompt, request: Request) -> Request:
        """Remembers the state that belongs to a request; the request as engines shall see it."""
        if request.so_far is None:
            self._states[request.key] = self._owner.environment.start(prompt)
        else:
            self._states[request.key] = request.so_far.environment_state
            request = replace(request, so_far=replace(request.so_far, environment_state=None))
        self._requests[request.key] = request
        self._num_open += 1
        return request

    def run(self, groups: Sequence[Sequence[Request]]) -> Iterator[Sampled]:
        """Each completion as it ends, or is paused."""
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="environment", daemon=True)
        thread.start()
        try:
            fresh = [[request for request in group if not self._resume(request)] for group in groups]
            if self._num_open == 0:
                self._inbox.close()
            from_engines = self._owner.pool.stream(fresh, self._params, self._stop, self._inbox)
            for sampled in chain(from_engines, self._left()):
                if sampled.key in self._states:
                    self._receive(sampled)
                    continue
                self._num_open -= 1
                if self._num_open == 0:
                    self._inbox.close()
                yield sampled
        finally:
            asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def _left(self) -> Iterator[Sampled]:
        """What the engines have not given out because they were stopped."""
        for step in self._steps:
            step.result()
        for request in self._inbox.drain():
            assert request.so_far is not None, "only answered turns come later"
            self._finish(request.key, request.so_far, FinishReason.PAUSED)
        yield from self._inbox.passing()

    def _resume(self, request: Request) -> bool:
        """Whether the request was paused between the end of a turn and the answer, which is seen to here."""
        if request.so_far is None or not self._has_ended_turn(request.so_far):
            return False
        self._ask(request.key, request.so_far)
        return True

    def _receive(self, sampled: Sampled) -> None:
        """What came from an engine: a whole completion, an ended turn, or a token that only looked like its end."""
        completion = sampled.completion
        if completion.finish_reason is FinishReason.ERROR:
            self._finish(sampled.key, completion, FinishReason.ERROR)
        elif completion.finish_reason is FinishReason.LENGTH:
            self._finish(sampled.key, unanswered(completion), FinishReason.LENGTH)
        elif self._stop.is_set():
            self._finish(sampled.key, completion, FinishReason.PAUSED)
        elif self._has_ended_turn(completion):
            self._ask(sampled.key, completion)
        else:
            self._send(sampled.key, completion)

    def _has_ended_turn(self, completion: Completion) -> bool:
        turn = current_turn(completion)
        if turn[-1:] == [self._params.stop_token_id]:
            return True
        if not turn or turn[-1] not in self._params.turn_token_ids:
            return False
        (text,) = self._owner.decode([turn])
        return any(end in text for end in self._owner.environment.turn_ends)

    def _ask(self, key: Key, completion: Completion) -> None:
        """Has the environment answer, unless it is too late for that."""
        is_last = num_answers(completion) + 1 >= self._owner.max_turns
        if is_last or len(completion.token_ids) >= self._params.max_tokens:
            is_stop = completion.token_ids[-1] == self._params.stop_token_id
            self._finish(key, completion, FinishReason.STOP if is_stop else FinishReason.LENGTH)
        else:
            self._steps.append(asyncio.run_coroutine_threadsafe(self._step(key, completion), self._loop))

    async def _step(self, key: Key, completion: Completion) -> None:
        """One step of the environment, and what follows from it. Runs in the event loop; raises nothing."""
        owner = self._owner
        async with self._slots:
            answer = asyncio.ensure_future(self._answer(key, completion))
            owner.num_steps += 1
            # Unlike wait_for, this does not wait for the end of a step that does not let itself be canceled.
            is_timeout = not (await asyncio.wait([answer], timeout=owner.step_timeout_s))[0]
        if is_timeout:
            answer.cancel()
            owner.num_timeouts += 1
            _LOGGER.warning("the environment took over %s s for a turn of %s: error", owner.step_timeout_s, key)
            self._finish(key, completion, FinishReason.ERROR)
        elif answer.cancelled() or answer.exception() is not None:
            owner.num_failed += 1
            cause = None if answer.cancelled() else answer.exception()
            _LOGGER.warning("the environment failed at a turn of %s: error", key, exc_info=cause)
            self._finish(key, completion, FinishReason.ERROR)
        elif (token_ids := answer.result()) is None:
            self._finish(key, completion, FinishReason.STOP)
        elif len(completion.token_ids) + len(token_ids) >= self._params.max_tokens:
            self._finish(key, completion, FinishReason.LENGTH)
        else:
            self._send(key, observed(completion, token_ids))

    async def _answer(self, key: Key, completion: Completion) -> list[int] | None:
        """The observation's tokens; None for done."""
        (text,) = self._owner.decode([current_turn(completion)])
        answer = await self._owner.environment.step(self._states[key], text)
        if isinstance(answer, Done):
            return None
        token_ids = self._owner.encode(answer.text)
        if not token_ids:
            raise ValueError(
                f"an observation of no tokens, {answer.text!r}, to the turn {text!r}; answer Done() instead"
            )
        return token_ids

    def _send(self, key: Key, completion: Completion) -> None:
        """Back to the engines, before what is not begun, so that groups become complete."""
        self._inbox.put_first(replace(self._requests[key], so_far=completion))

    def _finish(self, key: Key, completion: Completion, reason: FinishReason) -> None:
        """Out to the caller."""
        prompt_id, index = key
        state = self._states.pop(key)
        kept = state if reason is FinishReason.PAUSED else None
        whole = replace(completion, finish_reason=reason, environment_state=kept)
        self._inbox.pass_on(Sampled(prompt_id=prompt_id, index=index, completion=whole))


async def _cancel_others() -> None:
    """Ends the steps that nobody waits for; one that does not let itself be canceled is left behind."""
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in others:
            task.cancel()
        await asyncio.wait(others, timeout=1.0)
