"""Log-probabilities and entropies of given tokens, without holding the logits of a whole batch.

Shapes: N tokens, D hidden, V vocabulary.

    logprobs_N, entropies_N = token_logprobs(hidden_ND, model.lm_head.weight, targets_N, temperatures_N)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fused import fused


def token_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperatures_N: Tensor, *, chunk_size: int = 2048
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden head^T / temperature) at `targets_N`, and the entropy of that distribution, both [N] float32.

    Works on `chunk_size` tokens at a time and computes a chunk's logits again in the backward pass, so at most
    [chunk_size, V] logits exist at once. The entropy carries no gradient.
    """
    return _TokenLogprobs.apply(hidden_ND, head_VD, targets_N, temperatures_N, chunk_size)  # type: ignore[no-any-return]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperatures_N: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        chunks = [
            _measure(hidden @ head_VD.t(), targets, temperatures)
            for hidden, targets, temperatures in zip(
                *(x.split(chunk_size) for x in (hidden_ND, targets_N, temperatures_N)), strict=True
            )
        ]
        logprobs_N, entropies_N = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        ctx.save_for_backward(hidden_ND, head_VD, targets_N, temperatures_N)
        ctx.chunk_size = chunk_size
        ctx.mark_non_differentiable(entropies_N)
        return logprobs_N, entropies_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_ND, head_VD, *per_token = ctx.saved_tensors
        grad_hidden_ND, grad_head_VD = torch.empty_like(hidden_ND), torch.zeros_like(head_VD)
        for start in range(0, len(hidden_ND), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            logits_NV = hidden_ND[chunk] @ head_VD.t()
            grad_NV = _logits_grad(logits_NV, *(x[chunk] for x in per_token), grads[0][chunk])
            torch.mm(grad_NV, head_VD, out=grad_hidden_ND[chunk])
            grad_head_VD.addmm_(grad_NV.t(), hidden_ND[chunk])
        return grad_hidden_ND, grad_head_VD, None, None, None


@fused
def _measure(logits_NV: Tensor, targets_N: Tensor, temperatures_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy."""
    logprobs_NV = (logits_NV.float() / temperatures_N[:, None]).log_softmax(-1)
    entropies_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None]).squeeze(1), entropies_N


@fused
def _logits_grad(logits_NV: Tensor, targets_N: Tensor, temperatures_N: Tensor, grad_N: Tensor) -> Tensor:
    """Gradient with respect to the logits: grad * (one-hot - softmax) / temperature, in their dtype."""
    probabilities_NV = (logits_NV.float() / temperatures_N[:, None]).softmax(-1)
    is_target_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == targets_N[:, None]
    scale_N = grad_N / temperatures_N
    return ((is_target_NV.float() - probabilities_NV) * scale_N[:, None]).to(logits_NV.dtype)


def plain_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperatures_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The plain twin: all logits at once, in float32."""
    logits_NV = F.linear(hidden_ND, head_VD).float() / temperatures_N[:, None]
    logprobs_NV = logits_NV.log_softmax(dim=-1)
    with torch.no_grad():
        entropies_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None]).squeeze(1), entropies_N
