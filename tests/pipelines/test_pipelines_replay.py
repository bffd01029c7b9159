"""`grpo replay`: the samples of a run trained on again, without an engine.

The run has what makes a step hard to repeat: several minibatches, KL, a correction, tokens of older weights, experts.
1. From the checkpoint before, or from the base, the same bytes of the model and the same metrics come out.
2. Samples or metrics that were changed are noticed; steps without samples, and what is no run, are refused.
"""

import json
import math
import shutil
from pathlib import Path

import pytest

from grpo.metrics import read_metrics
from grpo.sample_file import read_samples, sample_path, write_samples
from pipelines.replay import differences
from tests.pipelines.conftest import LOCAL, grpo

STEPS = 6
FLAGS = (
    *LOCAL, "--num-prompts", 60, "--num-threads", 1, "--trainer.steps", STEPS, "--trainer.save-every", 2,
    "--trainer.prompts-per-step", 8, "--trainer.completions-per-prompt", 4, "--trainer.max-tokens", 24,
    "--trainer.minibatches", 2, "--trainer.dump-samples-every", 1, "--trainer.keep-checkpoints", 2,
    "--trainer.rollout.partial-share", 1, "--trainer.rollout.max-policy-lag", 2,
    "--learner.objective.kl-coef", 0.05,
    "--learner.lr-decay", "cosine", "--learner.correction.kind", "token_tis", "--learner.correction.old-logprobs",
    "learner", "--engine.max-model-len", 64,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replay") / "run"
    done = grpo("zero", "ledger", "--model", base, "--out", out, *FLAGS)
    assert done.status == 0, done.err
    return out


def test_samples_hold_what_is_hard_to_repeat(run: Path) -> None:
    samples = [sample for step in range(STEPS) for sample in read_samples(sample_path(run, step))]
    assert len(samples) == STEPS * 32
    assert {lag for sample in samples for lag in sample.policy_lags or ()} > {0}
    assert all(sample.expert_ids is not None and sample.old_logprobs is not None for sample in samples)


@pytest.mark.parametrize("first", [0, 3, 4, 5], ids=["from the base", "checkpoint too new", "4", "between"])
def test_the_same_bytes_and_numbers_without_an_engine(
    first: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.zero.build_pool", None)
    done = grpo("replay", run, "--step", first, "--last", STEPS - 1, "--out", tmp_path / "out")
    assert done.status == 0, done
    start = 4 if first >= 4 else 0
    assert ("from the checkpoint after 4 steps" if start else "from the base") in done.out
    name = "model/model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (run / name).read_bytes()
    logged = {row["step"]: row for row in read_metrics(run)}
    replayed = read_metrics(tmp_path / "out")
    assert [row["step"] for row in replayed] == list(range(start, STEPS))
    assert all(
        len(row) > 20 and "policy/grad_norm" in row and row.items() <= logged[row["step"]].items() for row in replayed
    )


def test_changes_are_noticed(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    rows = read_metrics(copy)
    before = rows[4]["policy/loss"]
    rows[4]["policy/loss"] = math.nextafter(before, 9)
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = grpo("replay", copy, "--step", 4)
    assert done.status == 1 and f"  policy/loss: {before!r}, the run logged" in done.out
    assert done.out.count("the run logged") == 1
    samples = read_samples(sample_path(copy, 4))
    write_samples(sample_path(copy, 4), samples[::-1], 4)
    assert grpo("replay", copy, "--step", 4).out.count("the run logged") > 5


def test_numbers_that_are_none_are_equal_to_themselves_only() -> None:
    assert differences({"a": math.nan, "b": 1.0}, {"a": math.nan, "b": 1.0}) == []
    assert differences({"a": math.nan, "b": 1.0}, {"a": 1.0}) == [
        "a: nan, the run logged 1.0",
        "b: 1.0, the run logged None",
    ]


def test_what_cannot_be_replayed_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    sample_path(copy, 4).unlink()
    message = grpo("replay", copy, "--step", 5).one_line_error()
    assert message == f"{sample_path(copy, 4)} does not exist: a run writes it with --trainer.dump-samples-every 1"
    assert "no config.json" in grpo("replay", tmp_path, "--step", 5).one_line_error()
    assert "no config.json" in grpo("replay", "--step", 5).one_line_error()
    assert "exists already" in grpo("replay", run, "--step", 5, "--out", tmp_path).one_line_error()
    assert "last >= step, got 5 and 4" in grpo("replay", run, "--step", 5, "--last", 4).one_line_error()
