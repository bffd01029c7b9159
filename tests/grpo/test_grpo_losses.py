"""Pins the per-token losses.

1. The clipped loss in every region of (ratio, sign of advantage), its gradient, and the mark of tokens it cuts.
2. Clip-higher moves the upper bound alone.
3. On-policy the gradient is REINFORCE's, whatever the clip.
4. k1 and k3 are unbiased for KL(policy || reference), k3 is never negative, k1 may be.
5. As losses under the policy: k2 has the gradient of KL(policy || reference), k3 that of KL(reference || policy),
   k1 none. Weighted k3 has value and gradient of KL(policy || reference) under any policy that sampled.
6. The dual clip, and CISPO's weights, by hand. The other losses are in test_grpo_objective.py.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.losses import KLEstimator, cispo_loss, clipped_policy_loss, kl_penalty

# (ratio, advantage, loss, cut), with clip_low 0.2 and clip_high 0.28.
REGIONS = [
    (0.50, 2.0, -1.00, False),
    (0.90, 2.0, -1.80, False),
    (1.00, 2.0, -2.00, False),
    (1.25, 2.0, -2.50, False),
    (1.50, 2.0, -2.56, True),
    (9.00, 2.0, -2.56, True),
    (0.10, -2.0, 1.60, True),
    (0.50, -2.0, 1.60, True),
    (0.90, -2.0, 1.80, False),
    (1.00, -2.0, 2.00, False),
    (1.25, -2.0, 2.50, False),
    (9.00, -2.0, 18.0, False),
    (0.50, 0.0, 0.0, False),
    (1.50, 0.0, 0.0, False),
]

POLICY_LOGITS = torch.tensor([0.3, -1.0, 0.0, 1.5, -0.4], dtype=torch.float64)
REFERENCE_LOGPROBS = torch.tensor([-2.0, 1.5, 1.0, -1.0, 0.0], dtype=torch.float64).log_softmax(0)


@pytest.mark.parametrize(("ratio", "advantage", "loss", "cut"), REGIONS)
def test_clipped_loss_by_hand(ratio: float, advantage: float, loss: float, cut: bool) -> None:
    old = torch.tensor([-1.3])
    logprobs = (old + math.log(ratio)).requires_grad_()
    loss_N, cut_N = clipped_policy_loss(logprobs, old, torch.tensor([advantage]), 0.2, 0.28)
    loss_N.sum().backward()
    assert loss_N.item() == pytest.approx(loss, rel=1e-6, abs=0)
    assert cut_N.tolist() == [cut]
    assert logprobs.grad is not None
    # d(-rA)/d logprob = -rA where the ratio is free, exactly nothing where it is cut.
    assert logprobs.grad.item() == (0.0 if cut else pytest.approx(-ratio * advantage, rel=1e-6))


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip_low", "clip_high", "cut"),
    [
        (1.25, 1.0, 0.2, 0.20, True),
        (1.25, 1.0, 0.2, 0.28, False),
        (0.75, -1.0, 0.2, 0.28, True),
        (0.75, -1.0, 0.3, 0.20, False),
        (1.01, 1.0, 0.2, 0.0, True),
        (0.99, -1.0, 0.0, 0.2, True),
    ],
)
def test_bounds_are_separate(ratio: float, advantage: float, clip_low: float, clip_high: float, cut: bool) -> None:
    logprobs = torch.tensor([math.log(ratio)])
    _, cut_N = clipped_policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), clip_low, clip_high)
    assert cut_N.item() is cut


@pytest.mark.parametrize("clips", [(0.2, 0.2), (0.2, 0.28), (0.0, 0.0)])
def test_on_policy_gradient_is_reinforce(clips: tuple[float, float]) -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.tensor([1.5, -0.5, 0.0, -2.0, 3.0, 0.25])
    logprobs = logits.log_softmax(-1)[torch.arange(6), torch.tensor([0, 3, 1, 4, 2, 2])]
    loss_N, cut_N = clipped_policy_loss(logprobs, logprobs.detach(), advantages, *clips)
    (clipped,) = torch.autograd.grad(loss_N.sum(), logits, retain_graph=True)
    (reinforce,) = torch.autograd.grad(-(advantages * logprobs).sum(), logits)
    assert not cut_N.any()
    assert torch.equal(clipped, reinforce)


@pytest.mark.parametrize(
    ("estimator", "difference", "value", "gradient"),
    [
        ("k1", 0.5, -0.5, 1.0),
        ("k1", -0.5, 0.5, 1.0),
        ("k2", 0.5, 0.125, -0.5),
        ("k2", -0.5, 0.125, 0.5),
        ("k3", 0.5, 0.1487212707, -0.6487212707),
        ("k3", -0.5, 0.1065306597, 0.3934693403),
        ("k3", 0.0, 0.0, 0.0),
    ],
)
def test_kl_by_hand(estimator: KLEstimator, difference: float, value: float, gradient: float) -> None:
    """`difference` is log reference - log policy."""
    logprob = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    kl = kl_penalty(logprob, torch.tensor([-2.0 + difference], dtype=torch.float64), estimator)
    kl.sum().backward()
    assert logprob.grad is not None
    assert (kl.item(), logprob.grad.item()) == pytest.approx((value, gradient), abs=1e-9)


@settings(deadline=None)  # a busy machine is slow, not wrong
@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=20))
def test_k2_and_k3_are_never_negative(pairs: list[tuple[float, float]]) -> None:
    policy, reference = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    assert (kl_penalty(policy, reference, "k2") >= 0).all()
    assert (kl_penalty(policy, reference, "k3") >= -1e-12).all()


def expected_over_policy(estimator: KLEstimator) -> torch.Tensor:
    logprobs = POLICY_LOGITS.log_softmax(0)
    return (logprobs.exp() * kl_penalty(logprobs, REFERENCE_LOGPROBS, estimator)).sum()


def test_k1_and_k3_are_unbiased() -> None:
    logprobs = POLICY_LOGITS.log_softmax(0)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logprobs), torch.distributions.Categorical(logits=REFERENCE_LOGPROBS)
    ).item()
    assert exact > 0.5, "the distributions are too close to tell the estimators apart"
    assert expected_over_policy("k1").item() == pytest.approx(exact, rel=1e-12)
    assert expected_over_policy("k3").item() == pytest.approx(exact, rel=1e-12)
    assert abs(expected_over_policy("k2").item() - exact) > 0.1  # biased, and not one of the other two
    assert (kl_penalty(logprobs, REFERENCE_LOGPROBS, "k1") < 0).any()


def test_expected_gradients_of_the_estimators() -> None:
    def gradient_as_loss(estimator: KLEstimator) -> torch.Tensor:
        """What minimising the penalty on the policy's own samples does: the samples carry no gradient."""
        logits = POLICY_LOGITS.clone().requires_grad_()
        logprobs = logits.log_softmax(0)
        penalty = kl_penalty(logprobs, REFERENCE_LOGPROBS, estimator)
        return torch.autograd.grad((logprobs.exp().detach() * penalty).sum(), logits)[0]

    logits = POLICY_LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    forward = (logprobs.exp() * (logprobs - REFERENCE_LOGPROBS)).sum()
    backward = (REFERENCE_LOGPROBS.exp() * (REFERENCE_LOGPROBS - logprobs)).sum()
    (forward_gradient,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (backward_gradient,) = torch.autograd.grad(backward, logits)
    assert gradient_as_loss("k1").abs().max() < 1e-12
    assert (gradient_as_loss("k2") - forward_gradient).abs().max() < 1e-12
    assert (gradient_as_loss("k3") - backward_gradient).abs().max() < 1e-12
    assert (forward_gradient - backward_gradient).abs().max() > 0.1


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_weighted_k3_is_unbiased_off_policy(spread: float) -> None:
    """Samples of another policy than the one that is trained; `spread` is how far their logits are apart."""
    others = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5], dtype=torch.float64)
    sampler = (POLICY_LOGITS + spread * others).log_softmax(0)

    def value_and_gradient(estimator: KLEstimator | None) -> tuple[float, torch.Tensor]:
        logits = POLICY_LOGITS.clone().requires_grad_()
        logprobs = logits.log_softmax(0)
        if estimator is None:
            total = (logprobs.exp() * (logprobs - REFERENCE_LOGPROBS)).sum()
        else:
            total = (sampler.exp() * kl_penalty(logprobs, REFERENCE_LOGPROBS, estimator, sampler)).sum()
        return total.item(), torch.autograd.grad(total, logits)[0]

    value, gradient = value_and_gradient(None)
    weighted = value_and_gradient("k3_weighted")
    assert weighted[0] == pytest.approx(value, rel=1e-12)
    assert (weighted[1] - gradient).abs().max() < 1e-12
    assert (value_and_gradient("k3")[1] - gradient).abs().max() > 0.1
    assert spread == 0 or (value_and_gradient("k2")[1] - gradient).abs().max() > 0.05


# (ratio, advantage, loss, cut), with clips of 0.2 and a dual clip of 3.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "cut"),
    [
        (2.9, -2.0, 5.8, False),
        (3.1, -2.0, 6.0, True),
        (9.0, -2.0, 6.0, True),
        (9.0, 2.0, -2.4, True),
        (0.5, -2.0, 1.6, True),
        (1.0, -2.0, 2.0, False),
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, cut: bool) -> None:
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    loss_N, cut_N = clipped_policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.2, dual_clip=3.0)
    loss_N.sum().backward()
    assert loss_N.item() == pytest.approx(loss, rel=1e-6) and cut_N.tolist() == [cut]
    assert logprobs.grad is not None and (logprobs.grad.item() == 0) is cut


@pytest.mark.parametrize(
    ("ratio", "clip_low", "weight"), [(0.5, 0.2, 0.8), (0.5, 1.0, 0.5), (1.0, 0.2, 1.0), (7.0, 0.2, 5.0)]
)
def test_cispo_weighs_and_never_cuts(ratio: float, clip_low: float, weight: float) -> None:
    logprobs = torch.tensor([-0.7], requires_grad=True)
    old = logprobs.detach() - math.log(ratio)
    loss_N, cut_N = cispo_loss(logprobs, old, torch.tensor([-2.0]), clip_low, 4.0)
    loss_N.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(2 * weight, rel=1e-6)
    assert loss_N.item() == pytest.approx(2 * weight * -0.7, rel=1e-6)
    assert cut_N.item() is (abs(weight - ratio) > 1e-6)
