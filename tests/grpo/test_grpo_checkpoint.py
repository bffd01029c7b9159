"""Pins training checkpoints.

1. What was saved comes back bit for bit, and training continues as if never interrupted.
2. A crash at any moment of saving leaves the previous checkpoint whole, and it is the one that loads.
3. Only the newest is kept; the policy inside is an ordinary checkpoint folder.
4. Weights that do not fit are refused.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo import checkpoint as checkpoint_module
from grpo.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from grpo.learner import Learner, LearnerConfig
from models import load_pretrained
from tests.grpo.test_grpo_gradients import make_samples
from tests.grpo.test_grpo_learner import same_bits, snapshot
from tests.models.test_models_parity import BASE, sharp_model

CONFIG = LearnerConfig(lr=1e-3, warmup_steps=3, kl_coef=0.1)


def make_learner(seed: int = 0) -> Learner:
    return Learner(sharp_model(BASE, seed), CONFIG, total_steps=10)


def entries(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_no_checkpoint_is_step_0(tmp_path: Path) -> None:
    learner = make_learner()
    before = snapshot(learner.model)
    assert latest_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path, learner) == (0, None)
    assert same_bits(snapshot(learner.model), before)


def test_round_trip_continues_bit_for_bit(tmp_path: Path) -> None:
    learner = make_learner()
    batches = [make_samples(learner.model, seed=seed) for seed in range(4)]
    for batch in batches[:2]:
        learner.update(batch)
    folder = save_checkpoint(tmp_path, learner, 7, {"place": 7})
    saved = snapshot(learner.model)
    reports = [learner.update(batch) for batch in batches[2:]]

    other = make_learner()
    assert load_checkpoint(tmp_path, other) == (7, {"place": 7})
    assert same_bits(snapshot(other.model), saved)
    assert other.step == 2
    assert [other.update(batch) for batch in batches[2:]] == reports
    assert same_bits(snapshot(other.model), snapshot(learner.model))
    assert folder == tmp_path / "checkpoints" / "step_000007"
    assert same_bits(snapshot(load_pretrained(folder / "policy")), saved)


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    learner = make_learner()
    for step in (2, 9, 10, 100):
        save_checkpoint(tmp_path, learner, step, {"place": 7})
        assert entries(tmp_path) == [f"step_{step:06d}"]
    assert load_checkpoint(tmp_path, learner) == (100, {"place": 7})


def test_newest_is_by_number_when_an_older_one_was_left(tmp_path: Path) -> None:
    """A crash between writing the new checkpoint and removing the old one leaves both."""
    learner = make_learner()
    old = save_checkpoint(tmp_path, learner, 9, {"place": 7})
    kept = old.rename(tmp_path / "aside")
    save_checkpoint(tmp_path, learner, 10, {"place": 7})
    kept.rename(old)
    assert entries(tmp_path) == ["step_000009", "step_000010"]
    assert load_checkpoint(tmp_path, learner) == (10, {"place": 7})


@pytest.mark.parametrize("broken", ["write_checkpoint", "save"])
@pytest.mark.parametrize("step", [5, 6])
def test_a_crash_while_saving_leaves_the_previous_one(
    broken: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written, or after the policy is; for a later step, and for the same step again."""
    learner = make_learner()
    samples = make_samples(learner.model)
    learner.update(samples)
    save_checkpoint(tmp_path, learner, 5, {"place": 7})
    saved = snapshot(learner.model)
    learner.update(samples)
    reached: list[bool] = []

    def crash(*arguments: object) -> None:
        reached.append((tmp_path / "checkpoints" / f".step_{step:06d}.new" / "policy" / "config.json").exists())
        raise OSError("disk full")

    monkeypatch.setattr(torch if broken == "save" else checkpoint_module, broken, crash)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, learner, step, {"place": 7})
    assert reached == [broken == "save"]
    monkeypatch.undo()

    assert entries(tmp_path) == ["step_000005"]
    other = make_learner(seed=3)
    assert load_checkpoint(tmp_path, other) == (5, {"place": 7})
    assert same_bits(snapshot(other.model), saved)
    assert other.step == 1
    save_checkpoint(tmp_path, learner, step, {"place": 7})
    assert load_checkpoint(tmp_path, other) == (step, {"place": 7})
    assert same_bits(snapshot(other.model), snapshot(learner.model))


def test_what_a_killed_process_left_is_ignored(tmp_path: Path) -> None:
    learner = make_learner()
    save_checkpoint(tmp_path, learner, 5, {"place": 7})
    leftover = tmp_path / "checkpoints" / ".step_000006.new"
    (leftover / "policy").mkdir(parents=True)
    (leftover / "policy" / "config.json").write_text("{")
    assert load_checkpoint(tmp_path, learner) == (5, {"place": 7})
    save_checkpoint(tmp_path, learner, 6, {"place": 7})
    assert entries(tmp_path) == ["step_000006"]
    assert load_checkpoint(tmp_path, learner) == (6, {"place": 7})


def test_another_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_learner(), 1, {"place": 7})
    other = Learner(sharp_model(replace(BASE, num_hidden_layers=2)), CONFIG, total_steps=10)
    with pytest.raises(
        ValueError, match=r"step_000001.policy: \d+ tensors do not fit the model: unexpected model\.layers\.2"
    ):
        load_checkpoint(tmp_path, other)
