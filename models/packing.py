"""Sequences packed end to end without padding, and the moves between rows and tokens that keep gradients exact.

Every per-token layer works on packed tokens [T, ...]; only attention needs to know where a sequence begins.

    layout = SequenceLayout.from_lengths([5, 3])
    x_BS = layout.pad(x_T)      # [2, 5, ...], right-padded
    blocks = layout.split_blocks(x_T)   # for attention: [b, s, ...] of nearly equal lengths; join_blocks goes back
"""

import itertools
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
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


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """Where each packed token stands: sequence b occupies tokens `offsets[b]` to `offsets[b + 1]`."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, all at least 1."""
    positions_T: Tensor
    """[T] position inside its own sequence."""
    padded_rows_T: Tensor
    """[T] row in the flattened [B * S] padded form."""
    offsets_B: Tensor
    """[B + 1] index of each sequence's first token, and the total; int32, as attention kernels take it."""
    blocks: tuple[tuple[int, int], ...]
    """(sequences, padded length) of each rectangle that attention works on, longest first."""
    block_rows_T: Tensor
    """[T] row in the rectangles, flattened and laid end to end."""

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device | str = "cpu") -> "SequenceLayout":
        assert lengths and min(lengths) >= 1, f"every sequence needs at least one token, got lengths {lengths}"
        longest = max(lengths)
        lengths_B = torch.tensor(lengths)
        starts_B = lengths_B.cumsum(0) - lengths_B
        positions_T = torch.arange(sum(lengths)) - starts_B.repeat_interleave(lengths_B)
        padded_rows_T = (torch.arange(len(lengths)) * longest).repeat_interleave(lengths_B) + positions_T
        blocks, first_rows = _rectangles(lengths)
        block_rows_T = torch.tensor(first_rows).repeat_interleave(lengths_B) + positions_T
        return cls(
            lengths=tuple(lengths),
            positions_T=positions_T.to(device),
            padded_rows_T=padded_rows_T.to(device),
            offsets_B=F.pad(lengths_B.cumsum(0), (1, 0)).to(torch.int32).to(device),
            blocks=blocks,
            block_rows_T=block_rows_T.to(device),
        )

    def to(self, device: torch.device) -> "SequenceLayout":
        return moved(self, device)

    @property
    def offsets(self) -> tuple[int, ...]:
        """[B + 1] index of each sequence's first token, and the total."""
        total, offsets = 0, [0]
        for length in self.lengths:
            total += length
            offsets.append(total)
        return tuple(offsets)

    @property
    def is_rectangular(self) -> bool:
        """All sequences are equally long, so padded and packed forms are the same memory."""
        return min(self.lengths) == max(self.lengths)

    @property
    def is_one_block(self) -> bool:
        """Attention works on one rectangle without padding, which is the packed memory itself."""
        return len(self.blocks) == 1 and self.blocks[0][0] * self.blocks[0][1] == sum(self.lengths)

    def pad(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...] with zeros behind each sequence's end."""
        num_sequences, longest = len(self.lengths), max(self.lengths)
        if not self.is_rectangular:
            x_T = move_rows(x_T, self.padded_rows_T, num_sequences * longest)
        return x_T.reshape(num_sequences, longest, *x_T.shape[1:])

    def split_blocks(self, x_T: Tensor) -> list[Tensor]:
        """[T, ...] -> one [b, s, ...] for each of `blocks`, with zeros behind each sequence's end."""
        if self.is_one_block:
            return [x_T.unflatten(0, self.blocks[0])]
        x_rows = move_rows(x_T, self.block_rows_T, sum(count * length for count, length in self.blocks))
        parts = x_rows.split([count * length for count, length in self.blocks])
        return [part.unflatten(0, block) for part, block in zip(parts, self.blocks, strict=True)]

    def join_blocks(self, blocks: list[Tensor]) -> Tensor:
        """The opposite of `split_blocks`."""
        if self.is_one_block:
            return blocks[0].flatten(0, 1)
        return take_rows(torch.cat([block.flatten(0, 1) for block in blocks]), self.block_rows_T)


def _rectangles(lengths: list[int]) -> tuple[tuple[tuple[int, int], ...], list[int]]:
    """Blocks of sequences of nearly the same length, longest first, and the row where each sequence begins.

    Several sequences of one length are one block as they are, as in training on texts cut to that length. Otherwise
    lengths are rounded up to one of four steps per doubling, and a block holds a power of two of sequences: on a GPU,
    attention spends an eighth of a second on preparing each new shape, so the shapes of a run must be few.
    """
    if len(lengths) > 1 and min(lengths) == max(lengths):
        return ((len(lengths), lengths[0]),), list(range(0, sum(lengths), lengths[0]))
    padded = [_rounded_up(length) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: -padded[i])
    blocks: list[tuple[int, int]] = []
    for length, same in itertools.groupby(padded[i] for i in order):
        count = len(list(same))
        blocks += [(1 << bit, length) for bit in reversed(range(count.bit_length())) if count >> bit & 1]
    first_rows = [0] * len(lengths)
    next_row = 0
    for i in order:
        first_rows[i] = next_row
        next_row += padded[i]
    return tuple(blocks), first_rows


def _rounded_up(length: int) -> int:
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step
