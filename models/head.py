"""The output head and its loss, without the logits of a whole batch.

Shapes: N tokens, D hidden, V vocabulary.

    loss = linear_cross_entropy(hidden_ND, model.lm_head.weight, targets_N, weights_N)
"""

from typing import Any

import torch
from torch import Tensor

from models.fused import fused


def linear_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor, *, chunk_size: int = 2048
) -> Tensor:
    """sum_n weights_n * -log softmax(hidden head^T)[targets_n], float32; no gradient flows to `weights_N`.

    At most [chunk_size, V] logits exist at once. Their gradient is known as soon as they are, so the forward pass
    computes it too and logits are never computed twice; what stays for the backward pass has the size of `hidden_ND`
    and of `head_VD`.
    """
    return _LinearCrossEntropy.apply(hidden_ND, head_VD, targets_N, weights_N, chunk_size)  # type: ignore[no-any-return]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor, chunk_size: int
    ) -> Tensor:
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        wants_grad = any(ctx.needs_input_grad)
        if wants_grad:
            ctx.grad_hidden_ND, ctx.grad_head_VD = torch.empty_like(hidden_ND), torch.zeros_like(head_VD)
        for start in range(0, len(hidden_ND), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits_NV = hidden_ND[chunk] @ head_VD.t()
            losses_N, grad_NV = _cross_entropy(logits_NV, targets_N[chunk], weights_N[chunk])
            loss += losses_N.sum()
            if wants_grad:
                torch.mm(grad_NV, head_VD, out=ctx.grad_hidden_ND[chunk])
                ctx.grad_head_VD.addmm_(grad_NV.t(), hidden_ND[chunk])
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        # In place, the head's gradient is large; a second backward pass finds them gone and fails.
        grad_hidden_ND, grad_head_VD = ctx.grad_hidden_ND.mul_(grads[0]), ctx.grad_head_VD.mul_(grads[0])
        del ctx.grad_hidden_ND, ctx.grad_head_VD
        return grad_hidden_ND, grad_head_VD, None, None, None


@fused
def _cross_entropy(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted loss of each token, and the gradient of their sum with respect to the logits, in the logits' dtype."""
    logprobs_NV = logits_NV.float().log_softmax(-1)
    losses_N = -logprobs_NV.gather(1, targets_N[:, None]).squeeze(1) * weights_N
    is_target_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == targets_N[:, None]
    grad_NV = (logprobs_NV.exp() - is_target_NV.float()) * weights_N[:, None]
    return losses_N, grad_NV.to(logits_NV.dtype)
