"""Optimizers by name: AdamW (arXiv:1711.05101) with its state in full, in 8 bits, or in main memory.

| name | bytes of state per weight | where |
| --- | --- | --- |
| `adamw` | 2x the weight's own | beside the weights |
| `adamw_8bit` | 2, block-wise (arXiv:2110.02861), by bitsandbytes | beside the weights |
| `adamw_offload` | 2x the weight's own | main memory, where the step is computed, too |

Not taken: torchao's CPUOffloadOptimizer copies gradients while the backward pass runs, so clipping them afterwards has
no effect; bitsandbytes' paged states come back from a checkpoint unpaged.
"""

import importlib
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from models.parallel import by_mesh

OptimizerName = Literal["adamw", "adamw_8bit", "adamw_offload"]


def build_optimizer(
    name: OptimizerName, parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], decay: float
) -> torch.optim.Optimizer:
    """AdamW over those parameters that require a gradient.

    Matrices (and stacks of them) decay, vectors do not, as in GPT-2's and transformers' trainers: decay holds back
    matrices, which could grow for nothing where a norm takes the growth out again; a norm's scale it would only pull
    away from its neutral 1. Raises ValueError without bitsandbytes, and for sharded parameters where the state would
    not be sharded.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if name != "adamw" and any(isinstance(parameter, DTensor) for parameter in trained):
        raise ValueError(
            f"optimizer {name!r} does not take sharded parameters; use 'adamw', whose state is sharded, too"
        )
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [group | {"weight_decay": decay} for group in by_mesh(matrices)]
    groups += [group | {"weight_decay": 0.0} for group in by_mesh(vectors)]
    if name == "adamw_8bit":
        return _adamw_8bit()(groups, lr=lr, betas=betas)
    if name == "adamw_offload":
        return OffloadedAdamW(groups, lr=lr, betas=betas)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=trained[0].is_cuda)


def _adamw_8bit() -> Any:
    try:
        return importlib.import_module("bitsandbytes.optim").AdamW8bit
    except ImportError as error:
        raise ValueError("optimizer 'adamw_8bit' needs bitsandbytes: pip install 'grpo-toolkit[quantized]'") from error


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW of copies in main memory: weights and gradients go there before a step, weights come back after it.

    Bit for bit what AdamW computes on a CPU. The copies are made anew for each step, so loading a checkpoint into the
    model needs no word to the optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        copied = [{**group, "params": [self._copy(parameter) for parameter in group["params"]]} for group in groups]
        super().__init__(copied, lr=lr, betas=betas, fused=True)

    def _copy(self, parameter: nn.Parameter) -> nn.Parameter:
        host = nn.Parameter(torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda))
        self._pairs.append((parameter, host))
        return host

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter, host in self._pairs:
            host.grad = None
            if parameter.grad is not None:
                host.copy_(parameter, non_blocking=True)
                host.grad = torch.empty_like(host, pin_memory=parameter.is_cuda)
                host.grad.copy_(parameter.grad, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies have arrived
        super().step()
        for parameter, host in self._pairs:
            if host.grad is not None:
                parameter.copy_(host, non_blocking=True)
                host.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter, _ in self._pairs:
            parameter.grad = None
