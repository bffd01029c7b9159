"""Samples, scores and reward functions: the contract between a rollout and whatever judges it.

A reward is a plain function of one `Sample` that returns a number, a bool, None (not applicable) or a `Score`.
This file is not a scheduler: it calls the function in the caller's thread.

Covered: exceptions, NaN, inf and wrong return types become data (`Score.status`, `Score.info["error"]`), not a crash.
Not covered: time limits and killing a reward that hangs, async and batch rewards, `sys.exit()` inside a reward.

Usage: put `@reward(weight=0.5)` above `def short(sample): ...`, then `Rubric([short, math_answer]).score(sample)`.
"""

import inspect
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from numbers import Real
from typing import Any, Literal, get_args, overload

FINISH_REASONS = ("stop", "length", "abort", "error")
OnError = Literal["skip", "zero", "raise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One completion with everything a reward may look at."""

    prompt: str
    """The prompt as the engine saw it, chat template included."""
    completion: str
    """The generated text, without the prompt."""
    completion_ids: tuple[int, ...] = ()
    """[T] token ids of the completion."""
    finish_reason: str = "stop"
    """Why generation ended, one of `FINISH_REASONS`."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The data set row the prompt was made from, for example {"question": ..., "answer": ...}."""
    group_id: str = ""
    """Names the prompt; equal for the completions of one group."""
    index: int = 0
    """Position within the group."""
    step: int = 0
    """Training step that asked for the sample."""

    def __post_init__(self) -> None:
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(f"finish_reason must be one of {', '.join(FINISH_REASONS)}, got {self.finish_reason!r}")

    @property
    def truncated(self) -> bool:
        """Whether the token limit, and not the model, ended the completion."""
        return self.finish_reason == "length"

    @property
    def think_prefilled(self) -> bool:
        """Whether the prompt already opened the thinking, so that the completion starts inside it."""
        return self.prompt.rstrip().endswith("<think>")

    @property
    def answer_part(self) -> str:
        """The text after the last `</think>`, or the whole completion where there is none."""
        return self.completion.rpartition("</think>")[2]


class ScoreStatus(StrEnum):
    """How the scoring went, which is not how good the sample is."""

    OK = "ok"
    TIMEOUT = "timeout"
    ERROR = "error"

    def is_failure(self) -> bool:
        """True where the reward itself failed, by error or by timeout."""
        return self is not ScoreStatus.OK


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a reward says about one sample."""

    value: float | None
    """The reward, finite; None = not applicable: the sample leaves the loss and is counted."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Named finite numbers, averaged over samples and logged."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Details for the rollout log, for example what was extracted and why it was wrong."""
    status: ScoreStatus = ScoreStatus.OK
    """Whether the scoring worked."""
    seconds: float = 0.0
    """Wall time of the scoring; filled by `RewardFunction.score`."""

    def __post_init__(self) -> None:
        if self.value is not None:
            _check_finite("the value of a Score", self.value)
        for name, number in self.metrics.items():
            _check_finite(f"metric {name!r} of a Score", number)


def _check_finite(what: str, number: object) -> None:
    if not isinstance(number, Real):
        raise TypeError(f"{what} must be a number, got {type(number).__name__}; convert it with float(...)")
    if not math.isfinite(number):
        raise ValueError(f"{what} must be finite, got {number}; return None where the reward does not apply")


RawReward = Callable[[Sample], float | Score | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardFunction:
    """A function of one sample with its name, weight and error policy; made by `reward` or `as_reward`."""

    fn: RawReward
    """The user's function."""
    name: str
    """Key in metrics and logs; unique within a rubric, no slash."""
    weight: float = 1.0
    """Factor in the rubric's sum; 0 = logged, not trained on."""
    on_error: OnError = "skip"
    """What an exception or a refused return value becomes: value None ("skip") or 0 ("zero"), both with status ERROR,
    or an exception ("raise")."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"a reward's name must be non-empty and without '/', got {self.name!r}; pass name=...")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight of reward {self.name!r} must be finite, got {self.weight}")
        if self.on_error not in get_args(OnError):
            allowed = ", ".join(get_args(OnError))
            raise ValueError(f"on_error of reward {self.name!r} must be one of {allowed}, got {self.on_error!r}")
        _check_takes_one_sample(self.name, self.fn)

    def __call__(self, sample: Sample) -> float | Score | None:
        """Call the undecorated function: its return value unchecked, its exceptions raised."""
        return self.fn(sample)

    def score(self, sample: Sample) -> Score:
        """Run the function on `sample`, check what it returns and time it; failures follow `on_error`."""
        started = time.perf_counter()
        try:
            score = _as_score(self.fn(sample))
        except Exception as error:  # the one boundary: users' code may raise anything
            where = f"group_id={sample.group_id!r}, index={sample.index}, step={sample.step}"
            error.add_note(f"reward {self.name!r} failed on the sample with {where}")
            if self.on_error == "raise":
                raise
            score = Score(
                value=0.0 if self.on_error == "zero" else None,
                info={"error": traceback.format_exc()},
                status=ScoreStatus.ERROR,
            )
        return replace(score, seconds=time.perf_counter() - started)


def _check_takes_one_sample(name: str, fn: RawReward) -> None:
    if not callable(fn) or inspect.isclass(fn):
        raise ValueError(f"reward {name!r} must be a function of one Sample, got {fn!r}")
    if inspect.iscoroutinefunction(fn):
        raise ValueError(f"reward {name!r} is async, which is not supported; write it as a plain `def`")
    signature = inspect.signature(fn)
    try:
        signature.bind(None)
    except TypeError:
        raise ValueError(f"reward {name!r} must take one argument, the Sample; its signature is {signature}") from None


def _as_score(returned: object) -> Score:
    if isinstance(returned, Score):
        return returned if returned.value is None else replace(returned, value=float(returned.value))
    if returned is None:
        return Score(value=None)
    if isinstance(returned, Real):
        return Score(value=float(returned))
    raise TypeError(
        f"a reward returns a float, int, bool, None or Score, got {type(returned).__name__}: {returned!r:.100}"
    )


@overload
def reward(fn: RawReward, /) -> RewardFunction: ...
@overload
def reward(
    *, weight: float = 1.0, name: str | None = None, on_error: OnError = "skip"
) -> Callable[[RawReward], RewardFunction]: ...
def reward(
    fn: RawReward | None = None, /, *, weight: float = 1.0, name: str | None = None, on_error: OnError = "skip"
) -> RewardFunction | Callable[[RawReward], RewardFunction]:
    """Turn a function of one `Sample` into a `RewardFunction`; works as `@reward` and as `@reward(weight=0.2)`."""

    def decorate(fn: RawReward) -> RewardFunction:
        return RewardFunction(fn=fn, name=_name_of(fn) if name is None else name, weight=weight, on_error=on_error)

    return decorate if fn is None else decorate(fn)


def as_reward(fn: RewardFunction | RawReward) -> RewardFunction:
    """Return a `RewardFunction` as it is, and wrap a plain function with the defaults of `reward`."""
    return fn if isinstance(fn, RewardFunction) else RewardFunction(fn=fn, name=_name_of(fn))


def _name_of(fn: object) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


class Rubric:
    """Several rewards as one weighted sum."""

    def __init__(self, rewards: Sequence[RewardFunction | RawReward]) -> None:
        self.rewards = tuple(as_reward(function) for function in rewards)
        if not self.rewards:
            raise ValueError("a Rubric needs at least one reward, got an empty list")
        names = [function.name for function in self.rewards]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rewards of a Rubric need unique names, got {', '.join(twice)} twice; pass name=...")

    def score(self, sample: Sample) -> Score:
        """Score with every reward and add up weight * value over those with a weight that apply; None if none does.

        A weighted reward that failed without a value makes the sum None: what is left would look like a bad sample.
        Metrics hold each value that applies under the reward's name and its own metrics under "name/metric"; info holds
        each reward's info under its name. The status is the worst of the parts: error, then timeout, then ok.
        """
        scores = {function.name: function.score(sample) for function in self.rewards}
        terms: list[float] = []
        broken = False
        metrics: dict[str, float] = {}
        for function in self.rewards:
            score = scores[function.name]
            if score.value is not None:
                metrics[function.name] = score.value
                if function.weight != 0:
                    terms.append(function.weight * score.value)
            elif function.weight != 0 and score.status.is_failure():
                broken = True
            metrics.update({f"{function.name}/{metric}": float(number) for metric, number in score.metrics.items()})
        statuses = {score.status for score in scores.values()}
        return Score(
            value=sum(terms) if terms and not broken else None,
            metrics=metrics,
            info={name: score.info for name, score in scores.items()},
            status=next(s for s in (ScoreStatus.ERROR, ScoreStatus.TIMEOUT, ScoreStatus.OK) if s in statuses),
            seconds=sum(score.seconds for score in scores.values()),
        )
