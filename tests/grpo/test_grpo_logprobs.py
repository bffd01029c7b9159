"""Pins log-probabilities of tokens: the chunked form equals its plain twin, and both equal torch's Categorical.

1. Values and gradients do not depend on the chunk size.
2. Each token has its own temperature; it divides the logits before the softmax.
3. The entropy is that of the tempered distribution; its gradient equals the plain twin's and finite differences.
4. bfloat16 in, float32 out.
5. Chunks keep no logits for the backward pass: they compute them again.
6. Where a part of the vocabulary was kept, values and gradients are those of the distribution over that part.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from grpo.logprobs import KeptTokens, plain_logprobs, token_logprobs

N, D, V = 37, 12, 50


class Inputs(NamedTuple):
    hidden: Tensor
    head: Tensor
    targets: Tensor
    temperatures: Tensor
    kept: KeptTokens | None = None


def make_inputs(*, restricted: bool = False, dtype: torch.dtype = torch.float32) -> Inputs:
    """Restricted: every third token was drawn from the whole vocabulary, the others from seven and their own."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    temperatures = (torch.rand(N, generator=generator) + 0.5).to(dtype)
    rows, ids = [], []
    for n in range(N) if restricted else ():
        if n % 3:
            others = torch.randperm(V, generator=generator)[:7].tolist()
            ids += [*others, targets[n].item()]
            rows += [n] * 8
    kept = KeptTokens(rows_J=torch.tensor(rows), ids_J=torch.tensor(ids)) if restricted else None
    return Inputs(hidden, head, targets, temperatures, kept)


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize(("of_logprob", "of_entropy"), [(1.0, 0.0), (0.0, 1.0), (1.0, -0.5)])
@pytest.mark.parametrize("chunk_size", [1, 8, N - 1, N, 2048])
def test_chunks_equal_the_plain_twin(chunk_size: int, of_logprob: float, of_entropy: float, restricted: bool) -> None:
    inputs = make_inputs(restricted=restricted)
    weights = torch.linspace(-1, 2, N)
    plain, plain_entropy = plain_logprobs(*inputs)
    chunked, chunked_entropy = token_logprobs(*inputs, chunk_size=chunk_size)
    assert (plain - chunked).abs().max() < 1e-6 * plain.abs().max()
    assert (plain_entropy - chunked_entropy).abs().max() < 1e-6 * plain_entropy.abs().max()
    wanted = (inputs.hidden, inputs.head)
    terms = [(plain, plain_entropy), (chunked, chunked_entropy)]
    sums = [(of_logprob * l * weights + of_entropy * h * weights.flip(0)).sum() for l, h in terms]
    plain_grads, chunked_grads = (torch.autograd.grad(total, wanted) for total in sums)
    for ours, theirs in zip(chunked_grads, plain_grads, strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_without_gradients() -> None:
    inputs = make_inputs()
    with torch.no_grad():
        chunked, _ = token_logprobs(*inputs, chunk_size=8)
    assert not chunked.requires_grad
    assert (chunked - plain_logprobs(*inputs)[0]).abs().max() < 1e-5


def test_equals_categorical() -> None:
    inputs = make_inputs(dtype=torch.float64)
    logprobs, entropies = token_logprobs(*inputs, chunk_size=8)
    for n in range(N):
        logits = inputs.head @ inputs.hidden[n] / inputs.temperatures[n]
        expected = torch.distributions.Categorical(logits=logits)
        assert logprobs[n].item() == pytest.approx(expected.log_prob(inputs.targets[n]).item(), abs=1e-12)
        assert entropies[n].item() == pytest.approx(expected.entropy().item(), abs=1e-12)


def test_temperature_by_hand() -> None:
    """Logits 2 and 0 for three tokens: at temperature 1, 2 and 0.5 the first id has p = sigmoid(2), (1) and (4)."""
    head = torch.tensor([[2.0], [0.0]])
    logprobs, entropies = token_logprobs(
        torch.ones(3, 1), head, torch.tensor([0, 0, 0]), torch.tensor([1.0, 2.0, 0.5]), chunk_size=2
    )
    p = torch.tensor([2.0, 1.0, 4.0]).sigmoid()
    assert (logprobs - p.log()).abs().max() < 1e-6
    assert (entropies + p * p.log() + (1 - p) * (1 - p).log()).abs().max() < 1e-6


@pytest.mark.parametrize("restricted", [False, True])
def test_gradients_equal_finite_differences(restricted: bool) -> None:
    inputs = make_inputs(restricted=restricted, dtype=torch.float64)

    def measure(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(hidden, head, inputs.targets, inputs.temperatures, inputs.kept, chunk_size=16)

    assert measure(inputs.hidden, inputs.head)[1].dtype == torch.float64
    assert torch.autograd.gradcheck(measure, (inputs.hidden, inputs.head))


def test_kept_tokens_by_hand() -> None:
    """Logits 2, 0, 1 for two tokens. The first was drawn from ids 0 and 1: p = sigmoid(2); the second from all."""
    head = torch.tensor([[2.0], [0.0], [1.0]], requires_grad=True)
    kept = KeptTokens(rows_J=torch.tensor([0, 0]), ids_J=torch.tensor([0, 1]))
    logprobs, entropies = token_logprobs(torch.ones(2, 1), head, torch.tensor([0, 0]), torch.ones(2), kept)
    p = torch.tensor(2.0).sigmoid()
    total = math.exp(2) + 1 + math.exp(1)
    assert logprobs.tolist() == pytest.approx([p.log().item(), 2 - math.log(total)], abs=1e-6)
    assert entropies[0].item() == pytest.approx(-(p * p.log() + (1 - p) * (1 - p).log()).item(), abs=1e-6)
    logprobs[0].backward()
    assert head.grad is not None
    assert head.grad.squeeze(1).tolist() == pytest.approx([1 - p.item(), p.item() - 1, 0], abs=1e-6)


@pytest.mark.parametrize("chunk_size", [8, 2048])
def test_bfloat16_gives_float32(chunk_size: int) -> None:
    inputs = make_inputs()
    hidden, head = inputs.hidden.bfloat16(), inputs.head.bfloat16()
    logprobs, entropies = token_logprobs(hidden, head, inputs.targets, inputs.temperatures, chunk_size=chunk_size)
    assert logprobs.dtype == entropies.dtype == torch.float32
    # Only the product rounds to bfloat16; a softmax in bfloat16 would miss this by 1e-2.
    logits = (hidden @ head.T).float() / inputs.temperatures[:, None]
    expected = logits.log_softmax(-1).gather(1, inputs.targets[:, None]).squeeze(1)
    assert (logprobs - expected).abs().max() < 1e-6 * expected.abs().max()


def test_chunks_keep_no_logits_for_the_backward_pass() -> None:
    inputs = make_inputs()
    saved: list[tuple[int, ...]] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        token_logprobs(*inputs, chunk_size=4)
        assert (N, D) in saved, "the hidden states are what logits are computed from again"
        assert not [shape for shape in saved if shape[-1] == V]
        plain_logprobs(*inputs)
        assert (N, V) in saved
