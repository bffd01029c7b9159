"""Pins the reference policy of the KL penalty, and what needs a second pass over a batch.

1. Every N optimizer steps the reference becomes the policy; a learner continued from its state has the same one.
2. KL in the reward is kl_coef times the sum over a sample's tokens of the estimate, by the sampler's probabilities.
3. The tokens of highest entropy are chosen over the whole optimizer step, and only they move the policy.
"""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.losses import KLEstimator
from grpo.objective import ObjectiveConfig
from models import CausalLM
from tests.grpo.test_grpo_gradients import make_samples, plain_logprobs_of, update_and_capture
from tests.grpo.test_grpo_learner import same_bits, snapshot
from tests.models.test_models_parity import BASE, sharp_model


def make_learner(model: CausalLM, lr: float = 1e-3, **objective: object) -> Learner:
    config = LearnerConfig(lr=lr, grad_clip=1e9, token_budget=70, objective=ObjectiveConfig(**objective))  # type: ignore[arg-type]
    return Learner(model, config, total_steps=9)


def test_the_reference_is_replaced_every_two_steps() -> None:
    model = sharp_model(BASE)
    learner = make_learner(model, kl_coef=0.1, reference_every=2)
    samples = make_samples(model)
    assert learner.reference is not None
    kl, references = [], []
    for _ in range(5):
        kl.append(learner.update(samples)["policy/kl_to_reference"])
        references.append(snapshot(learner.reference))
    is_equal = [same_bits(one, other) for one, other in pairwise(references)]
    assert is_equal == [False, True, False, True], "after steps 2 and 4"
    assert kl[0] == kl[2] == kl[4] == 0 < min(kl[1], kl[3]), "each step behind a replacement starts at the reference"
    assert all(not p.requires_grad for p in learner.reference.parameters())


def test_a_replaced_reference_is_in_the_state() -> None:
    model = sharp_model(BASE)
    learner = make_learner(model, kl_coef=0.1, reference_every=2)
    samples = make_samples(model)
    for _ in range(3):
        learner.update(samples)
    state, weights = copy.deepcopy(learner.state_dict()), snapshot(model)
    report = learner.update(samples)
    again = make_learner(sharp_model(BASE), kl_coef=0.1, reference_every=2)
    for name, tensor in again.named_weights():
        tensor.copy_(weights[name])
    again.load_state_dict(state)
    assert again.update(samples) == report
    assert same_bits(snapshot(again.model), snapshot(model))
    assert make_learner(model, kl_coef=0.1).state_dict()["reference"], (
        "whose folder may change while a run stands still"
    )


def by_hand(model: CausalLM, sample: TrainingSample, estimator: KLEstimator) -> float:
    reference = torch.tensor(plain_logprobs_of(model, list(sample.token_ids), sample.temperature))
    d = (reference - torch.tensor(sample.sampling_logprobs))[torch.tensor(sample.loss_mask)].double()
    return {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[estimator].sum().item()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_by_hand(estimator: KLEstimator) -> None:
    model = sharp_model(BASE)
    samples = make_samples(model)
    learner = make_learner(model, kl_coef=0.3, kl_estimator=estimator, kl_in="reward")
    learner.update(samples)  # the policy moves, the reference and the recorded probabilities do not
    untouched = sharp_model(BASE)
    expected = [0.3 * by_hand(untouched, sample, estimator) for sample in samples]
    assert learner.kl_in_reward(samples) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    idle = replace(samples[0], loss_mask=[False] * len(samples[0].token_ids))
    assert learner.kl_in_reward([idle, samples[1]])[0] == 0 and learner.kl_in_reward([idle]) == [0.0]
    in_loss = make_learner(model, kl_coef=0.3, kl_estimator=estimator)
    assert in_loss.kl_in_reward(samples) == [0.0] * len(samples)
    penalized = make_learner(sharp_model(BASE), 0.0, kl_coef=0.3, kl_in="reward")
    gradients = [update_and_capture(x, samples)[0] for x in (penalized, make_learner(sharp_model(BASE), 0.0))]
    assert same_bits(*gradients), "it is not in the loss as well"


def test_selected_tokens_are_those_of_the_whole_step() -> None:
    """As if the others were masked, with the denominator of all."""
    model = sharp_model(BASE)
    samples = [replace(sample, temperature=1.0) for sample in make_samples(model)]
    share = 0.25
    gradients, report = update_and_capture(make_learner(model, lr=0.0, entropy_top_share=share), samples)
    entropies = entropies_of(model, samples)
    ordered = torch.cat(entropies).sort(descending=True).values
    count = -(-len(ordered) // 4)
    assert report["policy/selected"] == pytest.approx(count / len(ordered), rel=1e-5)
    masked = []
    for sample, entropy in zip(samples, entropies, strict=True):
        mask = torch.tensor(sample.loss_mask)
        mask[mask.clone()] = entropy >= ordered[count - 1] - 1e-6
        masked.append(replace(sample, loss_mask=mask.tolist()))
    alone, _ = update_and_capture(make_learner(model, lr=0.0), masked)
    for name, gradient in gradients.items():
        difference = (gradient - alone[name] * count / len(ordered)).norm()
        assert difference < 1e-5 * gradient.norm() + 1e-9, name


@torch.no_grad()
def entropies_of(model: CausalLM, samples: list[TrainingSample]) -> list[Tensor]:
    logits = [model.logits(torch.tensor([list(sample.token_ids)]))[0] for sample in samples]
    masks = [torch.tensor(sample.loss_mask)[1:] for sample in samples]
    return [torch.distributions.Categorical(logits=x[:-1][m]).entropy() for x, m in zip(logits, masks, strict=True)]
