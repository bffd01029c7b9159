"""Steps that move much memory and compute little, as one kernel on a GPU.

Written as plain PyTorch; on CUDA `torch.compile` turns each into a kernel at its first use (some seconds), on CPU they
run as they stand. Layers of transformers, whose code is not ours, are compiled as a whole.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")


def fuse_layers(layers: Iterable[nn.Module], attention: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles decoder layers in place, around `attention`; what is returned must stand in its place.

    Norms, rotary embedding, residuals and SwiGLU become a few kernels before and behind attention, which has its own
    and whose layout of sequences a compiler would take for constants. Layers of one kind share the result, and so do
    all lengths. Names of parameters stay.
    """
    for layer in layers:
        layer.compile(dynamic=True)
    return torch.compiler.disable(attention)


def fused(function: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates a function of tensors without side effects; where its first argument lives decides."""

    @functools.cache
    def compiled() -> Callable[..., Result]:
        return torch.compile(function)

    @functools.wraps(function)
    def run(first: Tensor, *rest: Tensor) -> Result:
        return (compiled() if first.is_cuda else function)(first, *rest)

    return run
