"""Moves of rows between tensors whose gradients are gathers too: exact, quick, and the same bits on every run.

y = take_rows(x, index)              # x[index]
z = move_rows(y, target, num_rows)   # zeros, and y in the rows `target`
"""

from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class _MoveRows(torch.autograd.Function):
    """Copies row i of `source` to row `target[i]` of a zero tensor; `target` has no repeats.

    Twin of `zeros.index_copy(0, target, source)`, whose backward is the gather written here. The gather of this
    pair (`_TakeRows`) would otherwise be differentiated with index_add, slow and, on several threads, not repeatable.
    """

    @staticmethod
    def forward(ctx, source: Tensor, target: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(target)
        return source.new_zeros(num_rows, *source.shape[1:]).index_copy_(0, target, source)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (target,) = ctx.saved_tensors
        return grads[0].index_select(0, target), None, None


class _TakeRows(torch.autograd.Function):
    """`source[index]` for an `index` without repeats."""

    @staticmethod
    def forward(ctx, source: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = source.shape[0]
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.num_rows, *grads[0].shape[1:]).index_copy_(0, index, grads[0]), None


class _SpreadRows(torch.autograd.Function):
    """Row r of the result is `source[owner[r]]`; owner o owns the rows `rows[o]`, K of them. Twin: `source[owner]`.

    Its backward pass is the forward pass of `_CollectRows` and the other way round, so both are gathers.
    """

    @staticmethod
    def forward(ctx, source: Tensor, owner: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(owner, rows)
        return source.index_select(0, owner)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        _, rows = ctx.saved_tensors
        return grads[0][rows].sum(1), None, None


class _CollectRows(torch.autograd.Function):
    """Row o of the result is the sum of `source[rows[o]]`. Twin: `source[rows].sum(1)`."""

    @staticmethod
    def forward(ctx, source: Tensor, owner: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(owner, rows)
        return source[rows].sum(1)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        owner, _ = ctx.saved_tensors
        return grads[0].index_select(0, owner), None, None


Record = TypeVar("Record", bound="DataclassInstance")


def moved(record: Record, device: torch.device) -> Record:
    """A copy of a dataclass with its tensors on `device`."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors = {name: value.to(device) for name, value in values.items() if hasattr(value, "to")}
    return replace(record, **tensors)


def move_rows(source: Tensor, target: Tensor, num_rows: int) -> Tensor:
    """Row i of `source` becomes row `target[i]` of `num_rows` rows, the others zero. `target` must not repeat."""
    return _MoveRows.apply(source, target, num_rows)  # type: ignore[no-any-return]


def take_rows(source: Tensor, index: Tensor) -> Tensor:
    """`source[index]`; `index` must not repeat."""
    return _TakeRows.apply(source, index)  # type: ignore[no-any-return]


def spread_rows(source: Tensor, owner: Tensor, rows: Tensor) -> Tensor:
    """[O, ...] -> [R, ...]: row r is `source[owner[r]]`; `rows` [O, K] are the places of each owner in `owner`."""
    return _SpreadRows.apply(source, owner, rows)  # type: ignore[no-any-return]


def collect_rows(source: Tensor, owner: Tensor, rows: Tensor) -> Tensor:
    """[R, ...] -> [O, ...]: the sum of each owner's rows, the opposite of `spread_rows`."""
    return _CollectRows.apply(source, owner, rows)  # type: ignore[no-any-return]
