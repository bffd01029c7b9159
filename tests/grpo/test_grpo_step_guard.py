"""Pins which optimizer steps are skipped and how a run ends that skips too many.

1. A gradient that is not finite changes no bit of weights, optimizer and schedule, and what follows is unaffected.
2. A finite norm is held against the median of past ones, if asked, by hand; the state continues.
3. After too many in a row the run ends with the samples and parameters at fault, and the batch can be read back.
4. The trainer counts and says what was skipped; skipped minibatches take no part in the means.
"""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.metrics import read_metrics
from grpo.minibatches import update_in_minibatches
from grpo.sample_file import read_samples
from grpo.step_guard import MIN_NORMS, StepGuard, StepsSkippedError
from tests.grpo.test_grpo_gradients import make_samples
from tests.grpo.test_grpo_learner import same_bits, snapshot
from tests.grpo.test_grpo_trainer import even_share, make_learner, make_trainer, policy
from tests.models.test_models_parity import BASE, sharp_model

__all__ = ["policy"]


def broken(sample: TrainingSample, bad: float = math.nan) -> TrainingSample:
    return replace(sample, advantage=2.0, sampling_logprobs=[bad] * len(sample.token_ids))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_skipped_step_leaves_no_trace(bad: float) -> None:
    config = LearnerConfig(lr=1e-3, warmup_steps=5)
    learner, undisturbed = (Learner(sharp_model(BASE), config, total_steps=9) for _ in range(2))
    samples = make_samples(learner.model)
    for each in (learner, undisturbed):
        each.update(samples)
    before = snapshot(learner.model)
    report = learner.update([*samples[:2], broken(samples[2], bad)])
    assert report["policy/skipped_steps"] == 1 and math.isnan(report["policy/grad_norm"])
    assert same_bits(snapshot(learner.model), before) and learner.step == 1
    assert learner.update(samples) == undisturbed.update(samples)
    assert same_bits(snapshot(learner.model), snapshot(undisturbed.model))


def test_the_median_by_hand() -> None:
    guard = StepGuard(norm_limit=10, max_skipped=1)
    for _ in range(MIN_NORMS - 1):
        assert guard.judge(1.0) is None
    assert guard.judge(99.0) is None, "too few to know what is usual"
    assert guard.judge(10.0) is None
    assert guard.judge(0.0) is None, "no group with spread"
    assert guard.judge(10.1) == "the gradient norm is 10.1, the median of the last 11 is 1"
    state = json.loads(json.dumps(guard.state_dict()))
    assert state == {"norms": [1.0] * 9 + [99.0, 10.0], "skipped_in_a_row": 1}
    other = StepGuard(norm_limit=10, max_skipped=1)
    other.load_state_dict(state)
    assert other.judge(11.0) is not None and other.skipped_in_a_row == 2
    assert other.judge(1.0) is None and other.skipped_in_a_row == 0
    for _ in range(200):
        assert other.judge(9.0) is None
    assert other.judge(11.0) is None, "what is usual is what the last 100 were"
    unlimited = StepGuard(norm_limit=0, max_skipped=1)
    assert not any(unlimited.judge(norm) for norm in [1.0] * 50 + [1e30])


def test_an_exploding_norm_is_skipped_and_the_limit_survives_a_restart() -> None:
    config = LearnerConfig(lr=0.0, skip_norm=3.0)
    learner = Learner(sharp_model(BASE), config, total_steps=99)
    samples = make_samples(learner.model)
    huge = [replace(sample, advantage=sample.advantage * 50) for sample in samples]
    for _ in range(MIN_NORMS):
        assert learner.update(samples)["policy/skipped_steps"] == 0
    other = Learner(sharp_model(BASE), config, total_steps=99)
    assert other.update(huge)["policy/skipped_steps"] == 0, "it does not know yet what is usual"
    other.load_state_dict(learner.state_dict())
    assert learner.update(huge) == other.update(huge)
    assert learner.step == other.step == MIN_NORMS and learner.guard.skipped_in_a_row == 1


def test_the_culprits_are_named(tmp_path: Path) -> None:
    learner = Learner(sharp_model(BASE), LearnerConfig(max_skipped_steps=2, token_budget=70), total_steps=9)
    samples = make_samples(learner.model)
    bad = [*samples[:2], broken(samples[2]), *samples[3:-1], replace(samples[-1], advantage=math.inf)]
    for count in (1, 2):
        learner.update(bad)
        assert learner.guard.skipped_in_a_row == count
    with pytest.raises(
        StepsSkippedError, match=r"^3 optimizer steps in a row were skipped, 0 had been taken"
    ) as caught:
        learner.update(bad)
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value)
    error.culprits.write(tmp_path, error.batch, step=7)
    written = json.loads((tmp_path / "culprits.json").read_text())
    assert written["step"] == 7 and written["reason"] == "the gradient norm is nan"
    assert "lm_head.weight" in written["parameters"]
    at_fault = {row["sample"]: row["not_finite"] for row in written["samples"]}
    assert at_fault == {2: ["sampling_logprobs", "loss"], len(bad) - 1: ["advantage", "loss"]}
    again = read_samples(tmp_path / "batch.safetensors")
    assert again[:2] == samples[:2] and again[-1] == bad[-1]
    assert math.isnan(Learner(sharp_model(BASE), LearnerConfig(), 9).update(again)["policy/grad_norm"])


def test_a_finite_explosion_names_the_largest_losses() -> None:
    config = LearnerConfig(lr=0.0, skip_norm=3.0, max_skipped_steps=0)
    learner = Learner(sharp_model(BASE), config, total_steps=99)
    samples = make_samples(learner.model)
    for _ in range(MIN_NORMS):
        learner.update(samples)
    place = max(range(len(samples)), key=lambda i: abs(samples[i].advantage))
    samples[place] = replace(samples[place], advantage=samples[place].advantage * 1e4)
    with pytest.raises(StepsSkippedError, match="the median of the last 10 is") as caught:
        learner.update(samples)
    assert caught.value.culprits.parameters == [] and caught.value.culprits.samples[0]["sample"] == place


def test_skipped_minibatches_take_no_part_in_the_means() -> None:
    model = sharp_model(BASE)
    samples = make_samples(model)[:4]
    config = LearnerConfig(lr=1e-3)
    expected = Learner(sharp_model(BASE), config, total_steps=9).update(samples[2:])
    half = update_in_minibatches(Learner(model, config, 9), [*samples[:1], broken(samples[1]), *samples[2:]], 2)
    ours = {name: value for name, value in half.items() if not name.startswith("mismatch/")}
    assert ours == {name: expected[name] for name in ours} | {"policy/skipped_steps": 1}
    none = update_in_minibatches(Learner(model, config, 9), [broken(sample) for sample in samples], 2)
    assert none["policy/skipped_steps"] == 2 and math.isnan(none["policy/grad_norm"])


def test_the_trainer_counts_says_and_stops(policy: Path, tmp_path: Path) -> None:
    """A learner whose advantages are broken in step 1, and from step 4 on."""
    told: list[str] = []
    learner = make_learner(policy, lr=1e-2, max_skipped_steps=2)
    trainer = make_trainer(policy, tmp_path, learner=learner, reward=even_share, tell=told.append, steps=20)
    update, steps = trainer.update, []

    def disturbed(samples: list[TrainingSample], step: int) -> dict[str, float]:
        steps.append(step)
        return update([broken(s) for s in samples] if step == 1 or step >= 4 else samples, step)

    trainer.update = disturbed  # type: ignore[method-assign]
    with pytest.raises(StepsSkippedError, match=rf"^step 6: 3 optimizer .* wrong in it: {tmp_path}/culprits$"):
        trainer.run()
    rows: list[dict[str, Any]] = read_metrics(tmp_path)
    assert [row["policy/skipped_steps"] for row in rows] == [0, 1, 0, 0, 1, 1] and steps == list(range(7))
    skips = [message for message in told if "skipped" in message]
    assert skips == [f"step {step}: 1 of 1 optimizer steps skipped" for step in (1, 4, 5)]
    assert len(read_samples(tmp_path / "culprits" / "batch.safetensors")) == 12
    assert trainer.learner.step == 3
