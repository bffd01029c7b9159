"""Sequences packed end to end without padding, and the moves between rows and tokens that keep gradients exact.

Every per-token layer works on packed tokens [T, ...]; only attention needs to know where a sequence begins.

    layout = SequenceLayout.from_lengths([5, 3])
    x_BS = layout.pad(x_T)      # [2, 5, ...], right-padded
    x_T = layout.unpad(x_BS)
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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


def move_rows(source: Tensor, target: Tensor, num_rows: int) -> Tensor:
    """Row i of `source` becomes row `target[i]` of `num_rows` rows, the others zero. `target` must not repeat."""
    return _MoveRows.apply(source, target, num_rows)  # type: ignore[no-any-return]


def take_rows(source: Tensor, index: Tensor) -> Tensor:
    """`source[index]`; `index` must not repeat."""
    return _TakeRows.apply(source, index)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """Where each packed token stands: sequence b occupies tokens `offsets[b]` to `offsets[b + 1]`."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, all at least 1."""
    positions_T: Tensor
    """[T] position inside its own sequence."""
    padded_rows_T: Tensor
    """[T] row in the flattened [B * S] padded form."""

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device | str = "cpu") -> "SequenceLayout":
        assert lengths and min(lengths) >= 1, f"every sequence needs at least one token, got lengths {lengths}"
        longest = max(lengths)
        lengths_B = torch.tensor(lengths, device=device)
        starts_B = lengths_B.cumsum(0) - lengths_B
        positions_T = torch.arange(sum(lengths), device=device) - starts_B.repeat_interleave(lengths_B)
        rows_B = torch.arange(len(lengths), device=device) * longest
        padded_rows_T = rows_B.repeat_interleave(lengths_B) + positions_T
        return cls(lengths=tuple(lengths), positions_T=positions_T, padded_rows_T=padded_rows_T)

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

    def pad(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...] with zeros behind each sequence's end."""
        num_sequences, longest = len(self.lengths), max(self.lengths)
        if not self.is_rectangular:
            x_T = move_rows(x_T, self.padded_rows_T, num_sequences * longest)
        return x_T.reshape(num_sequences, longest, *x_T.shape[1:])

    def unpad(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]."""
        x_rows = x_BS.reshape(-1, *x_BS.shape[2:])
        return x_rows if self.is_rectangular else take_rows(x_rows, self.padded_rows_T)
