"""Configurations from files and back: strict reading of YAML or JSON into frozen dataclasses.

Unknown keys, wrong types and contradictions raise ValueError with one line that names the key and the remedy.

    config = read_config(ZeroConfig, Path("run/config.json"), default=recipe())
    write_config(config, Path("run/config.json"))
"""

import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def read_config(cls: type[T], path: Path, default: T) -> T:
    """The fields of a YAML or JSON file over `default`; nested sections may be given in part."""
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} not found")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file; a config file is YAML or JSON") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `field: value` lines, got {type(values).__name__}")
    merged = _merge(dataclasses.asdict(default), values, str(path), ())  # type: ignore[call-overload]
    try:
        return TypeAdapter(cls).validate_python(merged)
    except ValidationError as error:
        raise ValueError(f"{path}: {describe_error(error)}") from None


def _merge(base: dict[str, Any], values: dict[str, Any], source: str, prefix: tuple[str, ...]) -> dict[str, Any]:
    """`values` over `base`, section by section. Raises ValueError for a key that `base` does not have."""
    merged = dict(base)
    for key, value in values.items():
        name = ".".join((*prefix, str(key)))
        if key not in base:
            known = [".".join((*prefix, field)) for field in base]
            raise ValueError(f"{source}: unknown key {name!r}{did_you_mean(name, known)}")
        if isinstance(value, bool) and isinstance(base[key], int | float) and not isinstance(base[key], bool):
            raise ValueError(f"{source}: {name}: should be a number, got {value}")
        if isinstance(base[key], dict):
            if not isinstance(value, dict):
                raise ValueError(f"{source}: {name} is a section with fields {', '.join(base[key])}, got {value!r}")
            value = _merge(base[key], value, source, (*prefix, str(key)))
        merged[key] = value
    return merged


def did_you_mean(key: str, known: Any) -> str:
    """A remedy for a misspelt key: the nearest known one, else all of them."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def describe_error(error: ValidationError) -> str:
    """The first problem of a validation as one line: where, what was given, what is wrong."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first.get("input"), dict):  # a whole section: its own message names the field
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, got {first.get('input')!r}"


def flat_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every field, sections opened: {"trainer.steps": 100, ...}."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flat_fields(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def write_config(config: Any, path: Path) -> None:
    """Writes all fields as JSON, whole or not at all; `read_config` gives an equal object back."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w") as file:
        file.write(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
