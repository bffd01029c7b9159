"""Pins the chunked loss of the head against torch's cross entropy.

1. Value and both gradients equal those of the plain form, whatever the chunk size, also scaled by what follows.
2. bfloat16 in, float32 out; only the product rounds.
3. A second backward pass fails loudly: the gradients were given away by the first.
4. Without gradients nothing of the head's size is made.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.head import linear_cross_entropy

N, D, V = 37, 8, 50


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(N, D, generator=generator).requires_grad_()
    head_VD = torch.randn(V, D, generator=generator).requires_grad_()
    return hidden_ND, head_VD, torch.randint(0, V, (N,), generator=generator), torch.rand(N, generator=generator)


@pytest.mark.parametrize("chunk_size", [1, 10, N, 2048])
def test_equals_the_plain_form(chunk_size: int) -> None:
    hidden_ND, head_VD, targets_N, weights_N = make_inputs()
    plain = (F.cross_entropy(hidden_ND @ head_VD.t(), targets_N, reduction="none") * weights_N).sum()
    chunked = linear_cross_entropy(hidden_ND, head_VD, targets_N, weights_N, chunk_size=chunk_size)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-6)
    expected = torch.autograd.grad(-3 * plain, (hidden_ND, head_VD))
    for ours, theirs in zip(torch.autograd.grad(-3 * chunked, (hidden_ND, head_VD)), expected, strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_bfloat16() -> None:
    hidden_ND, head_VD, targets_N, weights_N = make_inputs()
    low, low_head = hidden_ND.detach().bfloat16().requires_grad_(), head_VD.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(low, low_head, targets_N, weights_N, chunk_size=10)
    assert loss.dtype == torch.float32
    logits_NV = (low @ low_head.t()).float()
    plain = (F.cross_entropy(logits_NV, targets_N, reduction="none") * weights_N).sum()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    grads = torch.autograd.grad(loss, (low, low_head))
    expected = torch.autograd.grad(plain, (low, low_head))
    for ours, theirs in zip(grads, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_a_second_backward_pass_fails() -> None:
    loss = linear_cross_entropy(*make_inputs())
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError, match="grad_hidden_ND"):
        loss.backward()


def test_without_gradients() -> None:
    hidden_ND, head_VD, targets_N, weights_N = make_inputs()
    loss = linear_cross_entropy(hidden_ND, head_VD, targets_N, weights_N)
    with torch.no_grad():
        assert linear_cross_entropy(hidden_ND, head_VD, targets_N, weights_N).item() == loss.item()
        assert not linear_cross_entropy(hidden_ND, head_VD, targets_N, weights_N).requires_grad
