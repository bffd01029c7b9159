"""Pins the GPU's draw to its plain twin: the same ids from the same numbers, but for sums that round otherwise."""

import pytest
import torch

from rollout.decoding import choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, this machine has none"),
]


@pytest.mark.parametrize("vocabulary", [7, 640, 8192, 163_840])
@pytest.mark.parametrize("sharpness", [1.0, 8.0])
@pytest.mark.parametrize("kept", [1.0, 0.1])
def test_draws_are_those_of_the_plain_twin(vocabulary: int, sharpness: float, kept: float) -> None:
    from rollout.fused_choice import choose_fused

    generator = torch.Generator("cuda").manual_seed(0)
    logits_BV = sharpness * torch.randn(512, vocabulary, device="cuda", generator=generator)
    is_dropped_BV = torch.rand(logits_BV.shape, device="cuda", generator=generator) >= kept
    is_dropped_BV[:, 3] = False
    logprobs_BV = logits_BV.masked_fill(is_dropped_BV, -torch.inf).log_softmax(-1)
    uniforms_B = torch.rand(512, device="cuda", dtype=torch.float64, generator=generator)
    uniforms_B[:2], uniforms_B[2:4] = 0, 1 - 2**-53
    ids_B = choose_fused(logprobs_BV, uniforms_B)
    assert (logprobs_BV.gather(1, ids_B[:, None]) > -torch.inf).all(), "an id of probability 0"
    twin_B = choose(logprobs_BV.exp(), uniforms_B)
    assert (ids_B != twin_B)[4:].float().mean() < 0.01, "a number that falls on a border, at most"
    is_drawn_BV = torch.arange(vocabulary, device="cuda") <= torch.stack([ids_B, twin_B]).amax(0)[:, None]
    is_before_BV = torch.arange(vocabulary, device="cuda") < torch.stack([ids_B, twin_B]).amin(0)[:, None]
    mass_B = (logprobs_BV.double().exp() * (is_drawn_BV & ~is_before_BV)).sum(-1)
    either_B = logprobs_BV.double().exp().gather(1, torch.stack([ids_B, twin_B], 1)).sum(-1)
    assert (mass_B[ids_B != twin_B] <= either_B[ids_B != twin_B] + 1e-9).all(), "neighbors, where they differ"
