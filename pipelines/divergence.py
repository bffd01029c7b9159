"""Divergence between a student's and a teacher's whole next-token distributions, without the logits of a whole batch.

    D_1 = KL(student || teacher)    D_0 = KL(teacher || student)
    D_b = b KL(teacher || m) + (1 - b) KL(student || m), m = b teacher + (1 - b) student, for 0 < b < 1

the generalized Jensen-Shannon divergence of GKD (arXiv:2306.13649 eq. 1), with its ends as TRL's GKDTrainer defines
them. Near its ends D_b goes to 0 and is b or 1 - b times a KL there: the ends are KLs themselves, not limits of D_b.

Shapes: N tokens, D and C hidden sizes of student and teacher, V vocabulary.

    divergence = linear_divergence(
        student_ND, student_head_VD, teacher_NC, teacher_head_VC, weights_N, temperatures_N, beta=1.0
    )
    divergence.loss.backward()
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.fused import fused


class Divergence(NamedTuple):
    """All float32, or float64 for such input."""

    loss: Tensor
    """Scalar: sum over tokens of weight times divergence, with its gradient."""
    of_tokens_N: Tensor
    """[N] without gradient."""
    agreement_N: Tensor
    """[N] 1 where both have the same most probable token."""


def linear_divergence(
    student_ND: Tensor,
    student_head_VD: Tensor,
    teacher_NC: Tensor,
    teacher_head_VC: Tensor,
    weights_N: Tensor,
    temperatures_N: Tensor,
    *,
    beta: float,
    chunk_size: int = 512,
) -> Divergence:
    """D_beta of softmax(hidden head^T / temperature) at each token; a gradient flows to the student's side alone.

    At most [chunk_size, V] logits of each model exist at once. Their gradient is known as soon as they are, so the
    forward pass computes it too; what stays for the backward pass has the size of the student's hidden states and head.
    """
    assert len(student_head_VD) == len(teacher_head_VC), (
        f"{len(student_head_VD)} and {len(teacher_head_VC)} tokens: the models have other vocabularies"
    )
    return Divergence(
        *_LinearDivergence.apply(
            student_ND, student_head_VD, teacher_NC, teacher_head_VC, weights_N, temperatures_N, beta, chunk_size
        )
    )


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        student_head_VD: Tensor,
        teacher_NC: Tensor,
        teacher_head_VC: Tensor,
        weights_N: Tensor,
        temperatures_N: Tensor,
        beta: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.grad_student_ND, ctx.grad_head_VD = torch.empty_like(student_ND), torch.zeros_like(student_head_VD)
        chunks = []
        for start in range(0, max(1, len(student_ND)), chunk_size):
            chunk = slice(start, start + chunk_size)
            student_NV, teacher_NV = student_ND[chunk] @ student_head_VD.t(), teacher_NC[chunk] @ teacher_head_VC.t()
            of_tokens_N, agreement_N, grad_NV = _measure(student_NV, teacher_NV, temperatures_N[chunk], beta)
            chunks.append((of_tokens_N, agreement_N))
            grad_NV = (grad_NV * weights_N[chunk, None]).to(student_NV.dtype)
            torch.mm(grad_NV, student_head_VD, out=ctx.grad_student_ND[chunk])
            ctx.grad_head_VD.addmm_(grad_NV.t(), student_ND[chunk])
        of_tokens_N, agreement_N = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        ctx.mark_non_differentiable(of_tokens_N, agreement_N)
        return (of_tokens_N * weights_N).sum(), of_tokens_N, agreement_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place, the head's gradient is large; a second backward pass finds them gone and fails.
        grad_student_ND, grad_head_VD = ctx.grad_student_ND.mul_(grads[0]), ctx.grad_head_VD.mul_(grads[0])
        del ctx.grad_student_ND, ctx.grad_head_VD
        return grad_student_ND, grad_head_VD, *[None] * 6


@fused
def _measure(
    student_NV: Tensor, teacher_NV: Tensor, temperatures_N: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence and agreement of each token, and the divergence's gradient with respect to the student's logits."""
    dtype = torch.promote_types(student_NV.dtype, torch.float32)
    log_p_NV = (student_NV.to(dtype) / temperatures_N[:, None]).log_softmax(-1)
    log_q_NV = (teacher_NV.to(dtype) / temperatures_N[:, None]).log_softmax(-1)
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    if beta == 0:
        of_tokens_N = (q_NV * (log_q_NV - log_p_NV)).sum(-1)
        grad_NV = p_NV - q_NV
    else:
        # With beta 1 the mixture is the teacher alone; the KL to it is not multiplied by the student's share, 0.
        share = 1.0 if beta == 1 else 1 - beta
        log_m_NV = log_q_NV
        if beta < 1:
            log_m_NV = torch.logaddexp(log_q_NV + math.log(beta), log_p_NV + math.log(1 - beta))
        of_tokens_N = share * (p_NV * (log_p_NV - log_m_NV)).sum(-1)
        # dD / dp = share (log p - log m) up to a constant, which the softmax's derivative takes away.
        slope_NV = share * (log_p_NV - log_m_NV)
        grad_NV = p_NV * (slope_NV - (p_NV * slope_NV).sum(-1, keepdim=True))
        if beta < 1:
            of_tokens_N = of_tokens_N + beta * (q_NV * (log_q_NV - log_m_NV)).sum(-1)
    agreement_N = (student_NV.argmax(-1) == teacher_NV.argmax(-1)).to(dtype)
    return of_tokens_N, agreement_N, grad_NV / temperatures_N[:, None]
