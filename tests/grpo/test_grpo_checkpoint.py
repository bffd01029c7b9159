"""Pins training checkpoints.

1. What was saved comes back bit for bit, and training continues as if never interrupted: router bias, reference model,
   norms of past gradients and the global random generators included.
2. A crash at any moment of saving leaves the previous checkpoint whole, and it is the one that loads.
3. The last few are kept; the policy inside is an ordinary checkpoint folder.
4. Whatever is damaged in the newest one, the one before is used, and that is said; if all are damaged, nothing starts.
5. Weights that do not fit are refused.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo import learner_state
from grpo.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.objective import ObjectiveConfig
from models import hf_tensors, load_pretrained
from tests.grpo.test_grpo_gradients import make_samples
from tests.grpo.test_grpo_learner import same_bits, snapshot
from tests.grpo.test_grpo_trainer import make_trainer, policy
from tests.models.test_models_parity import BASE, sharp_model

__all__ = ["policy"]

CONFIG = LearnerConfig(lr=1e-3, warmup_steps=3, objective=ObjectiveConfig(kl_coef=0.1))


def make_learner(seed: int = 0) -> Learner:
    return Learner(sharp_model(BASE, seed), CONFIG, total_steps=10)


def entries(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_no_checkpoint_is_step_0(tmp_path: Path) -> None:
    learner = make_learner()
    before = snapshot(learner.model)
    assert checkpoints(tmp_path) == []
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


def test_router_bias_and_reference_come_back(tmp_path: Path) -> None:
    """Also if what the run began with has another content by now: the reference is that of the run's beginning."""
    learner = make_learner()
    for name, tensor in hf_tensors(learner.model):
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.randn_like(tensor))
    assert learner.reference is not None
    beginning = snapshot(learner.reference)
    samples = make_samples(learner.model)
    learner.update(samples)
    save_checkpoint(tmp_path, learner, 1, {})
    report = learner.update(samples)

    other = make_learner(seed=5)
    load_checkpoint(tmp_path, other)
    assert other.reference is not None and same_bits(snapshot(other.reference), beginning)
    assert other.update(samples) == report and report["policy/kl_to_reference"] > 0
    names = [name for name in snapshot(other.model) if name.endswith("e_score_correction_bias")]
    assert names and same_bits(snapshot(other.model), snapshot(learner.model))


def test_global_random_generators_continue(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.normal()), torch.rand(1).item()

    learner = make_learner()
    draw()
    save_checkpoint(tmp_path, learner, 1, {})
    expected = [draw() for _ in range(3)]
    load_checkpoint(tmp_path, learner)
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_are_kept(keep: int, tmp_path: Path) -> None:
    learner = make_learner()
    steps = (2, 9, 10, 100)
    for number, step in enumerate(steps, 1):
        save_checkpoint(tmp_path, learner, step, {"place": 7}, keep=keep)
        assert entries(tmp_path) == [f"step_{step:06d}" for step in steps[max(0, number - keep) : number]]
    assert load_checkpoint(tmp_path, learner) == (100, {"place": 7})
    assert load_checkpoint(tmp_path, learner, last=99)[0] == (10 if keep > 1 else 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


FILES = ("policy/model.safetensors", "policy/config.json", "learner/.metadata", "learner/__0_0.distcp", "trainer.pt")
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{f"flipped {name}": (lambda f, n=name: flip(f / n), f"{name} holds other bytes") for name in FILES},
    **{f"lost {name}": (lambda f, n=name: (f / n).unlink(), f"{name} is missing") for name in FILES},
    "cut": (
        lambda f: (f / "learner/__0_0.distcp").write_bytes((f / "learner/__0_0.distcp").read_bytes()[:-9]),
        "learner/__0_0.distcp has .* bytes",
    ),
    "emptied": (lambda f: (f / "policy/model.safetensors").write_bytes(b""), "safetensors has 0 bytes instead of"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "cut manifest": (lambda f: (f / "manifest.json").write_text('{"learner/__0_0.distcp": {'), "cannot be read"),
    "other manifest": (lambda f: (f / "manifest.json").write_text("[1]"), "cannot be read"),
    "a folder in place of a file": (lambda f: ((f / "trainer.pt").unlink(), (f / "trainer.pt").mkdir()), "trainer.pt"),
    "empty": (empty, "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_passed_over_aloud(damage: str, tmp_path: Path) -> None:
    learner = make_learner()
    samples = make_samples(learner.model)
    save_checkpoint(tmp_path, learner, 5, {"place": 5})
    saved = snapshot(learner.model)
    learner.update(samples)
    newest = save_checkpoint(tmp_path, learner, 6, {"place": 6})
    break_it, description = DAMAGES[damage]
    break_it(newest)
    told: list[str] = []
    other = make_learner(seed=3)
    assert load_checkpoint(tmp_path, other, told.append) == (5, {"place": 5})
    assert same_bits(snapshot(other.model), saved)
    assert len(told) == 1 and told[0].startswith("damaged checkpoints: step_000006: ")
    assert told[0].endswith(". Going back to step_000005") and re.search(description, told[0])

    save_checkpoint(tmp_path, other, 6, {"place": 8})
    assert load_checkpoint(tmp_path, make_learner(), told.append) == (6, {"place": 8}) and len(told) == 1


def test_all_damaged_is_an_error_and_no_beginning(tmp_path: Path) -> None:
    learner = make_learner()
    for step in (5, 6):
        flip(save_checkpoint(tmp_path, learner, step, {}) / "trainer.pt")
    before = snapshot(learner.model)
    with pytest.raises(ValueError, match=r"all checkpoints in .* are damaged \(step_000006: trainer.pt .*step_000005"):
        load_checkpoint(tmp_path, learner)
    assert same_bits(snapshot(learner.model), before)


def test_checkpoints_of_before_a_fallback_do_not_outlive_good_ones(tmp_path: Path) -> None:
    """Three of five are damaged; the run goes back to step 4 and saves step 5: 4 and 5 are what stays."""
    learner = make_learner()
    for step in range(4, 9):
        save_checkpoint(tmp_path, learner, step, {}, keep=9)
    for step in (6, 7, 8):
        (tmp_path / "checkpoints" / f"step_{step:06d}" / "learner/__0_0.distcp").unlink()
    save_checkpoint(tmp_path, learner, 5, {}, keep=2)
    assert entries(tmp_path) == ["step_000004", "step_000005"]


def test_a_manifest_covers_every_file(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, make_learner(), 5, {})
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(json.loads((folder / "manifest.json").read_text())) == files - {"manifest.json"} == set(FILES)


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

    monkeypatch.setattr(torch if broken == "save" else learner_state, broken, crash)
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
    (tmp_path / "checkpoints" / ".step_000005.old").mkdir()
    assert load_checkpoint(tmp_path, learner) == (5, {"place": 7})
    assert entries(tmp_path) == ["step_000005"], "and removed"
    save_checkpoint(tmp_path, learner, 6, {"place": 7})
    (tmp_path / "checkpoints" / "step_000006").rename(tmp_path / "checkpoints" / ".step_000006.old")
    assert load_checkpoint(tmp_path, learner) == (6, {"place": 7}), "killed between the renames of a second save"
    assert entries(tmp_path) == ["step_000005", "step_000006"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_learner(), 1, {"place": 7})
    other = Learner(sharp_model(replace(BASE, num_hidden_layers=2)), CONFIG, total_steps=10)
    with pytest.raises(
        ValueError, match=r"step_000001/learner: \d+ tensors do not fit the model: unexpected model\.layers\.2"
    ):
        load_checkpoint(tmp_path, other)


def test_rows_are_on_disk_before_the_checkpoint_that_follows_them(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave a checkpoint whose history is lost."""
    events: list[str] = []
    monkeypatch.setattr("grpo.trainer.flush_to_disk", lambda path: events.append(path.name))
    monkeypatch.setattr("grpo.trainer.save_checkpoint", lambda *arguments: events.append("checkpoint"))
    make_trainer(policy, tmp_path, steps=2, save_every=1, log_groups_every=1).run()
    assert events == ["metrics.jsonl", "groups.jsonl", "checkpoint"] * 2


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to name what is flushed")
def test_what_a_power_cut_could_lose_is_flushed_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder before the rename, the rename before an older checkpoint is removed."""
    names: set[str] = set()
    events: list[tuple[str, str]] = []
    sync, rename, remove = os.fsync, Path.rename, shutil.rmtree

    def watched_sync(descriptor: int) -> None:
        sync(descriptor)
        events.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def watched_rename(path: Path, target: Path) -> Path:
        if target.name == "step_000006":
            names.update(file.name for file in [path, *path.rglob("*")])
            events.append(("rename", target.name))
        return rename(path, target)

    def watched_remove(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            events.append(("remove", path.name))
        remove(path, ignore_errors)

    learner = make_learner()
    save_checkpoint(tmp_path, learner, 5, {}, keep=1)
    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    monkeypatch.setattr(shutil, "rmtree", watched_remove)
    save_checkpoint(tmp_path, learner, 6, {}, keep=1)
    at = events.index(("rename", "step_000006"))
    flushed = {name for _, name in events[:at]} - {".metadata.tmp"}  # torch renames it
    assert names == flushed and "manifest.json" in names
    assert events[at + 1] == ("flush", "checkpoints") and events[-1] == ("remove", "step_000005")
