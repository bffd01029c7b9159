"""Inverting the distribution function on a GPU in one kernel: `choose` of decoding.py, its plain twin, takes twenty.

A step of a small model on a GPU is bound by the time it takes to launch it, and every kernel in it adds to that.
"""

import torch
import triton  # pyright: ignore  (comes with CUDA builds of torch)
import triton.language as tl  # pyright: ignore
from torch import Tensor

_BLOCK = 8192


@triton.jit
def _choose_row(logprobs_BV, uniforms_B, ids_B, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logprobs_V = logprobs_BV + row.to(tl.int64) * vocabulary
    total = tl.zeros((), tl.float64)
    for start in range(0, vocabulary, BLOCK):
        ids_X = start + tl.arange(0, BLOCK)
        weights_X = tl.exp(tl.load(logprobs_V + ids_X, mask=ids_X < vocabulary, other=float("-inf"))).to(tl.float64)
        total += tl.sum(weights_X, 0)
    # Less than the total by its rounding at least, which the same sums reach again below: some block lies above it.
    mark = tl.load(uniforms_B + row) * (total * (1 - 2**-52))
    before = tl.zeros((), tl.float64)
    chosen = tl.full((), -1, tl.int64)
    for start in range(0, vocabulary, BLOCK):
        if chosen < 0:
            ids_X = start + tl.arange(0, BLOCK)
            weights_X = tl.exp(tl.load(logprobs_V + ids_X, mask=ids_X < vocabulary, other=float("-inf"))).to(tl.float64)
            after = before + tl.sum(weights_X, 0)
            if after > mark:
                # The running sum may end lower than the sum, by rounding: then the last id with weight.
                is_above_X = (before + tl.cumsum(weights_X, 0) > mark) & (weights_X > 0)
                first = tl.min(tl.where(is_above_X, ids_X, vocabulary), 0)
                last = tl.max(tl.where(weights_X > 0, ids_X, 0), 0)
                chosen = tl.where(first < vocabulary, first, last).to(tl.int64)
            before = after
    tl.store(ids_B + row, chosen)


def choose_fused(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """[B] int64 ids, drawn in proportion to exp(logprobs), float32, by numbers from [0, 1), float64, both on one GPU.

    As `choose`, an id of probability 0 is never chosen, and sums are in float64.
    """
    logprobs_BV = logprobs_BV.contiguous()
    ids_B = torch.empty(len(logprobs_BV), dtype=torch.int64, device=logprobs_BV.device)
    _choose_row[(len(ids_B),)](logprobs_BV, uniforms_B, ids_B, logprobs_BV.shape[1], BLOCK=_BLOCK, num_warps=8)  # pyright: ignore
    return ids_B
