"""Ways to make the calls of a reward: here, in threads, in killable processes, or as coroutines.

All take a function and a list of calls and give one `Outcome` per call, in order; what the function raises is in the
outcome; a TimeoutError of its own counts as a timeout. This file knows nothing of samples and scores.

Not covered: stopping a thread, or a coroutine that never awaits. The coroutines of a run end by their deadlines; if one
holds up the event loop for longer, the run gives up on the loop and starts another.
"""

import asyncio
import concurrent.futures
import functools
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rewards.arguments import Call
from rewards.pool import CallStatus, Outcome, WorkerPool

_LOOP_GRACE_S = 5.0
Function = Callable[..., Any]


def run_here(function: Function, calls: Sequence[Call]) -> list[Outcome]:
    """One after the other, in the caller's thread."""
    return [_run_one(function, call) for call in calls]


def run_in_threads(function: Function, calls: Sequence[Call], num_threads: int) -> list[Outcome]:
    """For functions that wait, for example for a server."""
    with ThreadPoolExecutor(max(1, min(num_threads, len(calls)))) as threads:
        return list(threads.map(functools.partial(_run_one, function), calls))


def _run_one(function: Function, call: Call) -> Outcome:
    started = time.perf_counter()
    try:
        value = function(*call[0], **call[1])
    except (Exception, SystemExit) as error:  # the boundary for users' code in this process
        return _failed(error, started)
    return Outcome(status=CallStatus.OK, value=value, seconds=time.perf_counter() - started)


def run_isolated(function: Function, calls: Sequence[Call], pool: WorkerPool, timeout_s: float) -> list[Outcome]:
    """In processes that are killed at the deadline."""

    def run_one(call: Call) -> Outcome:
        return pool.call(function, *call[0], timeout_s=timeout_s, **call[1])

    if len(calls) == 1:
        return [run_one(calls[0])]
    with ThreadPoolExecutor(max(1, min(pool.num_workers, len(calls)))) as threads:
        return list(threads.map(run_one, calls))


def run_concurrently(
    function: Function, calls: Sequence[Call], max_running: int, timeout_s: float | None
) -> list[Outcome]:
    """Coroutines in one event loop that lives as long as this process, so that what they keep between runs (HTTP
    sessions, locks) stays usable; from threads and from code that runs in an event loop too.
    """
    outcomes: list[Outcome | None] = [None] * len(calls)
    loop = _event_loop(os.getpid())
    running = asyncio.run_coroutine_threadsafe(_run_all(function, calls, max_running, timeout_s, outcomes), loop)
    rounds = -(-len(calls) // max_running)
    try:
        running.result(None if timeout_s is None else timeout_s * rounds + _LOOP_GRACE_S)
    except concurrent.futures.TimeoutError:
        running.cancel()
        _event_loop.cache_clear()
    error = "the event loop was held up past the deadline; await what takes time, or use isolate=True"
    late = Outcome(status=CallStatus.TIMEOUT, error=error, seconds=timeout_s or 0.0)
    return [late if outcome is None else outcome for outcome in outcomes]


async def _run_all(
    function: Function,
    calls: Sequence[Call],
    max_running: int,
    timeout_s: float | None,
    outcomes: list[Outcome | None],
) -> None:
    """Fill `outcomes` in place, so that what is done when the caller gives up is not lost."""
    slots = asyncio.Semaphore(max_running)

    async def run_one(number: int, call: Call) -> None:
        async with slots:
            started = time.perf_counter()
            try:
                value = await asyncio.wait_for(function(*call[0], **call[1]), timeout_s)
                seconds = time.perf_counter() - started
                outcomes[number] = Outcome(status=CallStatus.OK, value=value, seconds=seconds)
            except (Exception, SystemExit) as error:  # the boundary for users' coroutines
                outcome = _failed(error, started)
                if timeout_s is not None and isinstance(error, TimeoutError) and outcome.seconds >= timeout_s:
                    text = f"the call took longer than {timeout_s:g} s; the coroutine was cancelled"
                    outcome = replace(outcome, error=text, exception=None)
                outcomes[number] = outcome

    await asyncio.gather(*(run_one(number, call) for number, call in enumerate(calls)))


def _failed(error: BaseException, started: float) -> Outcome:
    return Outcome(
        status=CallStatus.TIMEOUT if isinstance(error, TimeoutError) else CallStatus.ERROR,
        error="".join(traceback.format_exception(error)),
        exception=error,
        seconds=time.perf_counter() - started,
    )


@functools.lru_cache(1)
def _event_loop(process_id: int) -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own; keyed by the process, because a forked copy has no such thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"rewards-{process_id}", daemon=True).start()
    return loop
