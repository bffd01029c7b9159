"""Pins the one normalization rule: the gradient of an optimizer step does not depend on how its samples are laid out.

For every policy loss with every aggregation, for every preset and for what can be added to a loss: 1, 2 or 4
micro-batches, one sample in each (what padding would compute), and any order of samples give gradients equal to 1e-6.
A new name in the registries is tested by itself.

The model is in float64, so that rounding has nothing to hide in.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from grpo.batch import Aggregation, BatchTotals, TrainingSample
from grpo.corrections import CorrectionConfig
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.losses import KLEstimator, PolicyLoss
from grpo.objective import ObjectiveConfig
from grpo.packing import pack
from grpo.presets import PRESETS, preset
from models import DeepseekV3ForCausalLM
from models.moe import RoutedExperts
from tests.grpo.test_grpo_gradients import make_samples, update_and_capture
from tests.models.test_models_parity import CORNERS, relative_error, sharp_model

SPLITS = {1000: 1, 80: 2, 43: 4, 30: 6}
"""Token budget -> micro-batches; the last has one sample in each."""


def with_loss(name: PolicyLoss, aggregation: Aggregation) -> ObjectiveConfig:
    return ObjectiveConfig(
        loss=name, aggregation=aggregation, constant_length=25 if aggregation == "constant" else 0, clip_high=0.28
    )


def everything(**more: object) -> ObjectiveConfig:
    """What can be added to a loss, all at once."""
    settings = {
        "dual_clip": 3.0, "positive_scale": 5.0, "negative_scale": 0.5, "kl_coef": 0.1, "entropy_coef": 0.05,
        "entropy_top_share": 0.3, "positive_nll_coef": 0.1,
    }  # fmt: skip
    return ObjectiveConfig(**{**settings, **more})  # type: ignore[arg-type]


OBJECTIVES: dict[str, tuple[ObjectiveConfig, CorrectionConfig]] = {
    **{
        f"{name}, {aggregation}": (with_loss(name, aggregation), CorrectionConfig())
        for name in get_args(PolicyLoss)
        for aggregation in get_args(Aggregation)
    },
    **{f"preset {name}": (p.objective, p.correction) for name in PRESETS for p in [preset(name, max_tokens=25)]},
    **{f"all, {kl}": (everything(kl_estimator=kl), CorrectionConfig()) for kl in get_args(KLEstimator)},
    "all, sequence": (everything(aggregation="sequence"), CorrectionConfig()),
    "all, constant": (everything(aggregation="constant", constant_length=25), CorrectionConfig()),
    "masks": (with_loss("gspo", "token"), CorrectionConfig(kind="geometric_mask", low=0.9, high=1.1)),
    "weights": (everything(), CorrectionConfig(kind="sequence_tis", old_logprobs="learner")),
}


def make_model() -> DeepseekV3ForCausalLM:
    return sharp_model(replace(CORNERS["v3_like"], num_hidden_layers=2))


@pytest.fixture(scope="module")
def model() -> DeepseekV3ForCausalLM:
    return make_model().double()


@pytest.fixture(scope="module")
def samples() -> list[TrainingSample]:
    """One of them has an advantage for each token."""
    made = make_samples(make_model())
    made[2] = replace(made[2], token_advantages=[(-1) ** n * n / 7 for n in range(len(made[2].token_ids))])
    return made


@pytest.mark.parametrize("name", OBJECTIVES)
def test_layout_does_not_matter(
    name: str, model: DeepseekV3ForCausalLM, samples: list[TrainingSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RoutedExperts, "forward", RoutedExperts.loop)  # grouped_mm has no float64
    objective, correction = OBJECTIVES[name]
    shuffled = random.Random(1).sample(samples, len(samples))

    def measure(token_budget: int, batch: Sequence[TrainingSample]) -> tuple[dict[str, Tensor], dict[str, float]]:
        config = LearnerConfig(
            lr=0.0, grad_clip=1e9, objective=objective, correction=correction, token_budget=token_budget
        )
        learner = Learner(model, config, total_steps=1)
        if learner.reference is not None:
            with torch.no_grad():
                learner.reference.lm_head.weight.mul_(0.9)  # another policy, for the KL penalty to have a gradient
        return update_and_capture(learner, learner.with_old_logprobs(list(batch)))

    whole, report = measure(1000, samples)
    assert report["policy/grad_norm"] > 1e-3
    for token_budget, num_micro_batches in SPLITS.items():
        assert len(pack(samples, token_budget, "token")) == num_micro_batches
        for batch in (samples, shuffled) if token_budget < 1000 else (shuffled,):
            gradients, other = measure(token_budget, batch)
            for parameter, gradient in gradients.items():
                assert relative_error(gradient, whole[parameter]) < 1e-6, f"{parameter}, token_budget={token_budget}"
            for metric in ("policy/loss", "policy/entropy", "policy/clipped"):
                assert other[metric] == pytest.approx(report[metric], rel=1e-6, abs=1e-12), metric


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_a_part_of_a_batch_is_weighed_as_in_the_whole(aggregation: Aggregation, samples: list[TrainingSample]) -> None:
    """What ranks do: each packs its share, with the totals of all."""
    totals, length = BatchTotals.of(samples), 25
    shares = [batch for part in (samples[:2], samples[2:]) for batch in pack(part, 1000, aggregation, length, totals)]
    (together,) = pack(samples, 1000, aggregation, length)
    assert torch.cat([b.weights_N for b in shares]).sort().values.tolist() == together.weights_N.sort().values.tolist()
    assert {b.weight_sum for b in shares} == {together.weight_sum}
    total = sum(b.weights_N.sum().item() for b in shares)
    assert total == pytest.approx(together.weight_sum, rel=1e-6)
