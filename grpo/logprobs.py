"""Log-probabilities and entropies of given tokens, without holding the logits of a whole batch.

Where the sampler drew from a part of the vocabulary only (top-p, top-k), both are those of the distribution over that
part: the recorded one, not what the learner's own probabilities would keep ("keep sampling mask", DeepSeek-V3.2,
arXiv:2512.02556 section 3.1).

Shapes: N tokens, D hidden, V vocabulary, J kept tokens of all N places together.

    logprobs_N, entropies_N = token_logprobs(hidden_ND, model.lm_head.weight, targets_N, temperatures_N)
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fused import fused
from models.packing import moved

_DROPPED = -1e30  # finite, so that p log p is 0 and not nan


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptTokens:
    """The part of the vocabulary from which each token was drawn."""

    rows_J: Tensor
    """[J] place among the N tokens; one that does not occur was drawn from the whole vocabulary."""
    ids_J: Tensor
    """[J] a token that was kept there."""

    def to(self, device: torch.device) -> "KeptTokens":
        return moved(self, device)


def token_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    temperatures_N: Tensor,
    kept: KeptTokens | None = None,
    *,
    chunk_size: int = 2048,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden head^T / temperature) at `targets_N`, and the entropy of that distribution, both [N] float32
    (float64 for such input) and with a gradient.

    Works on `chunk_size` tokens at a time and computes a chunk's logits again in the backward pass, so at most
    [chunk_size, V] logits exist at once.
    """
    rows_J, ids_J = (None, None) if kept is None else (kept.rows_J, kept.ids_J)
    return _TokenLogprobs.apply(hidden_ND, head_VD, targets_N, temperatures_N, rows_J, ids_J, chunk_size)  # type: ignore[no-any-return]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        hidden_ND, head_VD, targets_N, temperatures_N, rows_J, ids_J, ctx.chunk_size = inputs
        chunks = []
        for start in range(0, max(1, len(hidden_ND)), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            logits_NV = hidden_ND[chunk] @ head_VD.t()
            dropped_NV = _dropped(logits_NV, rows_J, ids_J, start)
            chunks.append(_measure(logits_NV, targets_N[chunk], temperatures_N[chunk], dropped_NV))
        ctx.save_for_backward(*inputs[:-1])
        ctx.set_materialize_grads(False)  # the entropy is most often only looked at
        logprobs_N, entropies_N = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return logprobs_N, entropies_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad_N is None for grad_N in grads):
            return (None,) * 7
        hidden_ND, head_VD, targets_N, temperatures_N, rows_J, ids_J = ctx.saved_tensors
        grad_hidden_ND, grad_head_VD = torch.empty_like(hidden_ND), torch.zeros_like(head_VD)
        for start in range(0, len(hidden_ND), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            logits_NV = hidden_ND[chunk] @ head_VD.t()
            dropped_NV = _dropped(logits_NV, rows_J, ids_J, start)
            of_chunk = [None if grad_N is None else grad_N[chunk] for grad_N in grads]
            grad_NV = _logits_grad(logits_NV, targets_N[chunk], temperatures_N[chunk], dropped_NV, *of_chunk)
            torch.mm(grad_NV, head_VD, out=grad_hidden_ND[chunk])
            grad_head_VD.addmm_(grad_NV.t(), hidden_ND[chunk])
        return grad_hidden_ND, grad_head_VD, None, None, None, None, None


def _dropped(logits_NV: Tensor, rows_J: Tensor | None, ids_J: Tensor | None, start: int = 0) -> Tensor | None:
    """[N, V] True at tokens that the sampler did not draw from, for the rows from `start` on."""
    if rows_J is None or ids_J is None:
        return None
    is_here_J = (rows_J >= start) & (rows_J < start + len(logits_NV))
    rows_J = rows_J[is_here_J] - start
    dropped_NV = torch.zeros_like(logits_NV, dtype=torch.bool)
    dropped_NV[rows_J] = True
    dropped_NV[rows_J, ids_J[is_here_J]] = False
    return dropped_NV


def _scaled(logits_NV: Tensor, temperatures_N: Tensor, dropped_NV: Tensor | None) -> Tensor:
    """In float32 at least."""
    scaled_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperatures_N[:, None]
    return scaled_NV if dropped_NV is None else scaled_NV.masked_fill(dropped_NV, _DROPPED)


@fused
def _measure(
    logits_NV: Tensor, targets_N: Tensor, temperatures_N: Tensor, dropped_NV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy."""
    logprobs_NV = _scaled(logits_NV, temperatures_N, dropped_NV).log_softmax(-1)
    entropies_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None]).squeeze(1), entropies_N


@fused
def _logits_grad(
    logits_NV: Tensor,
    targets_N: Tensor,
    temperatures_N: Tensor,
    dropped_NV: Tensor | None,
    grad_logprobs_N: Tensor | None,
    grad_entropies_N: Tensor | None,
) -> Tensor:
    """Gradient with respect to the logits, in their dtype: (one-hot - p) / temperature for a log-probability,
    -p (log p + H) / temperature for an entropy H."""
    scaled_NV = _scaled(logits_NV, temperatures_N, dropped_NV)
    probabilities_NV = scaled_NV.softmax(-1)
    grad_NV = torch.zeros((), dtype=scaled_NV.dtype, device=scaled_NV.device)
    if grad_logprobs_N is not None:
        is_target_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == targets_N[:, None]
        scale_N1 = (grad_logprobs_N / temperatures_N)[:, None]
        grad_NV = (is_target_NV.to(scaled_NV.dtype) - probabilities_NV) * scale_N1
    if grad_entropies_N is not None:
        logprobs_NV = scaled_NV.log_softmax(-1)
        entropies_N1 = -(probabilities_NV * logprobs_NV).sum(-1, keepdim=True)
        scale_N1 = (grad_entropies_N / temperatures_N)[:, None]
        grad_NV = grad_NV - probabilities_NV * (logprobs_NV + entropies_N1) * scale_N1
    return grad_NV.to(logits_NV.dtype)


def plain_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperatures_N: Tensor, kept: KeptTokens | None = None
) -> tuple[Tensor, Tensor]:
    """The plain twin: all logits at once, gradients by autograd."""
    logits_NV = F.linear(hidden_ND, head_VD)
    dropped_NV = None if kept is None else _dropped(logits_NV, kept.rows_J, kept.ids_J)
    logprobs_NV = _scaled(logits_NV, temperatures_N, dropped_NV).log_softmax(-1)
    entropies_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None]).squeeze(1), entropies_N
