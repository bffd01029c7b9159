"""Expert parallelism: each rank holds some of a layer's experts, and rows travel to the rank that holds theirs.

Shapes: R rows of this rank, sorted by expert; S rows that arrive here; P ranks, X experts on each of them, E = P * X.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.moves import take_rows

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rows [S, D] sorted by expert, their weights [S], the end of each of X experts' rows [X] int32 -> [S, D]."""


class ExpertExchange:
    """Sends rows to the experts of a process group's ranks, and the results back (arXiv:2006.16668).

    Rank p holds the experts p * X to (p + 1) * X - 1. Collective: every rank calls, with or without rows.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, x_RD: Tensor, weights_R: Tensor, ends_E: Tensor, compute: Compute) -> Tensor:
        """[R, D] -> [R, D], what `compute` makes of the rows where their experts are; `ends_E` is where each expert's
        rows end among R."""
        size = self.group.size()
        counts_PX = ends_E.diff(prepend=ends_E.new_zeros(1)).view(size, -1)
        arrived_PX = torch.empty_like(counts_PX)
        dist.all_to_all_single(arrived_PX, counts_PX, group=self.group)
        sent, arrived = torch.stack([counts_PX.sum(1), arrived_PX.sum(1)]).tolist()  # a GPU is waited for here
        x_SD, weights_S = _exchange(self.group, sent, arrived, x_RD, weights_R)
        # They come rank by rank, and are wanted expert by expert.
        experts_X = torch.arange(counts_PX.shape[1], device=x_RD.device)
        order_S = experts_X.repeat(size).repeat_interleave(arrived_PX.flatten()).argsort(stable=True)
        ends_X = arrived_PX.sum(0).cumsum(0).to(torch.int32)
        x_SD, weights_S = take_rows(x_SD, order_S), take_rows(weights_S, order_S)
        if not len(order_S):  # experts without a row still join the backward pass, and grouped products need a row
            x_SD, weights_S, ends_X = F.pad(x_SD, (0, 0, 0, 1)), F.pad(weights_S, (0, 1)), torch.ones_like(ends_X)
        out_SD = compute(x_SD, weights_S, ends_X)[: len(order_S)]
        (out_RD,) = _exchange(self.group, arrived, sent, take_rows(out_SD, order_S.argsort()))
        return out_RD

    @staticmethod
    def local(weight: Any) -> Tensor:
        """[E, ...], of which this rank has X -> those [X, ...], with gradient."""
        return weight.to_local()


def _exchange(
    group: dist.ProcessGroup, sent: Sequence[int], arriving: Sequence[int], *tensors: Tensor
) -> tuple[Tensor, ...]:
    """The first `sent[0]` rows of each tensor go to rank 0, the next `sent[1]` to rank 1; `arriving` come likewise."""
    return _Exchange.apply(group, sent, arriving, *tensors)  # type: ignore[no-any-return]


class _Exchange(torch.autograd.Function):
    """One node for all tensors of an exchange, so that every rank's backward pass sends them in the same order."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, sent: Sequence[int], arriving: Sequence[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.back = (group, arriving, sent)
        return tuple(_all_to_all(group, sent, arriving, tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group, sent, arriving = ctx.back
        return None, None, None, *(_all_to_all(group, sent, arriving, grad) for grad in grads)


def _all_to_all(group: dist.ProcessGroup, sent: Sequence[int], arriving: Sequence[int], tensor: Tensor) -> Tensor:
    received = tensor.new_empty(sum(arriving), *tensor.shape[1:])
    dist.all_to_all_single(received, tensor.contiguous(), list(arriving), list(sent), group=group)
    return received
