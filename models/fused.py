"""Steps that move much memory and compute little, as one kernel on a GPU.

Written as plain PyTorch; on CUDA `torch.compile` turns each into a kernel at its first use (some seconds), on CPU they
run as they stand.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def fused(function: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates a function of tensors without side effects; where its first argument lives decides."""

    @functools.cache
    def compiled() -> Callable[..., Result]:
        return torch.compile(function)

    @functools.wraps(function)
    def run(first: Tensor, *rest: Tensor) -> Result:
        return (compiled() if first.is_cuda else function)(first, *rest)

    return run
