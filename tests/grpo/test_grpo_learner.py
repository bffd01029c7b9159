"""Pins the learner around its gradient (test_grpo_gradients.py pins that).

1. With a KL penalty it keeps the initial policy, which never moves; without one it keeps no copy.
2. score() equals transformers' log-probabilities.
3. Learner state plus weights continue bit for bit.
4. Mismatch is rounding where sampler and learner hold the same weights, at any temperature, and the shift where not.
5. lr=0 changes no bit; the gradient norm is clipped before the optimizer and reported before the clip.
6. Reported numbers are what their names say; wrong settings are refused.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from models import CausalLM, SequenceLayout, hf_tensors, save_pretrained
from models.balance import load_metrics
from rollout.engine import EngineConfig
from rollout.native_engine import NativeEngine
from rollout.sample import Prompt, SamplingParams
from tests.grpo.test_grpo_gradients import logits_one_by_one, make_samples, update_and_capture
from tests.models.test_models_parity import BASE, reference_of, sharp_model


def snapshot(model: CausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in hf_tensors(model)}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def trained_logprobs(learner: Learner, samples: Sequence[TrainingSample]) -> Tensor:
    """Log-probabilities at temperature 1 of all trained tokens, sample by sample."""
    scores = learner.score([sample.token_ids for sample in samples])
    return torch.cat([torch.tensor(s)[torch.tensor(x.loss_mask)[1:]] for s, x in zip(scores, samples, strict=True)])


def test_reference_does_not_move() -> None:
    model = sharp_model(BASE)
    learner = Learner(model, LearnerConfig(lr=1e-3, objective=ObjectiveConfig(kl_coef=0.1)), total_steps=9)
    samples = [replace(sample, temperature=1.0) for sample in make_samples(model)]
    assert learner.reference is not None
    start, initial = snapshot(model), trained_logprobs(learner, samples)
    assert learner.update(samples)["policy/kl_to_reference"] == 0
    for _ in range(2):
        difference = initial - trained_logprobs(learner, samples)
        k3 = (difference.exp() - difference - 1).mean().item()
        assert learner.update(samples)["policy/kl_to_reference"] == pytest.approx(k3, rel=1e-3)
        assert k3 > 1e-3
    assert same_bits(snapshot(learner.reference), start)
    assert not same_bits(snapshot(model), start)


def test_no_penalty_no_copy() -> None:
    model = sharp_model(BASE)
    learner = Learner(model, LearnerConfig(), total_steps=1)
    assert learner.reference is None
    assert "policy/kl_to_reference" not in learner.update(make_samples(model))


def test_score_equals_transformers(tmp_path: Path) -> None:
    model = sharp_model(BASE)
    samples = make_samples(model)
    with torch.no_grad():
        logits = logits_one_by_one(reference_of(model, tmp_path / "policy"), samples)
    scores = Learner(model, LearnerConfig(), total_steps=1).score([sample.token_ids for sample in samples])
    for sample, score, logits_SV in zip(samples, scores, logits, strict=True):
        targets = torch.tensor(sample.token_ids)[1:, None]
        expected = logits_SV.log_softmax(-1)[:-1].gather(1, targets).squeeze(1)
        assert len(score) == len(expected)
        assert (torch.tensor(score) - expected).abs().max() < 5e-5


def test_state_continues_bit_for_bit() -> None:
    config = LearnerConfig(
        lr=1e-3, warmup_steps=1, lr_decay="cosine", weight_decay=0.1, objective=ObjectiveConfig(kl_coef=0.1)
    )
    model = sharp_model(BASE)
    batches = [make_samples(model, seed=seed) for seed in range(4)]
    learner = Learner(model, config, total_steps=4)
    for batch in batches[:2]:
        learner.update(batch)
    state, halfway = copy.deepcopy(learner.state_dict()), snapshot(model)
    reports = [learner.update(batch) for batch in batches[2:]]

    def continued(state: dict[str, Any] | None) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        other = Learner(sharp_model(BASE), config, total_steps=4)  # from the initial policy, which is the reference
        for name, tensor in other.named_weights():
            tensor.copy_(halfway[name])
        if state is not None:
            other.load_state_dict(state)
        return [other.update(batch) for batch in batches[2:]], snapshot(other.model)

    again, weights = continued(state)
    assert again == reports
    assert same_bits(weights, snapshot(model))
    assert not same_bits(continued(None)[1], snapshot(model)), "the state made no difference"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_mismatch_is_rounding_for_equal_weights(temperature: float, tmp_path: Path) -> None:
    model = sharp_model(BASE)
    save_pretrained(model, tmp_path / "policy")
    engine = NativeEngine(EngineConfig(kind="native", max_model_len=48), str(tmp_path / "policy"))
    prompts = [Prompt(id=str(i), text="", token_ids=[i + 1, 40 + i, 7]) for i in range(3)]
    params = SamplingParams(num_completions=2, max_tokens=20, temperature=temperature, stop_token_id=96, seed=3)
    samples = [
        TrainingSample(
            token_ids=[*group.prompt.token_ids, *completion.token_ids],
            loss_mask=[False] * 3 + [True] * len(completion.token_ids),
            sampling_logprobs=[0.0] * 3 + completion.logprobs,
            temperature=temperature,
        )
        for group in engine.generate(prompts, params)
        for completion in group.completions
    ]
    learner = Learner(model, LearnerConfig(lr=0.0), total_steps=1)
    report = learner.update(samples)
    assert report["mismatch/abs_max"] < 1e-4
    assert report["mismatch/kl_k3"] < 1e-8
    shifted = [replace(s, sampling_logprobs=[logprob + 0.1 for logprob in s.sampling_logprobs]) for s in samples]
    report = learner.update(shifted)
    assert report["mismatch/abs_mean"] == pytest.approx(0.1, abs=1e-4)
    assert report["mismatch/abs_max"] == pytest.approx(0.1, abs=1e-4)
    assert report["mismatch/kl_k3"] == pytest.approx(math.exp(-0.1) + 0.1 - 1, abs=2e-5)


def test_lr_0_changes_no_bit() -> None:
    model = sharp_model(BASE)
    learner = Learner(model, LearnerConfig(lr=0.0, weight_decay=0.1), total_steps=2)
    before = snapshot(model)
    learner.update(make_samples(model))
    assert same_bits(snapshot(model), before)
    assert learner.step == 1


def test_gradient_norm_is_clipped_and_reported_unclipped() -> None:
    model = sharp_model(BASE)
    samples = make_samples(model)

    def norms(grad_clip: float) -> tuple[float, float]:
        gradients, report = update_and_capture(
            Learner(model, LearnerConfig(lr=0.0, grad_clip=grad_clip), total_steps=1), samples
        )
        return torch.stack([g.norm() for g in gradients.values()]).norm().item(), report["policy/grad_norm"]

    free, reported = norms(1e9)
    assert reported == pytest.approx(free, rel=1e-5)
    assert free > 1
    assert norms(0.5) == pytest.approx((0.5, free), rel=1e-5)


def test_report_says_what_its_names_say() -> None:
    model = sharp_model(BASE)
    samples = [replace(sample, temperature=1.0) for sample in make_samples(model)]
    learner = Learner(model, LearnerConfig(lr=1e-3, warmup_steps=2, token_budget=70), total_steps=9)
    logprobs = trained_logprobs(learner, samples)
    sampled = torch.cat([torch.tensor(s.sampling_logprobs)[torch.tensor(s.loss_mask)] for s in samples])
    advantages = torch.cat([torch.full((s.num_trained,), s.advantage) for s in samples])
    ratio = (logprobs - sampled).exp()
    with torch.no_grad():
        hidden = [model(torch.tensor(s.token_ids), SequenceLayout.from_lengths([len(s.token_ids)])) for s in samples]
        predictors = torch.cat(
            [h.hidden_TD[:-1][torch.tensor(s.loss_mask)[1:]] for h, s in zip(hidden, samples, strict=True)]
        )
        entropies = torch.distributions.Categorical(logits=model.lm_head(predictors)).entropy()
    cut = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    report = learner.update(samples)
    assert report["policy/entropy"] == pytest.approx(entropies.mean().item(), rel=1e-5)
    assert report["policy/clipped"] == pytest.approx(cut.float().mean().item(), abs=1e-6)
    assert report["mismatch/abs_max"] == pytest.approx((logprobs - sampled).abs().max().item(), abs=1e-4)
    assert report["policy/lr"] == 5e-4
    assert learner.update(samples)["policy/lr"] == learner.update(samples)["policy/lr"] == 1e-3


def test_expert_load_by_hand() -> None:
    """Layer 1 is even. In layer 2 four experts have 8, 0, 4 and 0 of 12 slots: the mean is 3, the largest 8 / 3."""
    even, uneven = torch.tensor([5, 5, 5, 5]), torch.tensor([8, 0, 4, 0])
    report = load_metrics({1: even, 2: uneven})
    assert report["moe/max_violation"] == pytest.approx(8 / 3 - 1)
    assert report["moe/experts_used"] == pytest.approx(6 / 8)
    assert report["moe/dead_experts"] == 2
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(4)
    assert report["moe/load_entropy"] == pytest.approx((1 + entropy) / 2)
    evenly = {"moe/max_violation": 0.0, "moe/experts_used": 1.0, "moe/dead_experts": 0.0, "moe/load_entropy": 1.0}
    assert load_metrics({1: even}) == pytest.approx(evenly)
    assert load_metrics({}) == {}


def test_expert_load_covers_all_micro_batches() -> None:
    model = sharp_model(BASE)
    samples = make_samples(model)
    reports = [
        Learner(model, LearnerConfig(lr=0.0, token_budget=budget), total_steps=1).update(samples)
        for budget in (30, 999)
    ]
    assert reports[0]["moe/max_violation"] == pytest.approx(reports[1]["moe/max_violation"], abs=1e-6)
    assert reports[0]["moe/max_violation"] > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1e-3}, "lr must be >= 0, got -0.001"),
        ({"lr": math.nan}, "lr must be >= 0, got nan"),
        ({"skip_norm": 1.0}, "skip_norm > 1 or 0 for none, and max_skipped_steps >= 0, got 1.0 and 3"),
        ({"max_skipped_steps": -1}, "got 0.0 and -1"),
        ({"token_budget": 0}, "token_budget must be >= 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerConfig(**settings)
