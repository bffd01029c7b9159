"""Reward functions written for TRL, verl and OpenRLHF, used as they are.

`from_trl(f)`, `from_verl(f)`, `from_openrlhf(f)` take the settings of `reward` too: `from_trl(f, timeout_s=10)`.
What the framework would pass and we do not have (its tokenizer, its trainer) is left out; what a function does not
accept is not passed.

Usage: in a file of yours, `length = from_trl(length_reward)`; then `--reward my_rewards.py:length`.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from rewards.base import RewardFunction, Sample, Score, reward
from rewards.sample import as_score

Function = Callable[..., Any]


def from_trl(function: Function, *, conversational: bool = False, **settings: Any) -> RewardFunction:
    """Wrap `f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list`.

    `conversational` passes prompts and completions as lists of messages instead of texts. `log_metric` values become
    metrics of every score of the call, `log_extra` values its info.
    """
    adapter = _await_trl if inspect.iscoroutinefunction(function) else _call_trl
    wrapped = partial(adapter, function=function, conversational=conversational)
    return reward(**{"name": _name(function), "batch": True, **settings})(wrapped)


def _call_trl(samples: list[Sample], function: Function, conversational: bool) -> list[Score]:
    arguments, logged = _trl_arguments(samples, conversational)
    return _trl_scores(samples, function(**_accepted(function, arguments)), logged)


async def _await_trl(samples: list[Sample], function: Function, conversational: bool) -> list[Score]:
    arguments, logged = _trl_arguments(samples, conversational)
    return _trl_scores(samples, await function(**_accepted(function, arguments)), logged)


def _trl_arguments(samples: list[Sample], conversational: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    logged: dict[str, Any] = {"metrics": {}, "extra": {}}
    columns = {name: None for sample in samples for name in sample.row}
    arguments: dict[str, Any] = {name: [sample.row.get(name) for sample in samples] for name in columns}
    for taken in ("prompt", "completion"):  # as TRL does: these are passed in the plural
        arguments.pop(taken, None)
    prompts: list[Any] = [sample.prompt for sample in samples]
    completions: list[Any] = [sample.completion for sample in samples]
    if conversational:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    arguments |= {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": [list(sample.completion_ids) for sample in samples],
        "trainer_state": SimpleNamespace(global_step=samples[0].step),
        "log_extra": logged["extra"].__setitem__,
        "log_metric": logged["metrics"].__setitem__,
    }
    return arguments, logged


def _trl_scores(samples: list[Sample], returned: Any, logged: dict[str, Any]) -> list[Score]:
    values = _entries(returned, len(samples), "the list of rewards")
    metrics = {name: _number(value) for name, value in logged["metrics"].items()}
    extra = {name: _entries(values, len(samples), f"log_extra {name!r}") for name, values in logged["extra"].items()}
    return [
        _score(value, metrics, {name: entries[i] for name, entries in extra.items()}) for i, value in enumerate(values)
    ]


def from_verl(
    function: Function, *, ground_truth: str = "answer", data_source: str = "", **settings: Any
) -> RewardFunction:
    """Wrap `compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | dict(score=..., ...)`.

    The ground truth is `row["reward_model"]["ground_truth"]` in rows made for verl, else the column `ground_truth`
    names. `data_source` stands in where the row has none; `extra_info` is the whole row where it has none. Numbers in a
    returned dict become metrics, the rest info.
    """
    adapter = _await_verl if inspect.iscoroutinefunction(function) else _call_verl
    wrapped = partial(adapter, function=function, column=ground_truth, source=data_source)
    return reward(**{"name": _name(function), **settings})(wrapped)


def _call_verl(sample: Sample, function: Function, column: str, source: str) -> Score:
    return _verl_score(function(**_accepted(function, _verl_arguments(sample, column, source))))


async def _await_verl(sample: Sample, function: Function, column: str, source: str) -> Score:
    return _verl_score(await function(**_accepted(function, _verl_arguments(sample, column, source))))


def _verl_arguments(sample: Sample, column: str, source: str) -> dict[str, Any]:
    made_for_verl = sample.row.get("reward_model")
    if isinstance(made_for_verl, Mapping) and "ground_truth" in made_for_verl:
        ground_truth = made_for_verl["ground_truth"]
    elif column in sample.row:
        ground_truth = sample.row[column]
    else:
        columns = ", ".join(map(str, sample.row)) or "none"
        raise KeyError(f"no column {column!r} for the ground truth; from_verl(f, ground_truth=...); columns: {columns}")
    return {
        "data_source": sample.row.get("data_source", source),
        "solution_str": sample.completion,
        "ground_truth": ground_truth,
        "extra_info": sample.row.get("extra_info", dict(sample.row)),
    }


def _verl_score(returned: Any) -> Score:
    if not isinstance(returned, Mapping):
        return as_score(returned)
    if "score" not in returned:
        raise ValueError(f"a verl function returns a number or a dict with 'score', got keys {', '.join(returned)}")
    rest = {name: value for name, value in returned.items() if name != "score"}
    numbers = {name: float(value) for name, value in rest.items() if isinstance(value, int | float)}
    return _score(returned["score"], numbers, {name: value for name, value in rest.items() if name not in numbers})


def from_openrlhf(function: Function, *, label: str = "answer", **settings: Any) -> RewardFunction:
    """Wrap `reward_func(queries, prompts, labels) -> {"rewards": ..., "scores": ..., "extra_logs": {...}}`, or a list.

    A query is prompt + completion; labels are the column that `label` names. "scores" become the metric "score",
    "extra_logs" metrics under their names.
    """
    wrapped = partial(_call_openrlhf, function=function, label=label)
    return reward(**{"name": _name(function), "batch": True, **settings})(wrapped)


def _call_openrlhf(samples: list[Sample], function: Function, label: str) -> list[Score]:
    request = openrlhf_request(samples, label)
    arguments = {"queries": request["query"], "prompts": request["prompts"], "labels": request["labels"]}
    return openrlhf_scores(function(**_accepted(function, arguments)), len(samples))


def openrlhf_request(samples: Sequence[Sample], label: str) -> dict[str, list[Any]]:
    """What OpenRLHF sends: query (prompt + completion), prompts, labels; KeyError if no sample has the label."""
    if not any(label in sample.row for sample in samples):
        columns = ", ".join(map(str, samples[0].row)) or "none"
        raise KeyError(f"no column {label!r} for the labels; pass label=...; columns: {columns}")
    return {
        "query": [sample.prompt + sample.completion for sample in samples],
        "prompts": [sample.prompt for sample in samples],
        "labels": [sample.row.get(label) for sample in samples],
    }


def openrlhf_scores(returned: Any, count: int) -> list[Score]:
    """Read what OpenRLHF expects back; ValueError or TypeError where it is something else."""
    if not isinstance(returned, Mapping):
        returned = {"rewards": returned}
    if "rewards" not in returned:
        raise ValueError(f"'rewards' is missing from the answer; it has {', '.join(map(str, returned)) or 'nothing'}")
    values = _entries(returned["rewards"], count, "'rewards'")
    metrics = {name: _entries(entries, count, name) for name, entries in (returned.get("extra_logs") or {}).items()}
    if returned.get("scores") is not None:
        metrics["score"] = _entries(returned["scores"], count, "'scores'")
    return [
        _score(value, {name: _number(entries[i]) for name, entries in metrics.items()}, {})
        for i, value in enumerate(values)
    ]


def _score(value: Any, metrics: Mapping[str, float], info: Mapping[str, Any]) -> Score:
    score = as_score(value)
    return Score(value=score.value, metrics={**metrics, **score.metrics}, info={**info, **score.info})


def _entries(values: Any, count: int, what: str) -> list[Any]:
    """A list, array or tensor as a list of `count`; a single number stands for all."""
    if hasattr(values, "tolist"):  # numpy and torch
        values = values.tolist()
    if not isinstance(values, Iterable) or isinstance(values, str | Mapping):
        if hasattr(type(values), "__float__"):
            return [values] * count
        raise TypeError(f"{what} must be a list of numbers, got {type(values).__name__}: {values!r:.100}")
    entries = list(values)
    if len(entries) != count:
        raise ValueError(f"{what} must have {count} entries, one per sample, got {len(entries)}")
    return entries


def _number(value: Any) -> float:
    return float(value)


def _accepted(function: Function, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the function takes of `arguments`; all of them if it has `**kwargs`."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def _name(function: Function) -> str:
    return getattr(function, "__name__", type(function).__name__)
