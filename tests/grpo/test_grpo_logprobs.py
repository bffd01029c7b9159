"""Pins log-probabilities of tokens: the chunked form equals its plain twin, and both equal torch's Categorical.

1. Values and gradients do not depend on the chunk size.
2. Each token has its own temperature; it divides the logits before the softmax.
3. The entropy is that of the tempered distribution and carries no gradient.
4. bfloat16 in, float32 out.
5. Chunks keep no logits for the backward pass: they compute them again.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from grpo.logprobs import plain_logprobs, token_logprobs

N, D, V = 37, 12, 50


class Inputs(NamedTuple):
    hidden: Tensor
    head: Tensor
    targets: Tensor
    temperatures: Tensor


def make_inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return Inputs(
        hidden=torch.randn(N, D, generator=generator).requires_grad_(),
        head=torch.randn(V, D, generator=generator).requires_grad_(),
        targets=torch.randint(0, V, (N,), generator=generator),
        temperatures=torch.rand(N, generator=generator) + 0.5,
    )


@pytest.mark.parametrize("chunk_size", [1, 8, N - 1, N, 2048])
def test_chunks_equal_the_plain_twin(chunk_size: int) -> None:
    inputs = make_inputs()
    weights = torch.linspace(-1, 2, N)
    plain, plain_entropy = plain_logprobs(*inputs)
    chunked, chunked_entropy = token_logprobs(*inputs, chunk_size=chunk_size)
    assert (plain - chunked).abs().max() < 1e-6 * plain.abs().max()
    assert (plain_entropy - chunked_entropy).abs().max() < 1e-6 * plain_entropy.abs().max()
    wanted = (inputs.hidden, inputs.head)
    plain_grads = torch.autograd.grad((plain * weights).sum(), wanted)
    chunked_grads = torch.autograd.grad((chunked * weights).sum(), wanted)
    for ours, theirs in zip(chunked_grads, plain_grads, strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_without_gradients() -> None:
    inputs = make_inputs()
    with torch.no_grad():
        chunked, _ = token_logprobs(*inputs, chunk_size=8)
    assert not chunked.requires_grad
    assert (chunked - plain_logprobs(*inputs)[0]).abs().max() < 1e-5


def test_equals_categorical() -> None:
    inputs = make_inputs()
    logprobs, entropies = token_logprobs(*inputs, chunk_size=8)
    for n in range(N):
        logits = inputs.head.double() @ inputs.hidden[n].double() / inputs.temperatures[n].double()
        expected = torch.distributions.Categorical(logits=logits)
        assert logprobs[n].item() == pytest.approx(expected.log_prob(inputs.targets[n]).item(), abs=2e-6)
        assert entropies[n].item() == pytest.approx(expected.entropy().item(), abs=2e-6)


def test_temperature_by_hand() -> None:
    """Logits 2 and 0 for three tokens: at temperature 1, 2 and 0.5 the first id has p = sigmoid(2), (1) and (4)."""
    head = torch.tensor([[2.0], [0.0]])
    logprobs, entropies = token_logprobs(
        torch.ones(3, 1), head, torch.tensor([0, 0, 0]), torch.tensor([1.0, 2.0, 0.5]), chunk_size=2
    )
    p = torch.tensor([2.0, 1.0, 4.0]).sigmoid()
    assert (logprobs - p.log()).abs().max() < 1e-6
    assert (entropies + p * p.log() + (1 - p) * (1 - p).log()).abs().max() < 1e-6


@pytest.mark.parametrize("chunk_size", [8, 2048])
def test_entropy_carries_no_gradient(chunk_size: int) -> None:
    logprobs, entropies = token_logprobs(*make_inputs(), chunk_size=chunk_size)
    assert logprobs.requires_grad
    assert not entropies.requires_grad


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
