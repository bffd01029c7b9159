"""Reward functions: a user's function with its name, weight, deadline and error policy.

A function takes a `Sample`, or what it needs of one by name (arguments.py), and returns a number, a bool, None (not
applicable) or a `Score`; with batch=True or group=True it takes many samples and returns a list. It may be `async`.

Covered: exceptions, NaN, inf, wrong types and wrong lengths become data (`Score.status`, `Score.info["error"]`) that
names function, sample and value, or an exception, by the function's policy; hanging, dying and memory with a deadline.
Not covered: a function without `timeout_s` runs in the caller's thread, and nothing stops it.

Usage: put `@reward(weight=0.5, timeout_s=5)` above `def short(completion): ...`, then `short.score(sample)`.
"""

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args, overload

from rewards.arguments import Arguments, Call, read_arguments
from rewards.call import run_concurrently, run_here, run_in_threads, run_isolated
from rewards.pool import CallStatus, Outcome, shared_pool
from rewards.portable import pack
from rewards.sample import FINISH_REASONS, Sample, Score, ScoreStatus, as_score

__all__ = ["FINISH_REASONS", "RewardFunction", "Sample", "Score", "ScoreStatus", "as_reward", "reward"]

OnError = Literal["skip", "zero", "raise"]
RawReward = Callable[..., Any]
"""A user's function; its parameters' names say what it takes, see arguments.py."""

_MAX_COROUTINES = 64
_MAX_ERROR_CHARS = 8000


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardFunction:
    """What `reward` and `as_reward` make of a function."""

    fn: RawReward
    """The user's function."""
    name: str
    """Key in metrics and logs; unique within a rubric, no slash."""
    weight: float = 1.0
    """Factor in the rubric's sum; 0 = logged, not trained on."""
    timeout_s: float | None = None
    """Longest wall time of one call; None = no deadline. Not counted: waiting for a free worker, loading the function
    into it."""
    on_error: OnError = "skip"
    """What an exception, a missed deadline or a refused return value becomes: value None ("skip") or 0 ("zero"), both
    with status ERROR or TIMEOUT, or an exception ("raise")."""
    isolate: bool | None = None
    """Run in worker processes that are killed at the deadline; needs `timeout_s`, and a function that can travel
    (portable.py). None = yes if there is a deadline, except for `async` functions, which are cancelled."""
    max_workers: int | None = None
    """Calls at the same time. None = one per CPU if isolated, 64 coroutines if async, else 1: the caller's thread."""
    memory_limit_mib: int = 0
    """Address space of a worker process, 0 for no limit; only if isolated."""
    batch: bool = False
    """One call for many samples, of any groups; the function returns one entry per sample."""
    batch_size: int | None = None
    """Most samples in a call, only with `batch`; None = all there are."""
    group: bool = False
    """One call per group, with all its samples; the function returns one entry per sample."""
    arguments: Arguments = field(init=False, repr=False)
    """What the function takes."""
    is_async: bool = field(init=False, repr=False)
    """Whether the function makes coroutines."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"a reward's name must be non-empty and without '/', got {self.name!r}; pass name=...")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight of reward {self.name!r} must be finite, got {self.weight}")
        if self.on_error not in get_args(OnError):
            allowed = ", ".join(get_args(OnError))
            raise ValueError(f"on_error of reward {self.name!r} must be one of {allowed}, got {self.on_error!r}")
        if self.timeout_s is not None and not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s of reward {self.name!r} must be > 0, got {self.timeout_s}")
        for setting in ("max_workers", "batch_size"):
            if (count := getattr(self, setting)) is not None and count < 1:
                raise ValueError(f"{setting} of reward {self.name!r} must be >= 1, got {count}")
        if self.batch and self.group:
            raise ValueError(f"reward {self.name!r} has both batch=True and group=True; a call takes one or the other")
        if self.batch_size is not None and not self.batch:
            raise ValueError(f"batch_size of reward {self.name!r} needs batch=True")
        arguments = read_arguments(self.name, self.fn, many=self.batch or self.group)
        object.__setattr__(self, "arguments", arguments)  # derived once; the class is frozen
        object.__setattr__(self, "is_async", _is_async(self.fn))
        if self.isolate and self.timeout_s is None:
            raise ValueError(f"reward {self.name!r} has isolate=True without a deadline; pass timeout_s=...")
        if self.timeout_s is not None and self.isolate is False and not self.is_async:
            raise ValueError(
                f"timeout_s of reward {self.name!r} needs a process that can be killed; leave out isolate=False"
            )
        if self.memory_limit_mib and not self.is_isolated:
            raise ValueError(f"memory_limit_mib of reward {self.name!r} needs isolation; pass timeout_s=...")
        if self.is_isolated:
            try:
                pack(self.fn)
            except ValueError as error:
                raise ValueError(f"reward {self.name!r}: {error}, or leave out timeout_s") from None

    @property
    def is_isolated(self) -> bool:
        """Whether calls run in worker processes."""
        return (self.timeout_s is not None and not self.is_async) if self.isolate is None else self.isolate

    @property
    def waits(self) -> bool:
        """Whether scoring leaves the caller's CPU time to others."""
        return self.is_async or self.is_isolated or (self.max_workers or 1) > 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the undecorated function: its return value unchecked, its exceptions raised."""
        return self.fn(*args, **kwargs)

    def score(self, sample: Sample) -> Score:
        """Score one sample, as a batch of one where the function takes a batch."""
        if self.group:
            raise ValueError(f"reward {self.name!r} judges a whole group; use score_groups([samples of the group])")
        return self.score_groups([[sample]])[0][0]

    def score_groups(self, groups: Sequence[Sequence[Sample]]) -> list[list[Score]]:
        """One score per sample, in the groups' order: checked, timed, failures as `on_error` says."""
        if self.group:
            units: list[Sequence[Sample]] = [group for group in groups if group]
        else:
            samples = [sample for group in groups for sample in group]
            size = (self.batch_size or len(samples) or 1) if self.batch else 1
            units = [samples[start : start + size] for start in range(0, len(samples), size)]
        scores: list[Score] = []
        calls: list[Call] = []
        problems: dict[int, KeyError] = {}
        for number, unit in enumerate(units):
            try:
                calls.append(self._arguments_for(unit))
            except KeyError as error:  # a column that is not there
                problems[number] = error
        outcomes = iter(self._run(calls))
        for number, unit in enumerate(units):
            if number in problems:
                error = problems[number]
                outcome = Outcome(status=CallStatus.ERROR, error=f"KeyError: {error}", exception=error, seconds=0.0)
            else:
                outcome = next(outcomes)
            scores += self._scores_of(unit, outcome)
        taken = iter(scores)
        return [[next(taken) for _ in group] for group in groups]

    def _arguments_for(self, unit: Sequence[Sample]) -> Call:
        return self.arguments.of_many(unit) if self.batch or self.group else self.arguments.of(unit[0])

    def _run(self, calls: Sequence[Call]) -> list[Outcome]:
        if self.is_isolated:
            assert self.timeout_s is not None
            workers = self.max_workers or os.cpu_count() or 1
            pool = shared_pool(workers, memory_limit_mib=self.memory_limit_mib, preload=("rewards",))
            return run_isolated(self.fn, calls, pool, self.timeout_s)
        if self.is_async:
            return run_concurrently(self.fn, calls, self.max_workers or _MAX_COROUTINES, self.timeout_s)
        if self.waits and len(calls) > 1:
            return run_in_threads(self.fn, calls, self.max_workers or 1)
        return run_here(self.fn, calls)

    def _scores_of(self, unit: Sequence[Sample], outcome: Outcome) -> list[Score]:
        """Read what one call returned; a list that does not fit fails all of the call's samples, an entry only its."""
        seconds = outcome.seconds / len(unit)
        values: Sequence[object] = (outcome.value,)
        if outcome.status is CallStatus.OK and (self.batch or self.group):
            try:
                values = _listed(outcome.value, len(unit))
            except (TypeError, ValueError) as error:
                outcome = Outcome(
                    status=CallStatus.ERROR, error=f"{type(error).__name__}: {error}", exception=error, seconds=seconds
                )
        if outcome.status is not CallStatus.OK:
            return [self._failure(sample, outcome, seconds) for sample in unit]
        scores: list[Score] = []
        for sample, value in zip(unit, values, strict=True):
            try:
                score = replace(as_score(value), seconds=seconds)
                if score.steps and score.steps[-1][0] > len(sample.completion):
                    raise ValueError(f"a step ends at character {score.steps[-1][0]} of {len(sample.completion)}")
            except (TypeError, ValueError, OverflowError) as error:
                problem = f"{type(error).__name__}: {error}"
                failed = Outcome(status=CallStatus.ERROR, error=problem, exception=error, seconds=seconds)
                score = self._failure(sample, failed, seconds)
            scores.append(score)
        return scores

    def _failure(self, sample: Sample, outcome: Outcome, seconds: float) -> Score:
        note = f"reward {self.name!r} failed on {sample.where()}"
        if self.on_error == "raise":
            error = outcome.exception
            if error is None:
                error = (TimeoutError if outcome.status is CallStatus.TIMEOUT else RuntimeError)(outcome.error)
            error.add_note(note)
            raise error
        return Score(
            value=0.0 if self.on_error == "zero" else None,
            info={"error": f"{note}\n{outcome.error[-_MAX_ERROR_CHARS:]}"},
            status=ScoreStatus(outcome.status.value),
            seconds=seconds,
        )


def _is_async(fn: RawReward) -> bool:
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(type(fn), "__call__", None))  # noqa: B004


def _listed(returned: Any, count: int) -> list[object]:
    if (
        isinstance(returned, str | bytes | dict)
        or not hasattr(returned, "__len__")
        or not hasattr(returned, "__iter__")
    ):
        raise TypeError(f"a reward of many samples returns a list, got {type(returned).__name__}: {returned!r:.100}")
    if len(returned) != count:
        raise ValueError(f"a reward of {count} samples returns {count} entries, got {len(returned)}: {returned!r:.100}")
    return list(returned)


AnyFunction = TypeVar("AnyFunction", bound=RawReward)


@overload
def reward(fn: RawReward, /) -> RewardFunction: ...
@overload
def reward(
    *,
    weight: float = 1.0,
    name: str | None = None,
    timeout_s: float | None = None,
    on_error: OnError = "skip",
    isolate: bool | None = None,
    max_workers: int | None = None,
    memory_limit_mib: int = 0,
    batch: bool = False,
    batch_size: int | None = None,
    group: bool = False,
) -> Callable[[RawReward], RewardFunction]: ...
def reward(
    fn: RawReward | None = None, /, *, name: str | None = None, **settings: Any
) -> RewardFunction | Callable[[RawReward], RewardFunction]:
    """Turn a function into a `RewardFunction`, whose fields are the settings; `@reward` or `@reward(weight=0.2)`."""

    def decorate(fn: RawReward) -> RewardFunction:
        return RewardFunction(fn=fn, name=_name_of(fn) if name is None else name, **settings)

    return decorate if fn is None else decorate(fn)


def as_reward(fn: RewardFunction | RawReward) -> RewardFunction:
    """Return a `RewardFunction` as it is, and wrap a plain function with the defaults of `reward`."""
    return fn if isinstance(fn, RewardFunction) else RewardFunction(fn=fn, name=_name_of(fn))


def _name_of(fn: object) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
