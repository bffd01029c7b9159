"""Finding a reward by what a user writes on the command line.

    [weight*]name                        a registered reward, or an entry point of the group "grpo.rewards"
    [weight*]name(key=value, ...)        one of the registered makers of rewards, with settings (Python literals)
    [weight*]path/to/file.py:function    a function of a file, plain or decorated; with (key=value) a maker of rewards
    ... if name[>=value]                 only in `load_rubric`: counts where the reward `name` reaches 1, or the value

This file does not isolate what it loads: a reward file is trusted code that runs in this process, anew at each load,
and in a worker process too if the function has `timeout_s`. Its folder is not put on the import path: two folders with
a `helpers.py` each would get the same one. Put the folder on PYTHONPATH, or what you need into one file.

Usage: `load_reward("my_rewards.py:short")`, `load_rubric(["math_answer", "0.1*my_rewards.py:short if math_answer"])`.
"""

import ast
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from rewards.base import RawReward, RewardFunction, as_reward
from rewards.code_reward import code_reward
from rewards.format import r1_format, r1_format_thinking, tag_count
from rewards.language import language_consistency
from rewards.length import cosine_length, kimi_length, soft_overlong, thinking_length, truncation_penalty
from rewards.math_answer import exact_answer, math_answer, strict_math_answer
from rewards.portable import import_file
from rewards.remote import http
from rewards.repetition import repetition_penalty
from rewards.rubric import Gate, Rubric

_ENTRY_POINT_GROUP = "grpo.rewards"
_WEIGHT = re.compile(r"([^*(:]*)\*(.*)", re.DOTALL)
_CALL = re.compile(r"([^(]*\w)\((.*)\)", re.DOTALL)
_GATED = re.compile(r"(.*\S) if (\w+)(?: *>= *(\S+))?", re.DOTALL)
_REGISTRY: dict[str, RewardFunction] = {}
_MAKERS: dict[str, Callable[..., RewardFunction]] = {
    maker.__name__: maker
    for maker in (
        code_reward,
        cosine_length,
        http,
        kimi_length,
        language_consistency,
        repetition_penalty,
        soft_overlong,
        truncation_penalty,
    )
}
AnyReward = TypeVar("AnyReward", bound=RewardFunction | RawReward)


def register(function: AnyReward) -> AnyReward:
    """Make a reward known to `load_reward` under its name, and return it; a name can be taken once."""
    wrapped = as_reward(function)
    if wrapped.name in _REGISTRY or wrapped.name in _MAKERS:
        raise ValueError(f"a reward named {wrapped.name!r} is already registered; pass another name=... to @reward")
    _REGISTRY[wrapped.name] = wrapped
    return function


for _function in (
    math_answer,
    strict_math_answer,
    exact_answer,
    r1_format,
    r1_format_thinking,
    tag_count,
    thinking_length,
):
    register(_function)


def load_rubric(specs: Sequence[str]) -> Rubric:
    """Return the weighted sum of the rewards that `specs` name, with their gates."""
    rewards: list[RewardFunction] = []
    gates: list[Gate] = []
    for spec in specs:
        gated = _GATED.fullmatch(spec.strip())
        rewards.append(load_reward(gated[1] if gated else spec))
        if gated:
            at_least = 1.0 if gated[3] is None else _parse_number(gated[3], spec, "behind >=")
            gates.append(Gate(reward=rewards[-1].name, only_if=gated[2], at_least=at_least))
    return Rubric(rewards, gates)


def load_reward(spec: str) -> RewardFunction:
    """Return the reward that `spec` names; ValueError or FileNotFoundError says what there is instead."""
    weighted = _WEIGHT.fullmatch(spec)
    if weighted:
        weight = _parse_number(weighted[1], spec, "before the star")
        return replace(load_reward(weighted[2]), weight=weight)
    called = _CALL.fullmatch(spec.strip())
    target, settings = (called[1], _parse_settings(called[2], spec)) if called else (spec.strip(), None)
    path, colon, name = target.rpartition(":")
    if colon:
        function = _from_file(Path(path).expanduser(), name)
        return as_reward(function) if settings is None else _make(target, function, settings)
    if target in _MAKERS:
        return _make(target, _MAKERS[target], settings or {})
    function = _REGISTRY[target] if target in _REGISTRY else _from_entry_point(target, spec)
    if settings is not None:
        if isinstance(function, RewardFunction):
            raise ValueError(f"reward {target!r} takes no settings, got {called and called[2]}")
        return _make(target, function, settings)
    return as_reward(function)


def _parse_number(text: str, spec: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"reward {spec!r}: {text!r} {where} is not a number; write e.g. 0.1*name") from None


def _parse_settings(text: str, spec: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("settings need names")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError) as error:
        problem = error.msg if isinstance(error, SyntaxError) else str(error).partition(" on line")[0]
        raise ValueError(f"reward {spec!r}: {problem}; write settings as name(key=1.5, other='text')") from None


def _make(target: str, maker: Callable[..., Any], settings: dict[str, Any]) -> RewardFunction:
    signature = inspect.signature(maker)
    if "judge" in signature.parameters:
        judge = settings.get("judge", "math_answer")
        settings = {**settings, "judge": load_reward(judge) if isinstance(judge, str) else judge}
    try:
        signature.bind(**settings)
    except TypeError as error:
        raise ValueError(f"reward {target!r}: {error}; it takes {signature}") from None
    try:
        made = maker(**settings)
    except Exception as error:  # the maker may be the user's
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"reward {target!r}: {kind}{error}") from error
    if not callable(made):
        raise ValueError(f"reward {target!r} with (...) must make a reward, got {made!r:.100}; leave out the brackets")
    return as_reward(made)


def _from_entry_point(name: str, spec: str) -> Any:
    found = entry_points(group=_ENTRY_POINT_GROUP)
    for entry_point in found:
        if entry_point.name == name:
            try:
                return entry_point.load()
            except Exception as error:  # another package's code: say whose
                raise ValueError(
                    f"reward {name!r} from {entry_point.value}: {type(error).__name__}: {error}"
                ) from error
    known = ", ".join(sorted({*_REGISTRY, *_MAKERS, *(entry_point.name for entry_point in found)}))
    raise ValueError(f"no reward named {spec!r}; known: {known}; or write path/to/file.py:function")


def _from_file(path: Path, name: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"reward file {str(path)!r} not found (from {str(Path.cwd())!r}); write path/to/file.py:function"
        )
    if path.suffix != ".py":
        raise ValueError(f"reward file {str(path)!r} must end in .py")
    try:
        module = import_file(path)
    except Exception as error:  # the user's file: the traceback is chained for --verbose
        raise ValueError(f"reward file {path} cannot be loaded: {_import_problem(error, path)}") from error
    function: Any = getattr(module, name, None)
    if not _is_function(function):
        problem = "has no" if function is None else f"has a {type(function).__name__}, not a function, named"
        functions = ", ".join(_functions_of(module)) or "none"
        raise ValueError(f"{path} {problem} {name!r}; functions in it: {functions}")
    return function


def _import_problem(error: Exception, path: Path) -> str:
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path.resolve()):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    where = f" (line {lines[-1]})" if lines else ""
    problem = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, ModuleNotFoundError) and error.name:
        beside = path.resolve().parent / error.name.partition(".")[0]
        if beside.with_suffix(".py").is_file() or beside.is_dir():
            problem += f"; it lies beside the file, so run with PYTHONPATH={path.parent}"
    return problem + where


def _is_function(thing: object) -> bool:
    return callable(thing) and not isinstance(thing, type)


def _functions_of(module: ModuleType) -> list[str]:
    """Names of the functions and rewards that the file itself defines."""
    found: list[str] = []
    for name, thing in vars(module).items():
        function = thing.fn if isinstance(thing, RewardFunction) else thing
        if _is_function(function) and getattr(function, "__module__", None) == module.__name__:
            found.append(name)
    return found
