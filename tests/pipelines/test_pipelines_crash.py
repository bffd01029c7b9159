"""A run killed at 20 random instants, and resumed after each, ends as one that was never disturbed.

The instants are drawn from a seed. Half of them are moments of the clock behind a step that was just logged, so they
fall into sampling, learning, syncing and saving alike; the other half are single operations on files of checkpoints
(making, renaming, removing), so that every part of a save is hit. Compared to the bit: every metric but the clock's,
logged completions, training samples, the final model.

Processes are forked from a server that has imported everything once; a fresh start would cost seconds for each.
"""

import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from grpo.metrics import read_metrics
from pipelines import cli
from tests.pipelines.conftest import LOCAL
from tests.pipelines.test_pipelines_resume import without_time

STEPS, NUM_KILLS, LIMIT_S = 40, 20, 120
FILE_OPERATIONS = frozenset(("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"))
FLAGS = (
    *LOCAL, "--num-prompts", 60, "--num-threads", 1, "--trainer.steps", STEPS, "--trainer.save-every", 2,
    "--trainer.prompts-per-step", 4, "--trainer.completions-per-prompt", 4, "--trainer.max-tokens", 16,
    "--trainer.minibatches", 2, "--trainer.log-groups-every", 1, "--trainer.dump-samples-every", 1,
    "--trainer.rollout.max-oversampling", 2, "--learner.lr-decay", "cosine", "--learner.warmup-steps", 3,
    "--learner.objective.kl-coef", 0.05,
    "--learner.skip-norm", 50, "--engine.max-model-len", 64, "--trainer.keep-checkpoints", 2,
)  # fmt: skip


def run_zero(arguments: list[str], fatal: int) -> None:
    """Runs `grpo` and, before its `fatal`-th operation on a file of a checkpoint, kills itself; 0 never does."""
    operations = itertools.count(1)

    def watch(event: str, details: tuple[object, ...]) -> None:
        if event in FILE_OPERATIONS and "step_" in str(details[0]) and next(operations) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    if fatal:
        sys.addaudithook(watch)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    sys.exit(cli.main(arguments))


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads cannot be forked safely
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.zero", "rollout.native_engine", __name__])
    yield context
    os.environ.pop("OMP_NUM_THREADS")
    if before is not None:
        os.environ["OMP_NUM_THREADS"] = before


def start(server: ForkServerContext, base: Path, out: Path, *more: str, fatal: int = 0) -> ForkServerProcess:
    arguments = ["zero", "ledger", "--model", base, "--out", out, *FLAGS, *more]
    process = server.Process(target=run_zero, args=(list(map(str, arguments)), fatal), daemon=True)
    process.start()
    return process


def finish(process: ForkServerProcess) -> int | None:
    process.join(LIMIT_S)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def num_logged(out: Path) -> int:
    return (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0


def kill_by_the_clock(process: ForkServerProcess, out: Path, num_rows: int, delay_s: float) -> None:
    """SIGKILL a moment after the run has logged so many steps since it was started."""
    path, wanted = out / "metrics.jsonl", None
    before = path.stat().st_ino if path.exists() else None
    deadline = time.monotonic() + LIMIT_S
    while wanted is None or num_logged(out) < wanted:
        assert process.is_alive() and time.monotonic() < deadline
        if wanted is None and path.exists() and path.stat().st_ino != before:  # another file: rows were dropped
            wanted = num_logged(out) + num_rows
        time.sleep(0.001)
    time.sleep(delay_s)
    process.kill()


@pytest.mark.slow
def test_killed_at_20_instants_it_ends_the_same(server: ForkServerContext, base: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(server, base, whole)) == 0
    rows = read_metrics(whole)
    step_s = sum(row["seconds/rollout"] + row["seconds/learn"] + row["seconds/sync"] for row in rows) / STEPS
    rng = random.Random(0)
    half_written = 0
    for kill in range(NUM_KILLS):
        resume = ["--resume"] if (out / "config.json").exists() else []
        left = STEPS - num_logged(out)
        if kill % 2:
            process = start(server, base, out, *resume, fatal=rng.randint(1, 40))
        else:
            process = start(server, base, out, *resume)
            kill_by_the_clock(process, out, rng.randint(0, 3) if left > 8 else 0, rng.uniform(0, 1.5 * step_s))
        assert finish(process) == -signal.SIGKILL, f"kill {kill}: it ended by itself"
        half_written += any((out / "checkpoints").glob(".step_*"))
    assert half_written >= 2, "some kills must fall into a save"
    assert finish(start(server, base, out, "--resume")) == 0

    expected = without_time(rows)
    assert [row["step"] for row in expected] == list(range(STEPS)) and any(r["groups/replaced"] for r in expected)
    assert without_time(read_metrics(out)) == expected
    files = [path.relative_to(whole) for folder in ("model", "samples") for path in (whole / folder).iterdir()]
    assert len(files) > STEPS
    for name in [*files, Path("groups.jsonl")]:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == [f"step_{step:06d}" for step in (STEPS - 2, STEPS)]
