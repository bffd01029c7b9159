"""Finding a reward by name: "path/to/file.py:function", or one of the registered names; "0.1*" in front sets its
weight.

This file does not isolate what it loads: a reward file is trusted code that runs in this process, anew at each load.
The file's folder is not put on the import path.

Usage: `load_reward("my_rewards.py:short_answer")`, `load_reward("0.1*r1_format")`.
"""

import hashlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from rewards.base import RawReward, RewardFunction, as_reward
from rewards.format import r1_format
from rewards.length import thinking_length
from rewards.math_answer import exact_answer, math_answer

_REGISTRY: dict[str, RewardFunction] = {}
AnyReward = TypeVar("AnyReward", bound=RewardFunction | RawReward)


def register(function: AnyReward) -> AnyReward:
    """Make a reward known to `load_reward` under its name, and return it; a name can be taken once."""
    wrapped = as_reward(function)
    if wrapped.name in _REGISTRY:
        raise ValueError(f"a reward named {wrapped.name!r} is already registered; pass another name=... to @reward")
    _REGISTRY[wrapped.name] = wrapped
    return function


for _function in (math_answer, exact_answer, r1_format, thinking_length):
    register(_function)


def load_reward(spec: str) -> RewardFunction:
    """Return the reward that `spec` names; ValueError or FileNotFoundError says what there is instead."""
    weight, star, rest = spec.partition("*")
    if star:
        return replace(load_reward(rest), weight=_parse_weight(weight, spec))
    path, colon, name = spec.rpartition(":")
    if colon:
        return _load_from_file(Path(path).expanduser(), name)
    if spec in _REGISTRY:
        return _REGISTRY[spec]
    known = ", ".join(sorted(_REGISTRY))
    raise ValueError(f"no reward named {spec!r}; known: {known}; or write path/to/file.py:function")


def _parse_weight(text: str, spec: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"reward {spec!r}: {text!r} before the star is not a number; write e.g. 0.1*name") from None


def _load_from_file(path: Path, name: str) -> RewardFunction:
    if not path.is_file():
        raise FileNotFoundError(
            f"reward file {str(path)!r} not found (from {str(Path.cwd())!r}); write path/to/file.py:function"
        )
    if path.suffix != ".py":
        raise ValueError(f"reward file {str(path)!r} must end in .py")
    module = _import_file(path)
    function: Any = getattr(module, name, None)
    if not _is_function(function):
        problem = "has no" if function is None else f"has a {type(function).__name__}, not a function, named"
        functions = ", ".join(_functions_of(module)) or "none"
        raise ValueError(f"{path} {problem} {name!r}; functions in it: {functions}")
    return as_reward(function)


def _import_file(path: Path) -> ModuleType:
    """Run a file as a module whose name comes from its path, so that equal file names in two folders do not meet."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    module_name = f"reward_file_{digest}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec and module_spec.loader, f"no loader for {path}"
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    module_spec.loader.exec_module(module)
    return module


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
