"""Pins the divergence of whole distributions.

1. Loss and gradients equal those of TRL's GKDTrainer. Those below were made by calling `generalized_jsd_loss` of TRL
   1.16.0 on these tensors in float64: the loss, then single entries of the gradients.
2. Chunks change nothing, and gradients are those of the value, by differences.
3. Equal distributions have no divergence and no gradient; far ones are finite.
"""

import pytest
import torch
from torch import Tensor

from pipelines.divergence import Divergence, linear_divergence

FROM_TRL = {
    # (beta, temperature): loss, d/d student[0, 0], d/d student[2, 3], d/d head[0, 0], d/d head[4, 1]
    (0.0, 1.0): [4.465059558, -0.8783833849, 0.1141957475, -0.009474513, -0.4822164316],
    (0.0, 0.8): [5.8022596837, -1.1766124284, 0.1452866661, -0.0073475102, -0.6360736745],
    (0.3, 1.0): [0.3526384703, -0.0195048358, 0.0165123023, -0.0003672625, -0.0038837279],
    (0.3, 0.8): [0.3765166689, -0.015103919, 0.0240800712, -0.0001193598, -0.0016463841],
    (1.0, 1.0): [2.703060115, -0.0738880381, 0.0744974696, -0.0018406904, -0.014531435],
    (1.0, 0.8): [3.2878900503, -0.0494971862, 0.1036890247, -0.0005302272, -0.0057374923],
}
THIRDS_3 = torch.full((3,), 1 / 3, dtype=torch.float64)


def ramp(rows: int, columns: int, step: float) -> Tensor:
    return torch.sin(torch.arange(rows * columns, dtype=torch.float64) * step).reshape(rows, columns) * 2


def measured(beta: float, temperature: float, chunk_size: int = 512) -> tuple[Divergence, Tensor, Tensor]:
    student_ND, head_VD = ramp(3, 4, 0.7).requires_grad_(), ramp(5, 4, 1.3).requires_grad_()
    temperatures_N = torch.full((3,), temperature, dtype=torch.float64)
    divergence = linear_divergence(
        student_ND, head_VD, ramp(3, 2, 2.1), ramp(5, 2, 0.9), THIRDS_3, temperatures_N,
        beta=beta, chunk_size=chunk_size,
    )  # fmt: skip
    divergence.loss.backward()
    assert student_ND.grad is not None and head_VD.grad is not None
    return divergence, student_ND.grad, head_VD.grad


@pytest.mark.parametrize(("beta", "temperature"), FROM_TRL)
def test_loss_and_gradients_are_trls(beta: float, temperature: float) -> None:
    divergence, student_ND, head_VD = measured(beta, temperature)
    ours = torch.stack([divergence.loss.detach(), student_ND[0, 0], student_ND[2, 3], head_VD[0, 0], head_VD[4, 1]])
    theirs = torch.tensor(FROM_TRL[beta, temperature], dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, atol=2e-10, rtol=0)
    assert divergence.of_tokens_N.mean() == pytest.approx(divergence.loss.item())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_chunks_change_nothing(beta: float) -> None:
    whole, in_ones = measured(beta, 0.8), measured(beta, 0.8, chunk_size=1)
    torch.testing.assert_close(in_ones[0].of_tokens_N, whole[0].of_tokens_N)
    torch.testing.assert_close(in_ones[1:], whole[1:])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_the_value(beta: float) -> None:
    weights_N = torch.tensor([0.2, 0.5, -0.3], dtype=torch.float64)
    temperatures_N = torch.tensor([1.0, 0.7, 1.3], dtype=torch.float64)

    def loss(student_ND: Tensor, head_VD: Tensor) -> Tensor:
        teacher = ramp(3, 2, 2.1), ramp(5, 2, 0.9)
        return linear_divergence(student_ND, head_VD, *teacher, weights_N, temperatures_N, beta=beta).loss

    at = ramp(3, 4, 0.7).requires_grad_(), ramp(5, 4, 1.3).requires_grad_()
    (2 * loss(*at)).backward()
    for place, (rows, columns) in enumerate([(3, 4), (5, 4)]):
        direction = ramp(rows, columns, 5.1)
        ends = []
        for sign in (1, -1):
            moved = [tensor.detach().clone() for tensor in at]
            moved[place] += sign * 1e-6 * direction
            ends.append(2 * loss(moved[0], moved[1]).item())
        gradient = at[place].grad
        assert gradient is not None and abs((gradient * direction).sum()) > 0.01
        assert (gradient * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equal_distributions_and_far_ones(beta: float) -> None:
    hidden_ND, head_VD = ramp(3, 4, 0.7).float().requires_grad_(), 200 * ramp(5, 4, 1.3).float()
    ones_3 = torch.ones(3)
    equal = linear_divergence(hidden_ND, head_VD, hidden_ND.detach(), head_VD, ones_3, ones_3, beta=beta)
    equal.loss.backward()
    assert equal.of_tokens_N.abs().max() == 0 and equal.agreement_N.tolist() == [1, 1, 1]
    assert hidden_ND.grad is not None and hidden_ND.grad.abs().max() < 1e-5
    far = linear_divergence(hidden_ND, head_VD, hidden_ND.detach(), -head_VD, ones_3, ones_3, beta=beta)
    far.loss.backward()
    assert far.of_tokens_N.min() > 0.6 and far.agreement_N.tolist() == [0, 0, 0]
    assert torch.isfinite(far.of_tokens_N).all() and torch.isfinite(hidden_ND.grad).all()
