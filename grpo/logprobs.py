"""Log-probabilities and entropies of given tokens, without holding the logits of a whole batch.

Shapes: N tokens, D hidden, V vocabulary.

    logprobs_N, entropies_N = token_logprobs(hidden_ND, model.lm_head.weight, targets_N, temperatures_N)
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperatures_N: Tensor, *, chunk_size: int = 2048
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden head^T / temperature) at `targets_N`, and the entropy of that distribution, both [N] float32.

    Works on `chunk_size` tokens at a time and recomputes a chunk's logits in the backward pass, so at most [chunk_size,
    V] logits exist at once. The entropy carries no gradient.
    """
    logprobs, entropies = [], []
    for chunk in zip(
        hidden_ND.split(chunk_size), targets_N.split(chunk_size), temperatures_N.split(chunk_size), strict=True
    ):
        if torch.is_grad_enabled() and len(targets_N) > chunk_size:
            logprobs_n, entropies_n = checkpoint(plain_logprobs, chunk[0], head_VD, *chunk[1:], use_reentrant=False)
        else:
            logprobs_n, entropies_n = plain_logprobs(chunk[0], head_VD, *chunk[1:])
        logprobs.append(logprobs_n)
        entropies.append(entropies_n)
    return torch.cat(logprobs), torch.cat(entropies)


def plain_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperatures_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The plain twin: all logits at once, in float32."""
    logits_NV = F.linear(hidden_ND, head_VD).float() / temperatures_N[:, None]
    logprobs_NV = logits_NV.log_softmax(dim=-1)
    with torch.no_grad():
        entropies_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None]).squeeze(1), entropies_N
