"""`grpo zero` with a learner of several ranks.

Pinned: (1) two ranks in Ray actors, with divided experts, log what one process logs, and (2) their run is gone on with
by one process, whose model is the same; (3) two ranks that a launcher started do so, too; (4) numbers that do not fit
are refused.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.metrics import read_metrics
from models import from_pretrained
from tests.pipelines.conftest import LOCAL, ROOT, grpo
from tests.ranks import free_port

FLAGS = (
    *LOCAL, "--num-prompts", 100, "--trainer.steps", 2, "--trainer.prompts-per-step", 8, "--trainer.minibatches", 2,
    "--trainer.completions-per-prompt", 4, "--learner.objective.kl-coef", 0.05, "--learner.lr", 1e-3,
)  # fmt: skip


def zero(base: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("zero", "ledger", "--model", base, "--out", out, *FLAGS, *more)


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    done = grpo(*zero(base, out))
    assert done.status == 0, done.err
    return out


def assert_same_run(found: Path, wanted: Path) -> None:
    """Every metric, but times and those that are rounding themselves."""
    rows, expected = read_metrics(found), read_metrics(wanted)
    assert len(rows) == len(expected) == 2
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        kept = {name for name in other if not name.startswith(("seconds/", "speed/", "memory/"))}
        assert {name: row[name] for name in kept} == pytest.approx(
            {name: other[name] for name in kept}, rel=1e-3, abs=1e-5
        )
        assert row["sync/probe_difference"] < 1e-4
    assert_same_model(found, wanted)


def assert_same_model(found: Path, wanted: Path) -> None:
    tensors = from_pretrained(wanted / "model").state_dict()
    for name, tensor in from_pretrained(found / "model").state_dict().items():
        assert (tensor - tensors[name]).norm() <= 1e-3 * tensors[name].norm(), name


@pytest.mark.slow
def test_ranks_in_ray_actors(base: Path, one: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = grpo(*zero(base, out, "--mesh.ranks", 2, "--mesh.expert-ranks", 2))
    assert done.status == 0, done.err
    assert "WORLD_SIZE" not in os.environ, "what starts next is of no job"
    assert_same_run(out, one)
    (out / "model").rename(out / "before")
    resumed = grpo(*zero(base, out, "--resume"))
    assert resumed.status == 0, resumed.err
    assert_same_run(out, one)


@pytest.mark.slow
def test_ranks_of_a_launcher(base: Path, one: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    out = tmp_path / "run"
    job = environment | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "pipelines.cli", *map(str, zero(base, out, "--mesh.ranks", 2))]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=job | {"RANK": str(rank)}, stderr=subprocess.PIPE) for rank in (0, 1)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert_same_run(out, one)


def test_wrong_numbers_of_ranks(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = grpo(*zero(base, tmp_path / "run", "--mesh.ranks", 3, "--mesh.expert-ranks", 2))
    assert "ranks=3 must be a multiple of replicas=1 x expert_ranks=2" in bad.one_line_error()
    monkeypatch.setenv("WORLD_SIZE", "2")
    bad = grpo(*zero(base, tmp_path / "run", "--mesh.ranks", 4))
    assert "ranks=4, but 2 processes were started" in bad.one_line_error()
