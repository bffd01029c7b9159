"""The training samples of one step in one file, so that they can be trained on again without an engine.

A safetensors file: for each field of `TrainingSample` the values of all samples end to end, beside them how many each
sample has (`NAME.rows`; -1 for None), and in the header, as JSON, what a value is: one number, a list or an array.
Exact: what is read equals what was written.

    write_samples(run_dir / "samples" / "step_000012.safetensors", samples, step=12)
    samples = read_samples(run_dir / "samples" / "step_000012.safetensors")
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grpo.batch import TrainingSample


def sample_path(run_dir: Path, step: int) -> Path:
    return run_dir / "samples" / f"step_{step:06d}.safetensors"


def write_samples(path: Path, samples: Sequence[TrainingSample], step: int) -> None:
    """Samples in the order in which they are trained; whole or not at all."""
    tensors: dict[str, np.ndarray] = {}
    kinds: dict[str, str] = {}
    for name in (field.name for field in fields(TrainingSample)):
        values = [getattr(sample, name) for sample in samples]
        given = [value for value in values if value is not None]
        rows = [-1 if value is None else 1 if _kind(value) == "number" else len(value) for value in values]
        tensors[f"{name}.rows"] = np.array(rows, dtype=np.int64)
        if given:
            (kinds[name],) = {_kind(value) for value in given}
            tensors[name] = _narrowed(np.concatenate([np.atleast_1d(value) for value in given]))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    about = {"content": "training samples", "step": step, "kinds": kinds}
    save_file(tensors, fresh, metadata={"about": json.dumps(about)})  # of several entries the order would vary
    fresh.replace(path)


def read_samples(path: Path) -> list[TrainingSample]:
    """Raises FileNotFoundError, or ValueError for a file that is damaged or something else."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: a run writes it with --trainer.dump-samples-every 1")
    try:
        with safe_open(path, framework="numpy") as file:
            kinds: dict[str, str] = json.loads(file.metadata()["about"])["kinds"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of training samples, or damaged: {error}") from None
    names = [name.removesuffix(".rows") for name in tensors if name.endswith(".rows")]
    columns = {name: _column(tensors[f"{name}.rows"], tensors.get(name), kinds.get(name, "")) for name in names}
    return [TrainingSample(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _column(rows: np.ndarray, values: np.ndarray | None, kind: str) -> list[Any]:
    column: list[Any] = []
    start = 0
    for count in rows.tolist():
        if count < 0 or values is None:
            column.append(None)
            continue
        part = values[start : start + count]
        column.append(part if kind == "array" else part.tolist() if kind == "list" else part[0].item())
        start += count
    return column


def _kind(value: Any) -> str:
    return "array" if isinstance(value, np.ndarray) else "number" if isinstance(value, int | float) else "list"


def _narrowed(values: np.ndarray) -> np.ndarray:
    """Python's whole numbers in the smallest type that holds them all."""
    if values.dtype != np.int64:
        return values
    return values.astype(np.promote_types(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))
