"""Copies of tokens in the rows that attention works on, and the way back, both with exact gradients.

A token stands in one row, or in several where sequences share their beginning; nothing may be read from a
row that is padding.

Shapes: T tokens, R rows, P tokens that stand in several rows, K rows of the one that stands in most.

    placement = Placement.of(tokens_R)  # -1 for padding
    x_R = placement.spread(x_T)
    y_T = placement.collect(y_R)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.moves import moved, take_rows


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which token stands in each row."""

    tokens_R: Tensor
    """[R] the token in each row, the first one in padding."""
    rows_T: Tensor
    """[T] the first row of each token."""
    shared_P: Tensor
    """[P] the tokens that stand in several rows."""
    rows_PK: Tensor
    """[P, K] all their rows; the first one again where there are fewer than K."""
    is_row_PK: Tensor
    """[P, K] 1.0 for a row, 0.0 for a repetition of the first."""

    @classmethod
    def of(cls, tokens_R: Tensor) -> "Placement":
        """The token of each row, -1 for padding; every token has a row."""
        order = tokens_R.argsort(stable=True)[(tokens_R < 0).sum() :]  # the rows of token 0, of token 1, ...
        counts_T = tokens_R[order].bincount()
        begins_T = counts_T.cumsum(0) - counts_T
        shared_P = (counts_T > 1).nonzero().squeeze(1)
        steps_K = torch.arange(int(counts_T.max()))
        is_row_PK = steps_K < counts_T[shared_P, None]
        return cls(
            tokens_R=tokens_R.clamp(min=0),
            rows_T=order[begins_T],
            shared_P=shared_P,
            rows_PK=order[begins_T[shared_P, None] + steps_K * is_row_PK],
            is_row_PK=is_row_PK.float(),
        )

    def to(self, device: torch.device) -> "Placement":
        return moved(self, device)

    def spread(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [R, ...]. The gradient of padding rows must be zero; it is not looked at."""
        return _Spread.apply(x_T, self)  # type: ignore[no-any-return]

    def collect(self, x_R: Tensor) -> Tensor:
        """[R, ...] -> [T, ...] from each token's first row."""
        return take_rows(x_R, self.rows_T)


class _Spread(torch.autograd.Function):
    """Twin: `x_T[tokens_R]`, whose own backward pass is an index_add, slow and on a GPU not repeatable."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, placement: Placement) -> Tensor:
        ctx.placement = placement
        return x_T.index_select(0, placement.tokens_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        placement: Placement = ctx.placement
        grad_T = grads[0].index_select(0, placement.rows_T)
        if len(placement.shared_P):
            grad_PKX = grads[0].flatten(1)[placement.rows_PK]
            weights_P1K = placement.is_row_PK.to(grad_PKX.dtype)[:, None]
            grad_T[placement.shared_P] = (weights_P1K @ grad_PKX).unflatten(2, grads[0].shape[1:]).squeeze(1)
        return grad_T, None
