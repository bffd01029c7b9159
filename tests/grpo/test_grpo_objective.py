"""Pins the objective: policy loss, aggregation and what is added to it, on four samples of 6, 3, 5 and 2 tokens.

1. Every policy loss with every aggregation equals a plain loop over samples and tokens, written from the papers.
2. Loss and gradient equal what TRL's own code gives for the same numbers. Those below were made by calling
   `_compute_loss` of TRL 1.16.0's GRPOTrainer and GMPOTrainer on these tensors in float64; each is the loss, then the
   sums over tokens i = 1, 2, ... of i times the gradient of a token's log-probability, and of its entropy.
3. Scales, positive-example NLL and entropy selection, by hand; what the choice of a token hangs on.
4. Combinations that have no meaning are refused.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from grpo.batch import Aggregation, MicroBatch, TrainingSample
from grpo.corrections import CorrectionConfig
from grpo.losses import PolicyLoss
from grpo.objective import (
    ObjectiveConfig,
    check_supervision,
    entropy_threshold_of,
    objective_terms,
    scaled_advantages,
)
from grpo.packing import pack

LENGTHS, ADVANTAGES = (6, 3, 5, 2), (1.5, -0.5, -1.0, 0.75)
LOGPROBS = [
    -1.94,
    -1.42,
    -0.92,
    -1.84,
    -1.29,
    -1.58,
    -0.36,
    -0.7,
    -1.16,
    -0.71,
    -1.24,
    -0.96,
    -0.88,
    -0.81,
    -1.33,
    -1.57,
]
OLD = [-1.84, -1.12, -1.45, -1.32, -1.89, -1.87, -0.15, -1.08, -2.42, -0.95, -0.11, -0.6, -0.5, -1.37, -1.31, -1.72]
REFERENCE = [-2.39, -1.45, -0.52, -1.87, -1.22, -1.2, -1.06, -0.3, -0.95, -0.27, -1.13, -1.24, -1.11, -0.37, -1.7, -2.1]
ENTROPIES = [0.89, 1.94, 1.0, 1.94, 1.74, 0.46, 1.43, 0.89, 1.07, 1.0, 0.89, 1.59, 0.61, 0.64, 0.12, 1.78]
CONSTANT = 20

DAPO: dict[str, Any] = {"clip_high": 0.28}
GRPO: dict[str, Any] = {"clip_high": 0.28, "aggregation": "sequence"}
FROM_TRL = {
    "grpo": (GRPO, -0.0681350849, 0.4880364830, 0.0),
    "grpo, KL": ({**GRPO, "kl_coef": 0.1}, -0.0607278243, 0.5456758568, 0.0),
    "grpo, use_bias_correction_kl": (
        {**GRPO, "kl_coef": 0.1, "kl_estimator": "k3_weighted"}, -0.0591440399, 0.5342046089, 0.0),
    "dr_grpo": (
        {"clip_high": 0.28, "aggregation": "constant", "constant_length": CONSTANT}, -0.0300715269, 0.3707050794, 0.0),
    "dapo": (DAPO, -0.1503576347, 1.8535253972, 0.0),
    "dapo, delta 1.5": ({**DAPO, "dual_clip": 1.5}, -0.2293190874, -0.6698378339, 0.0),
    "grpo, sequence level": (
        {"loss": "gspo", "aggregation": "sequence", "clip_low": 0.05, "clip_high": 0.06},
        -0.1574129430, 1.6106964557, 0.0),
    "grpo, sequence level, wide": (
        {"loss": "gspo", "aggregation": "sequence", "clip_low": 0.9, "clip_high": 9.0},
        -0.2045071824, -0.4952508688, 0.0),
    "cispo, epsilon_high 1.2": ({"loss": "cispo", "clip_low": 1.0, "clip_high": 0.2}, 0.6413544182, 0.3335403031, 0.0),
    "sapo": ({"loss": "sapo", "aggregation": "sequence"}, -0.4224707816, -0.9595528031, 0.0),
    "gmpo": ({"loss": "gmpo", "aggregation": "sequence", "clip_high": 0.28}, -0.1079135089, -1.1394440007, 0.0),
    "dapo, off_policy_mask_threshold 0.05": ({**DAPO, "off_policy_delta": 0.05}, -0.4892277379, -0.4728437595, 0.0),
    "dapo, off_policy_mask_threshold 0.3": ({**DAPO, "off_policy_delta": 0.3}, -0.1503576347, 1.8535253972, 0.0),
    "dapo, top_entropy_quantile 0.3": ({**DAPO, "entropy_top_share": 0.3}, -0.2496489897, -1.2332243039, 0.0),
    "dapo, entropy_coef 0.1": ({**DAPO, "entropy_coef": 0.1}, -0.2627951347, 1.8535253972, -0.85),
}  # fmt: skip


def make_batch(aggregation: Aggregation = "token") -> MicroBatch:
    """As `pack` makes it, in float64; its samples are in the order above."""
    logprobs = iter(OLD)
    samples = [
        TrainingSample(
            token_ids=[0] * (length + 1),
            loss_mask=[False] + [True] * length,
            sampling_logprobs=[0.0, *(next(logprobs) for _ in range(length))],
            advantage=advantage,
        )
        for length, advantage in zip(LENGTHS, ADVANTAGES, strict=True)
    ]
    (batch,) = pack(samples, 99, aggregation, CONSTANT)
    order = batch.samples_N.argsort(stable=True)
    tokens = {"advantages_N": batch.advantages_N.double(), "weights_N": batch.weights_N.double()}
    ordered = {name: x[order] for name, x in tokens.items()} | {"samples_N": batch.samples_N[order]}
    sampled = torch.tensor(OLD, dtype=torch.float64)  # float32 of it is 1e-8 off
    return replace(batch, sampling_logprobs_N=sampled, **ordered)


def measure(off_policy_delta: float = 0.0, **settings: Any) -> tuple[float, Tensor, Tensor, dict[str, Tensor]]:
    """Loss, its gradients by log-probability and entropy, and the metrics."""
    config = ObjectiveConfig(**settings)
    logprobs = torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True)
    entropies = torch.tensor(ENTROPIES, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(REFERENCE, dtype=torch.float64) if config.kl_coef else None
    share = config.entropy_top_share
    terms = objective_terms(
        config,
        CorrectionConfig(off_policy_delta=off_policy_delta),
        make_batch(config.aggregation),
        logprobs,
        entropies,
        reference,
        None if share == 1 else entropy_threshold_of(entropies, share),
    )
    terms.loss.backward()
    assert logprobs.grad is not None
    of_entropies = torch.zeros_like(entropies) if entropies.grad is None else entropies.grad
    return terms.loss.item(), logprobs.grad, of_entropies, terms.means


@pytest.mark.parametrize("name", FROM_TRL)
def test_equals_trl(name: str) -> None:
    settings, loss, of_logprobs, of_entropies = FROM_TRL[name]
    found, logprobs_grad, entropies_grad, _ = measure(**settings)
    places = torch.arange(1, 17, dtype=torch.float64)
    # 1e-7: weights are float32 in a micro-batch
    assert found == pytest.approx(loss, rel=1e-7, abs=1e-9)
    assert (logprobs_grad * places).sum().item() == pytest.approx(of_logprobs, rel=1e-6)
    assert (entropies_grad * places).sum().item() == pytest.approx(of_entropies, rel=1e-6)


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def sign(x: float) -> float:
    return 1.0 if x > 0 else -1.0


# Ratios of one sample and its advantage -> the objective of each token (to be maximized), low 0.2 and high 0.28.
PAPERS: dict[str, Callable[[list[float], float], list[float]]] = {
    "clip": lambda r, a: [min(x * a, clip(x, 0.8, 1.28) * a) for x in r],
    "gspo": lambda r, a: [min(s * a, clip(s, 0.8, 1.28) * a) for s in [math.prod(r) ** (1 / len(r))] for _ in r],
    "gspo_token": lambda r, a: [min(s * a, clip(s, 0.8, 1.28) * a) for s in [math.prod(r) ** (1 / len(r))] for _ in r],
    "gmpo": lambda r, a: [
        a * math.prod(
            min(x ** sign(a), clip(x ** sign(a), math.exp(-0.24), math.exp(0.24))) ** sign(a) for x in r
        ) ** (1 / len(r)) for _ in r
    ],
    "sapo": lambda r, a: [
        4 / t / (1 + math.exp(-t * (x - 1))) * a for x in r for t in [1.0 if a > 0 else 1.05]
    ],
}  # fmt: skip


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
@pytest.mark.parametrize("loss", get_args(PolicyLoss))
def test_equals_a_plain_loop(loss: PolicyLoss, aggregation: Aggregation) -> None:
    bounds = {"clip_low": 0.24, "clip_high": 0.24} if loss == "gmpo" else {"clip_low": 0.2, "clip_high": 0.28}
    length = CONSTANT if aggregation == "constant" else 0
    found, gradient, _, _ = measure(loss=loss, aggregation=aggregation, constant_length=length, **bounds)

    def plain(logprobs: list[float]) -> float:
        total, start = 0.0, 0
        for size, advantage in zip(LENGTHS, ADVANTAGES, strict=True):
            places = range(start, start + size)
            ratios = [math.exp(logprobs[i] - OLD[i]) for i in places]
            if loss == "reinforce":
                tokens = [advantage * logprobs[i] for i in places]
            elif loss == "cispo":  # the weight is data: at LOGPROBS, whatever is varied
                weights = [clip(math.exp(LOGPROBS[i] - OLD[i]), 0.8, 1.28) for i in places]
                tokens = [w * advantage * logprobs[i] for w, i in zip(weights, places, strict=True)]
            else:
                tokens = PAPERS[loss](ratios, advantage)
            divisor = {"token": sum(LENGTHS), "sequence": size * 4, "constant": CONSTANT * 4}[aggregation]
            total -= sum(tokens) / divisor
            start += size
        return total

    assert found == pytest.approx(plain(LOGPROBS), rel=1e-7)
    step = 1e-6
    for i, expected in enumerate(gradient.tolist()):
        up, down = ([x + s * (i == j) for j, x in enumerate(LOGPROBS)] for s in (step, -step))
        assert (plain(up) - plain(down)) / (2 * step) == pytest.approx(expected, rel=1e-5, abs=1e-9), i


def test_gspo_token_has_the_gradient_of_gspo_where_advantages_are_equal() -> None:
    """arXiv:2507.18071 section 4.3."""
    whole, of_token = (measure(loss=loss, aggregation="sequence", clip_high=0.5) for loss in ("gspo", "gspo_token"))
    assert (whole[1] - of_token[1]).abs().max() < 1e-12
    assert whole[1].abs().max() > 1e-3


def test_metrics_by_hand() -> None:
    """Ratio times sign decides: beyond 1.28 where A > 0, below 0.8 where A < 0; beyond 3 with a dual clip as well."""
    ratios = [math.exp(new - old) for new, old in zip(LOGPROBS, OLD, strict=True)]
    advantages = [a for a, size in zip(ADVANTAGES, LENGTHS, strict=True) for _ in range(size)]
    cut = [r > 1.28 if a > 0 else r < 0.8 for r, a in zip(ratios, advantages, strict=True)]
    assert measure(**DAPO)[3]["policy/clipped"].tolist() == cut
    dual = [c or (a < 0 and r > 3) for c, r, a in zip(cut, ratios, advantages, strict=True)]
    assert measure(**DAPO, dual_clip=3.0)[3]["policy/clipped"].tolist() == dual != cut


def test_scales() -> None:
    advantages = torch.tensor([2.0, -2.0, 0.0])
    assert scaled_advantages(advantages, 5.0, 0.5).tolist() == [10.0, -1.0, 0.0]
    plain, scaled = measure(**DAPO)[1], measure(**DAPO, positive_scale=5.0, negative_scale=0.5)[1]
    factors = torch.tensor([5.0 if a > 0 else 0.5 for a, n in zip(ADVANTAGES, LENGTHS, strict=True) for _ in range(n)])
    assert (scaled - factors * plain).abs().max() < 1e-12


def test_positive_nll_by_hand() -> None:
    """Samples 1 and 4 are the good ones: 8 of 16 tokens, whatever the aggregation."""
    good = [*range(6), 14, 15]
    nll = -sum(LOGPROBS[i] for i in good) / 8
    for settings in (DAPO, GRPO):
        before, after = measure(**settings), measure(**settings, positive_nll_coef=0.1)
        assert after[0] - before[0] == pytest.approx(0.1 * nll, rel=1e-9)
        assert (after[1] - before[1]).tolist() == pytest.approx([-0.1 / 8 if i in good else 0.0 for i in range(16)])


def test_selected_tokens_by_hand() -> None:
    """The five highest of 16 entropies are 1.94, 1.94, 1.78, 1.74 and 1.59, the next is 1.43."""
    entropies = torch.tensor(ENTROPIES)
    assert entropy_threshold_of(entropies, 0.3) == pytest.approx((1.59 + 1.43) / 2)  # 4.8 tokens are 5
    assert entropy_threshold_of(entropies, 5 / 16) == pytest.approx((1.59 + 1.43) / 2)
    assert entropy_threshold_of(entropies, 1e-9) == pytest.approx(1.94), "both of the equal ones"
    assert entropy_threshold_of(entropies, 1.0) == -math.inf
    selected = [x > 1.5 for x in ENTROPIES]
    _, gradient, _, means = measure(**DAPO, entropy_top_share=0.3, kl_coef=0.1)
    assert means["policy/selected"].tolist() == selected
    policy, kl = measure(**DAPO)[1], measure(**DAPO, kl_coef=0.1)[1] - measure(**DAPO)[1]
    assert (gradient - (policy * torch.tensor(selected) + kl)).abs().max() < 1e-12, "KL acts on all tokens"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": 1.1}, "0 <= clip_low <= 1 and clip_high >= 0, got 1.1 and 0.2"),
        ({"clip_high": -0.1}, "got 0.2 and -0.1"),
        ({"dual_clip": 1.1}, "dual_clip=1.1 with loss 'clip' and clip_high=0.2: .* 3 is usual"),
        ({"dual_clip": 3.0, "loss": "gspo"}, "dual_clip=3.0 with loss 'gspo'"),
        ({"sapo_temperature_negative": 0.0}, "temperatures must be > 0, got 1.0 and 0.0"),
        ({"aggregation": "constant"}, "'constant' with constant_length=0: .* set both or neither"),
        ({"constant_length": 5}, "'token' with constant_length=5"),
        ({"kl_coef": -0.1}, "kl_coef must be >= 0, got -0.1"),
        ({"positive_scale": math.nan}, "positive_scale must be >= 0, got nan"),
        ({"kl_in": "reward", "kl_estimator": "k3_weighted"}, "take k1, k2 or k3"),
        ({"reference_every": 5}, "reference_every=5 with kl_coef=0.0: .* set kl_coef above 0"),
        ({"entropy_top_share": 0.0}, "entropy_top_share must be above 0 and at most 1, got 0.0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)


@pytest.mark.parametrize("settings", [{"loss": "gmpo"}, {"kl_in": "reward", "kl_coef": 0.1}])
def test_step_rewards_need_losses_of_tokens(settings: dict[str, Any]) -> None:
    check_supervision("outcome", ObjectiveConfig(**settings))
    check_supervision("process", ObjectiveConfig(loss="gspo_token"))
    with pytest.raises(ValueError, match="choose another loss than gmpo, and kl_in loss"):
        check_supervision("process", ObjectiveConfig(**settings))
