"""Pins the corrections, by hand.

1. Each weight and mask from its formula; sequences are told apart, and an overflowing product is dropped, not NaN.
2. Direct form: the loss clips pi / pi_sampler. Decoupled: weight(pi_old / pi_sampler) times the loss that clips
   pi / pi_old, whether one update is made on the samples or several.
3. Weights carry no gradient; a dropped token leaves the others' gradient alone.
4. Contradictory settings are refused.
"""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.batch import TrainingSample
from grpo.corrections import (
    CorrectionConfig,
    geometric_mask,
    off_policy_sequence_mask,
    sequence_mis,
    sequence_tis,
    token_mis,
    token_tis,
)
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from models import DeepseekV3ForCausalLM, SequenceLayout
from tests.grpo.test_grpo_gradients import make_samples, update_and_capture
from tests.models.test_models_parity import BASE, relative_error, sharp_model

# Sample 0 has ratios 2, 3 and 1/2: product 3, mean of logs log(3) / 3. Sample 2 has 1/4 and 1/2: product 1/8.
LOG_RATIOS = torch.tensor([2.0, 3.0, 0.5, 0.25, 0.5]).log()
SAMPLES = torch.tensor([0, 0, 0, 2, 2])


def test_token_weights() -> None:
    assert token_tis(LOG_RATIOS, 2.5).tolist() == pytest.approx([2, 2.5, 0.5, 0.25, 0.5])
    assert token_mis(LOG_RATIOS, 0.5 - 1e-6, 2.5).tolist() == pytest.approx([2, 0, 0.5, 0, 0.5])


def test_sequence_weights() -> None:
    assert sequence_tis(LOG_RATIOS, SAMPLES, 2.5).tolist() == pytest.approx([2.5, 2.5, 2.5, 1 / 8, 1 / 8])
    assert sequence_mis(LOG_RATIOS, SAMPLES, 0.0, 2.5).tolist() == pytest.approx([0, 0, 0, 1 / 8, 1 / 8])
    assert sequence_mis(LOG_RATIOS, SAMPLES, 0.2, 3.5).tolist() == pytest.approx([3, 3, 3, 0, 0])
    # 3 ** (1 / 3) = 1.44 and (1 / 8) ** (1 / 2) = 0.354
    assert geometric_mask(LOG_RATIOS, SAMPLES, 0.35, 1.5).tolist() == [1, 1, 1, 1, 1]
    assert geometric_mask(LOG_RATIOS, SAMPLES, 0.36, 1.4).tolist() == [0, 0, 0, 0, 0]
    assert geometric_mask(LOG_RATIOS, SAMPLES, 0.36, 1.5).tolist() == [1, 1, 1, 0, 0]


def test_off_policy_mask() -> None:
    """Mean log(sampler / learner): -log(3) / 3 = -0.37 for sample 0, log(8) / 2 = 1.04 for sample 2."""
    zeros = torch.zeros(5)
    bad, good = torch.full((5,), -1.0), torch.full((5,), 1.0)
    assert off_policy_sequence_mask(LOG_RATIOS, zeros, bad, SAMPLES, 1.0).tolist() == [1, 1, 1, 0, 0]
    assert off_policy_sequence_mask(LOG_RATIOS, zeros, bad, SAMPLES, 1.1).tolist() == [1, 1, 1, 1, 1]
    assert off_policy_sequence_mask(LOG_RATIOS, zeros, good, SAMPLES, 1.0).tolist() == [1, 1, 1, 1, 1]
    assert off_policy_sequence_mask(LOG_RATIOS, zeros, bad, SAMPLES, math.inf).tolist() == [1, 1, 1, 1, 1]


def test_a_product_that_overflows_is_dropped() -> None:
    log_ratios, samples = torch.full((400,), 1.0), torch.zeros(400, dtype=torch.long)
    assert sequence_mis(log_ratios, samples, 0.0, 2.0).tolist() == [0] * 400
    assert sequence_tis(log_ratios, samples, 2.0).tolist() == [2] * 400


def learner_logprobs(model: DeepseekV3ForCausalLM, sample: TrainingSample) -> Tensor:
    ids = torch.tensor(sample.token_ids)
    logits = model.lm_head(model(ids, SequenceLayout.from_lengths([len(ids)])).hidden_TD) / sample.temperature
    mask = torch.tensor(sample.loss_mask)
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)[mask[1:]]


def decoupled_loss(
    model: DeepseekV3ForCausalLM, old: DeepseekV3ForCausalLM, samples: list[TrainingSample], high: float
) -> Tensor:
    """Token mean of min(pi_old / pi_sampler, high) * max(-r A, -clip(r) A) with r = pi / pi_old, sample by sample."""
    losses = []
    for sample in samples:
        logprobs = learner_logprobs(model, sample)
        with torch.no_grad():
            before = learner_logprobs(old, sample)
        sampled = torch.tensor(sample.sampling_logprobs)[torch.tensor(sample.loss_mask)]
        weight = (before - sampled).exp().clamp(max=high)
        ratio = (logprobs - before).exp()
        gain = torch.minimum(ratio * sample.advantage, ratio.clamp(0.8, 1.2) * sample.advantage)
        losses.append(-weight * gain)
    return torch.cat(losses).mean()


def gradients_of(model: DeepseekV3ForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("budget", [30, 1000])
def test_decoupled_form_equals_its_formula(budget: int) -> None:
    """Two updates on the same samples: pi_old stays the policy before the first, the second has ratios beside 1."""
    model = sharp_model(BASE)
    old = copy.deepcopy(model)
    samples = make_samples(model, noise=0.6)
    config = LearnerConfig(
        lr=1e-3, grad_clip=1e9, token_budget=budget,
        correction=CorrectionConfig(kind="token_tis", high=1.3, old_logprobs="learner"),
    )  # fmt: skip
    learner = Learner(model, config, total_steps=9)
    kept = learner.with_old_logprobs(samples)
    for expected_clipped in (False, True):
        expected = gradients_of(model, decoupled_loss(model, old, samples, high=1.3))
        found, report = update_and_capture(learner, kept)
        assert all(relative_error(found[name], expected[name]) < 1e-4 for name in expected)
        assert (report["policy/clipped"] > 0) == expected_clipped
        assert 0.5 < report["correction/weight"] < 1.3 and report["correction/dropped"] == 0


def test_a_single_update_needs_no_pass_before_it() -> None:
    correction = CorrectionConfig(kind="sequence_mis", high=3.0, old_logprobs="learner")
    gradients = []
    for ahead in (True, False):
        learner = Learner(sharp_model(BASE), LearnerConfig(lr=0.0, correction=correction), total_steps=1)
        samples = make_samples(learner.model, noise=0.3)
        found, report = update_and_capture(learner, learner.with_old_logprobs(samples) if ahead else samples)
        assert 0 < report["correction/dropped"] < 1
        gradients.append(found)
    assert all(relative_error(gradients[0][name], gradients[1][name]) < 1e-5 for name in gradients[0])


def test_direct_form_is_untouched_without_a_correction() -> None:
    learner = Learner(sharp_model(BASE), LearnerConfig(lr=0.0), total_steps=1)
    samples = make_samples(learner.model)
    assert learner.with_old_logprobs(samples) is samples
    assert "correction/weight" not in learner.update(samples)


def test_a_dropped_sample_leaves_the_others_alone() -> None:
    """Its sampler was far off; with the mask the gradient is that of the others, over the same denominator."""
    model = sharp_model(BASE)
    samples = [replace(sample, advantage=1.0) for sample in make_samples(model, noise=0.05)]
    far = [lp - 1.0 * m for lp, m in zip(samples[3].sampling_logprobs, samples[3].loss_mask, strict=True)]
    correction = CorrectionConfig(kind="geometric_mask", low=0.7, high=1.4)
    config = LearnerConfig(lr=0.0, correction=correction, objective=ObjectiveConfig(clip_high=9.0))
    masked, report = update_and_capture(
        Learner(model, config, total_steps=1), [*samples[:3], replace(samples[3], sampling_logprobs=far), *samples[4:]]
    )
    total = sum(sample.num_trained for sample in samples)
    assert report["correction/dropped"] == pytest.approx(samples[3].num_trained / total, abs=1e-6)
    others, _ = update_and_capture(
        Learner(model, replace(config, correction=CorrectionConfig()), total_steps=1),
        [replace(sample, advantage=0.0 if i == 3 else 1.0) for i, sample in enumerate(samples)],
    )
    assert all(relative_error(masked[name], others[name]) < 1e-5 for name in masked)


def test_off_policy_mask_reaches_the_loss() -> None:
    model = sharp_model(BASE)
    samples = [replace(sample, advantage=-1.0) for sample in make_samples(model, noise=0.0)]
    surprised = [lp + 0.5 * m for lp, m in zip(samples[0].sampling_logprobs, samples[0].loss_mask, strict=True)]
    batch = [replace(samples[0], sampling_logprobs=surprised), *samples[1:]]
    shares = []
    for delta in (0.4, 0.6):
        config = LearnerConfig(lr=0.0, correction=CorrectionConfig(off_policy_delta=delta))
        shares.append(Learner(model, config, total_steps=1).update(batch)["correction/dropped"])
    assert shares[0] == pytest.approx(samples[0].num_trained / sum(s.num_trained for s in samples), abs=1e-6)
    assert shares[1] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "token_tis"}, "'token_tis' weighs tokens by pi_old / pi_sampler.*set old_logprobs to 'learner'"),
        ({"kind": "sequence_mis"}, "set old_logprobs to 'learner'"),
        ({"low": 0.5}, "low=0.5 has no effect with kind 'none'"),
        ({"kind": "geometric_mask", "low": 3.0}, "need 0 <= low < high, got 3.0 and 2.0"),
        ({"off_policy_delta": -1.0}, "off_policy_delta must be >= 0, got -1.0"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorrectionConfig(**settings)
