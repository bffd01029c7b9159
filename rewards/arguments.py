"""Which arguments a reward function takes, by the names of its parameters.

`sample` (or a parameter annotated `Sample`) is the whole sample; `FIELDS` name what every sample has; any other name is
a column of the data set's row, which must be there unless the parameter has a default. `**rest` gets the columns that
no parameter names. A field hides a column of its name, which is then in `row`. Functions of a batch or a group take
`samples` instead, and each of the other names is a list with one entry per sample.

Usage: `read_arguments("exact", exact, many=False).of(sample)` gives (args, kwargs) for a call.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rewards.sample import Sample

FIELDS = (
    "prompt", "completion", "completion_ids", "observations", "finish_reason", "truncated", "answer_part", "thinking",
    "row", "group_id", "index", "step",
)  # fmt: skip
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of one call."""

_WRITTEN_FOR = {
    "prompts": "from_trl", "completions": "from_trl", "solution_str": "from_verl", "ground_truth": "from_verl",
    "queries": "from_openrlhf", "labels": "from_openrlhf",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What a function takes; made by `read_arguments`."""

    sample: str | None
    """The parameter for the Sample or the list of samples, "" if it is positional only, None if there is none."""
    fields: tuple[str, ...]
    """Parameters that are fields of a sample."""
    columns: tuple[str, ...]
    """Parameters that are columns without a default."""
    optional: tuple[str, ...]
    """Parameters that are columns with a default."""
    rest: bool
    """Whether the function takes `**rest`."""

    def of(self, sample: Sample) -> Call:
        """The arguments for one sample. KeyError, with what there is, for a column that the row does not have."""
        if not (self.fields or self.columns or self.optional or self.rest):
            return ((sample,), {}) if not self.sample else ((), {self.sample: sample})
        row = sample.row
        named: dict[str, Any] = {}
        if self.rest:
            named.update(row)
            for name in self.fields:
                named.pop(name, None)
        for name in self.fields:
            named[name] = getattr(sample, name)
        for name in self.columns:
            if name not in row:
                raise MissingColumn(name, sample)
            named[name] = row[name]
        for name in self.optional:
            if name in row:
                named[name] = row[name]
        if self.sample:
            named[self.sample] = sample
        return ((sample,) if self.sample == "" else ()), named

    def of_many(self, samples: Sequence[Sample]) -> Call:
        """The arguments for a batch or a group; a column that only some rows have is None in the others."""
        named: dict[str, Any] = {name: [getattr(sample, name) for sample in samples] for name in self.fields}
        present = {name for sample in samples for name in sample.row} if self.columns or self.optional else set()
        for name in self.columns:
            if name not in present:
                raise MissingColumn(name, samples[0])
        wanted = {*self.columns, *(name for name in self.optional if name in present)}
        if self.rest:
            wanted |= {name for sample in samples for name in sample.row} - {*self.fields}
        named |= {name: [sample.row.get(name) for sample in samples] for name in sorted(wanted)}
        if self.sample:
            named[self.sample] = list(samples)
        return ((list(samples),) if self.sample == "" else ()), named


class MissingColumn(KeyError):
    """A function asks for something that a sample does not have."""

    def __init__(self, name: str, sample: Sample) -> None:
        hint = f"; is it written for another framework? wrap it in {_WRITTEN_FOR[name]}" if name in _WRITTEN_FOR else ""
        columns = ", ".join(map(str, sample.row)) or "none"
        super().__init__(
            f"parameter {name!r} is neither a field nor a column; fields: sample, {', '.join(FIELDS)}; "
            f"columns of the row: {columns}{hint}"
        )

    def __str__(self) -> str:
        return self.args[0]  # KeyError would show it quoted


def read_arguments(name: str, function: Callable[..., Any], *, many: bool) -> Arguments:
    """Read a function's signature. Raises ValueError where it cannot be called as a reward."""
    if not callable(function) or inspect.isclass(function):
        raise ValueError(f"reward {name!r} must be a function, got {function!r}")
    bound = set(function.keywords) if isinstance(function, partial) else set()
    whole, other = ("samples", "sample") if many else ("sample", "samples")
    sample: str | None = None
    fields, columns, optional = [], [], []
    rest = False
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            rest = True
        elif parameter.kind is parameter.VAR_POSITIONAL or parameter.name in bound:
            continue
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            if sample is not None or len(signature.parameters) > 1:
                raise ValueError(f"reward {name!r} has positional-only parameters, {signature}; remove the slash")
            sample = ""
        elif parameter.name == whole or parameter.annotation in (Sample, "Sample"):
            sample = parameter.name
        elif parameter.name == other:
            kinds = "a batch or group takes" if many else "without batch=True or group=True it takes"
            raise ValueError(f"reward {name!r} takes {other!r}, but {kinds} {whole!r}; its signature is {signature}")
        elif parameter.name in FIELDS:
            fields.append(parameter.name)
        else:
            (columns if parameter.default is parameter.empty else optional).append(parameter.name)
    if sample is None and not (fields or columns or optional or rest):
        raise ValueError(
            f"reward {name!r} takes nothing of the sample; its signature is {signature}; name a parameter {whole!r}, "
            f"{', '.join(map(repr, FIELDS[:2]))} or like a column of the data"
        )
    return Arguments(
        sample=sample, fields=tuple(fields), columns=tuple(columns), optional=tuple(optional), rest=rest
    )  # fmt: skip
