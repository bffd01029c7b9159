"""Pins the gradient of one optimizer step: what it is worth, and what it does not depend on.

1. It does not depend on how samples fall into micro-batches or on their order: the loss is normalised over the batch.
2. It equals a plain computation with transformers' model, one sample at a time or right-padded: ratio, clip, KL
   penalty, temperature, both aggregations.
3. Two whole updates (gradient clipping, warm-up, AdamW with weight decay) give the same parameters as that computation.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.batch import Aggregation, TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from grpo.packing import pack
from models import CausalLM, SequenceLayout
from models.moe import RoutedExperts
from tests.models.test_models_parity import CORNERS, reference_of, relative_error, sharp_model

LENGTHS = (17, 22, 16, 22, 30, 19)
SPLITS = {1000: 1, 80: 2, 70: 3, 30: 6}
"""Token budget -> micro-batches that `LENGTHS` then take; the last has one sample in each."""

LogitsOf = Callable[[Any, Sequence[TrainingSample]], list[Tensor]]
"""transformers' model, samples -> [L, V] logits of each."""


@torch.no_grad()
def plain_logprobs_of(model: CausalLM, ids: list[int], temperature: float) -> list[float]:
    """[L] log-probability of each token; 0.0 for the first, which nothing predicts."""
    logits_TV = model.lm_head(model(torch.tensor(ids), SequenceLayout.from_lengths([len(ids)])).hidden_TD)
    logprobs_TV = (logits_TV / temperature).log_softmax(-1)
    return [0.0, *logprobs_TV[:-1].gather(1, torch.tensor(ids)[1:, None]).squeeze(1).tolist()]


def make_samples(model: CausalLM, *, seed: int = 0, noise: float = 0.3) -> list[TrainingSample]:
    """Random sequences with recorded log-probabilities a little beside the model's, so that some ratios are clipped.

    Prompts, advantages and temperatures differ, and a few tokens inside completions are not trained.
    """
    rng = random.Random(seed)
    samples = []
    for length in LENGTHS:
        ids = [rng.randrange(model.config.vocab_size) for _ in range(length)]
        temperature = rng.choice([0.7, 1.0, 1.3])
        first = rng.randrange(1, 12)
        mask = [n >= first and rng.random() < 0.9 for n in range(length)]
        logprobs = plain_logprobs_of(model, ids, temperature)
        samples.append(
            TrainingSample(
                token_ids=ids,
                loss_mask=mask,
                sampling_logprobs=[
                    lp + rng.gauss(0, noise) if m else 0.0 for lp, m in zip(logprobs, mask, strict=True)
                ],
                advantage=rng.choice([-1.5, -0.5, 0.5, 2.0]),
                temperature=temperature,
            )
        )
    return samples


def update_and_capture(
    learner: Learner, samples: Sequence[TrainingSample]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One update; the gradients that the optimizer saw, and the report."""
    gradients: dict[str, Tensor] = {}

    def capture(*_: object) -> None:
        for name, parameter in learner.model.named_parameters():
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad.clone()

    handle = learner.optimizer.register_step_pre_hook(capture)
    report = learner.update(samples)
    handle.remove()
    return gradients, report


def logits_one_by_one(model: Any, samples: Sequence[TrainingSample]) -> list[Tensor]:
    return [model(torch.tensor([list(sample.token_ids)]), use_cache=False).logits[0] for sample in samples]


def logits_right_padded(model: Any, samples: Sequence[TrainingSample]) -> list[Tensor]:
    lengths = [len(sample.token_ids) for sample in samples]
    rows = [[*sample.token_ids, *[0] * (max(lengths) - len(sample.token_ids))] for sample in samples]
    mask_BS = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    logits_BSV = model(torch.tensor(rows), attention_mask=mask_BS, use_cache=False).logits
    return [logits_SV[:length] for logits_SV, length in zip(logits_BSV, lengths, strict=True)]


def plain_loss(
    policy: Any, initial: Any, samples: Sequence[TrainingSample], config: ObjectiveConfig, logits_of: LogitsOf
) -> Tensor:
    """The whole objective, written once more from the formulas."""
    num_tokens = sum(sample.num_trained for sample in samples)
    with torch.no_grad():
        initial_logits = logits_of(initial, samples)
    losses = []
    for sample, logits, before in zip(samples, logits_of(policy, samples), initial_logits, strict=True):
        mask = torch.tensor(sample.loss_mask)[1:]
        targets = torch.tensor(sample.token_ids)[1:][mask]
        logprobs = torch.log_softmax(logits[:-1][mask] / sample.temperature, -1)[torch.arange(len(targets)), targets]
        initials = torch.log_softmax(before[:-1][mask] / sample.temperature, -1)[torch.arange(len(targets)), targets]
        ratio = torch.exp(logprobs - torch.tensor(sample.sampling_logprobs)[1:][mask])
        if sample.advantage > 0:
            gain = sample.advantage * torch.where(ratio > 1 + config.clip_high, 1 + config.clip_high, ratio)
        else:
            gain = sample.advantage * torch.where(ratio < 1 - config.clip_low, 1 - config.clip_low, ratio)
        kl = torch.exp(initials) / torch.exp(logprobs) - (initials - logprobs) - 1
        loss = (config.kl_coef * kl - gain).sum()
        losses.append(loss / num_tokens if config.aggregation == "token" else loss / sample.num_trained / len(samples))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_micro_batches_and_order_do_not_matter(
    dtype: torch.dtype, tolerance: float, aggregation: Aggregation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64 leaves nothing for rounding to hide in; grouped_mm lacks it, so there the experts' plain twin runs."""
    if dtype == torch.float64:
        monkeypatch.setattr(RoutedExperts, "forward", RoutedExperts.loop)
    model = sharp_model(CORNERS["v3_like"]).to(dtype)
    samples = make_samples(model)
    shuffled = random.Random(1).sample(samples, len(samples))

    def gradients(token_budget: int, batch: Sequence[TrainingSample]) -> dict[str, Tensor]:
        config = LearnerConfig(
            lr=0.0, grad_clip=1e9, objective=ObjectiveConfig(aggregation=aggregation), token_budget=token_budget
        )
        captured, report = update_and_capture(Learner(model, config, total_steps=1), batch)
        assert 0.1 < report["policy/clipped"] < 0.5
        return captured

    whole = gradients(1000, samples)
    for token_budget, num_micro_batches in SPLITS.items():
        assert len(pack(samples, token_budget, aggregation)) == num_micro_batches
        for batch in (samples, shuffled):
            for name, gradient in gradients(token_budget, batch).items():
                assert relative_error(gradient, whole[name]) < tolerance, f"{name}, token_budget={token_budget}"


@pytest.mark.parametrize("logits_of", [logits_one_by_one, logits_right_padded])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_gradient_equals_a_plain_computation(
    kl_coef: float, aggregation: Aggregation, logits_of: LogitsOf, tmp_path: Path
) -> None:
    before, model = sharp_model(CORNERS["v3_like"]), sharp_model(CORNERS["v3_like"])
    initial = reference_of(before, tmp_path / "initial")
    config = LearnerConfig(
        lr=0.0,
        grad_clip=1e9,
        objective=ObjectiveConfig(clip_high=0.28, kl_coef=kl_coef, aggregation=aggregation),
        token_budget=70,
    )
    learner = Learner(model, config, total_steps=1)
    with torch.no_grad():  # away from the initial policy, where the KL penalty would have no gradient
        model.lm_head.weight.add_(0.05 * torch.randn(97, 64, generator=torch.Generator().manual_seed(5)))
    samples = make_samples(model)
    gradients, report = update_and_capture(learner, samples)
    assert kl_coef == 0 or report["policy/kl_to_reference"] > 0.01

    policy = reference_of(model, tmp_path / "policy")
    loss = plain_loss(policy, initial, samples, config.objective, logits_of)
    loss.backward()
    assert report["policy/loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert expected.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_two_updates_equal_a_plain_computation(aggregation: Aggregation, tmp_path: Path) -> None:
    model = sharp_model(CORNERS["v3_like"])
    initial, policy = reference_of(model, tmp_path / "a"), reference_of(model, tmp_path / "b")
    config = LearnerConfig(
        lr=3e-3, warmup_steps=3, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, grad_clip=0.5,
        objective=ObjectiveConfig(kl_coef=0.1, aggregation=aggregation), token_budget=70,
    )  # fmt: skip
    learner = Learner(model, config, total_steps=10)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    matrices = [p for p in policy.parameters() if p.dim() > 1]
    vectors = [p for p in policy.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), weight_decay=0.1)
    for step, lr in enumerate([1e-3, 2e-3]):
        samples = make_samples(model, seed=step)
        report = learner.update(samples)
        plain_loss(policy, initial, samples, config.objective, logits_one_by_one).backward()
        norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm()
        assert report["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert norm > 1, "the gradient is too small to be clipped"
        for parameter in policy.parameters():
            parameter.grad *= 0.5 / norm
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    expected = dict(policy.named_parameters())
    for name, parameter in model.named_parameters():
        # Adam divides by the gradient's size, so rounding shows where a gradient is near 0: hence not 1e-5.
        assert relative_error(parameter - start[name], expected[name] - start[name]) < 1e-3, name
