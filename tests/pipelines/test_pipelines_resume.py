"""Killing a run and starting it again.

Pinned: (1) a run killed by SIGKILL in the middle and resumed ends as an uninterrupted one: every metric of every step
equal bit for bit except times and speeds, the same completions logged, once each, the same bytes in the final model;
(2) lines cut short by the crash do no harm; (3) resuming a finished run changes nothing; (4) a run killed before its
first checkpoint starts over; (5) a changed field is refused by its name, and a folder without a run is refused; (6) a
run may be resumed from its own config file, and from another place; (7) a damaged checkpoint is passed over and named.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grpo.metrics import read_metrics
from tests.pipelines.conftest import LOCAL, ROOT, grpo

STEPS, SAVE_EVERY, ROWS_BEFORE_KILL = 8, 2, 5
FLAGS = (
    *LOCAL, "--num-prompts", 100, "--num-threads", 1, "--trainer.steps", STEPS, "--trainer.save-every", SAVE_EVERY,
    "--trainer.prompts-per-step", 16, "--trainer.completions-per-prompt", 8, "--trainer.log-groups-every", 1,
    # What a checkpoint must carry beside weights: optimizer state, place in the schedule, the initial policy.
    "--trainer.minibatches", 2, "--learner.lr-decay", "cosine", "--learner.warmup-steps", 3,
    "--learner.objective.kl-coef", 0.05,
)  # fmt: skip


def zero(base: Path, out: Path, *more: object) -> list[str]:
    return list(map(str, ("zero", "ledger", "--model", base, "--out", out, *FLAGS, *more)))


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = grpo(*zero(base, out))
    assert done.status == 0, done.err
    return out


def kill_in_the_middle(arguments: list[str], out: Path, environment: dict[str, str]) -> None:
    """Starts `grpo` in a process of its own and kills it as soon as five steps are logged."""
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 200
    metrics = out / "metrics.jsonl"
    try:
        while not metrics.exists() or metrics.read_text().count("\n") < ROWS_BEFORE_KILL:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0].decode()
            time.sleep(0.005)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert not (out / "model").exists() and len(read_metrics(out)) < STEPS


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(("seconds/", "speed/", "memory/"))} for row in rows]


def assert_same_run(resumed: Path, expected: Path) -> None:
    rows = without_time(read_metrics(expected))
    assert [row["step"] for row in rows] == list(range(STEPS)) and all(len(row) > 15 for row in rows)
    assert without_time(read_metrics(resumed)) == rows, "equal floats, not nearly equal ones"
    assert (resumed / "groups.jsonl").read_text() == (expected / "groups.jsonl").read_text(), (
        "what is sampled again is logged again, in place of what was logged before"
    )
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (resumed / "model" / name).read_bytes() == (expected / "model" / name).read_bytes(), name


def test_killed_and_resumed_equals_uninterrupted(
    base: Path, uninterrupted: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    kill_in_the_middle(zero(base, out), out, environment)
    for name in ("metrics.jsonl", "groups.jsonl"):  # a crash of the machine may cut the line that is being written
        with (out / name).open("a") as file:
            file.write('{"step": 5, "rew')
    command = [sys.executable, "-m", "pipelines.cli", *zero(base, out, "--resume")]
    resumed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed" in resumed.stdout
    assert_same_run(out, uninterrupted)
    checkpoints = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert checkpoints == [f"step_{STEPS - SAVE_EVERY:06d}", f"step_{STEPS:06d}"], "and nothing half-written"


@pytest.fixture
def stopped(base: Path, uninterrupted: Path, tmp_path: Path) -> Path:
    """A run that was killed after five steps without a checkpoint: cut from the uninterrupted one."""
    out = tmp_path / "run"
    out.mkdir()
    config = json.loads((uninterrupted / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"out": str(out)}))
    for name, kept in (("metrics.jsonl", 5), ("groups.jsonl", 5 * 16)):
        lines = (uninterrupted / name).read_text().splitlines(keepends=True)
        (out / name).write_text("".join(lines[:kept]))
    return out


def test_without_a_checkpoint_the_run_starts_over(base: Path, uninterrupted: Path, stopped: Path) -> None:
    done = grpo(*zero(base, stopped, "--resume"))
    assert done.status == 0 and "there is no checkpoint yet: the run begins again from step 0" in done.out
    assert_same_run(stopped, uninterrupted)


def test_resuming_a_finished_run_changes_nothing(base: Path, uninterrupted: Path) -> None:
    names = ("metrics.jsonl", "groups.jsonl", "config.json", "model/model.safetensors")
    before = [(uninterrupted / name).read_bytes() for name in names]
    assert grpo(*zero(base, uninterrupted, "--resume")).status == 0
    assert [(uninterrupted / name).read_bytes() for name in names] == before


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (("--trainer.steps", 9), "trainer.steps"),
        (("--learner.lr", 1e-3, "--trainer.seed", 1), "trainer.seed, learner.lr"),
        (("--num-prompts", 90), "num_prompts"),
    ],
)
def test_a_changed_field_is_refused_by_its_name(
    base: Path, uninterrupted: Path, flags: tuple[object, ...], changed: str
) -> None:
    message = grpo(*zero(base, uninterrupted, "--resume", *flags)).one_line_error()
    assert message == (
        f"{uninterrupted} was started with another {changed}; "
        f"resume it with the configuration in {uninterrupted / 'config.json'}"
    )


def test_a_run_resumes_from_its_own_config_file(uninterrupted: Path) -> None:
    done = grpo("zero", "--config", uninterrupted / "config.json", "--resume")
    assert done.status == 0, done.err


def test_a_run_that_was_moved_is_still_the_same_run(base: Path, uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "moved")
    done = grpo(*zero(base, tmp_path / "moved", "--resume"))
    assert done.status == 0, done.err


def test_a_damaged_checkpoint_is_passed_over_aloud_and_all_damaged_is_refused(
    base: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    older, newest = sorted((out / "checkpoints").iterdir())
    (newest / "learner/__0_0.distcp").write_bytes(b"")
    done = grpo(*zero(base, out, "--resume"))
    assert done.status == 0 and "damaged checkpoints: step_000008: learner/__0_0.distcp has 0 bytes" in done.out
    assert f"Going back to {older.name}" in done.out
    assert_same_run(out, uninterrupted)
    for folder in (out / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    message = grpo(*zero(base, out, "--resume")).one_line_error()
    assert message.startswith(f"all checkpoints in {out / 'checkpoints'} are damaged (step_000008: manifest.json is")
    assert_same_run(out, uninterrupted)


def test_nothing_to_resume(base: Path, tmp_path: Path) -> None:
    message = grpo(*zero(base, tmp_path / "run", "--resume")).one_line_error()
    assert message == f"{tmp_path / 'run'} holds no run to resume (no config.json); start it without --resume"
    assert not (tmp_path / "run").exists()
