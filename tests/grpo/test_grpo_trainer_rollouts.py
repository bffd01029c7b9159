"""Pins the training loop with rollouts that are replaced, left unfinished, overlapped, interrupted or disturbed.

1. With each way of sampling the run goes through, with Ray engines too; tokens are no older than allowed.
2. Ctrl-C finishes the step and saves it; the resumed run ends as one that was not interrupted.
3. kill -9 of a reward worker in the middle of a step: the same samples and rewards.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.checkpoint import checkpoints
from grpo.metrics import read_metrics
from grpo.rollouts import RolloutConfig
from rewards import load_rubric
from rollout.engine import EngineConfig
from rollout.ray_pool import RayPool
from tests.grpo.test_grpo_trainer import make_learner, make_trainer, policy, repeatable, weights

__all__ = ["policy"]


@pytest.mark.parametrize(
    "config",
    [
        RolloutConfig(max_oversampling=2),
        RolloutConfig(partial_share=0.7, max_policy_lag=2),
        RolloutConfig(overlap=True, max_policy_lag=1),
        RolloutConfig(max_oversampling=1.5, partial_share=0.4, overlap=True, max_policy_lag=2),
    ],
    ids=["dynamic", "partial", "overlap", "all"],
)
def test_ways_of_sampling(policy: Path, tmp_path: Path, config: RolloutConfig) -> None:
    lags: list[int] = []
    learner = make_learner(policy)
    update = learner.update

    def watched_update(samples: Any) -> dict[str, float]:
        lags.extend(lag for sample in samples for lag in sample.policy_lags)
        return update(samples)

    learner.update = watched_update  # type: ignore[method-assign]
    trainer = make_trainer(policy, tmp_path, learner=learner, steps=8, rollout=config)
    assert trainer.run() == 8
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(8))
    assert min(lags) == 0 and max(lags) <= config.max_policy_lag
    if config.overlap:
        assert max(lags) == config.max_policy_lag or config.partial_share
    if config.max_oversampling == 1:
        assert all(row["groups/replaced"] == 0 for row in rows)
    assert all(row["sync/probe_difference"] < 1e-3 for row in rows)


@pytest.mark.slow
def test_overlap_with_ray_engines(policy: Path, tmp_path: Path) -> None:
    """Two engines sample step 1 while the learner is at step 0, one is killed meanwhile, and the run goes through."""
    config = EngineConfig(kind="native", num_engines=2, max_model_len=32, placement="separate")
    pool = RayPool(config, str(policy))
    killed: list[int] = []

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if step == 1:
            killed.append(pool.engines[1].address.pid)
            os.kill(killed[0], signal.SIGKILL)

    try:
        trainer = make_trainer(
            policy, tmp_path, pool=pool, steps=6, on_step=on_step, rollout=RolloutConfig(overlap=True, max_policy_lag=1)
        )
        assert trainer.run() == 6
    finally:
        pool.close()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(6)) and rows[-1]["engine/restarts"] == 1
    assert all(row["sync/probe_difference"] < 1e-3 for row in rows)


def test_ctrl_c_finishes_the_step_and_saves(policy: Path, tmp_path: Path) -> None:
    told: list[str] = []
    before = signal.getsignal(signal.SIGINT)

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    interrupted = make_trainer(policy, tmp_path / "cut", on_step=on_step, tell=told.append, save_every=50)
    assert interrupted.run() == 3
    assert told == ["stopping: this step is finished and saved; once more to stop at once"]
    assert signal.getsignal(signal.SIGINT) is before
    assert [folder.name for folder in checkpoints(tmp_path / "cut")] == ["step_000003"]
    resumed = make_trainer(policy, tmp_path / "cut", save_every=50)
    assert resumed.run() == 6
    whole = make_trainer(policy, tmp_path / "whole", save_every=50)
    whole.run()
    assert repeatable(tmp_path / "cut") == repeatable(tmp_path / "whole")
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


SLOW_REWARD = """
import os, time
from pathlib import Path
from rewards import reward

FOLDER = Path({folder!r})

@reward(timeout_s=60)
def slow_even_share(sample):
    (FOLDER / str(os.getpid())).touch()
    while (FOLDER / "hold").exists():
        time.sleep(0.01)
    return sum(token % 2 == 0 for token in sample.completion_ids) / len(sample.completion_ids)
"""
"""`even_share` in a worker process; says who it is, and takes its time while there is a file `hold`."""


def test_a_killed_reward_worker_loses_no_sample(policy: Path, tmp_path: Path) -> None:
    watch = tmp_path / "watch"
    watch.mkdir()
    (tmp_path / "slow.py").write_text(SLOW_REWARD.format(folder=str(watch)))
    (slow_even_share,) = load_rubric([f"{tmp_path}/slow.py:slow_even_share"]).rewards
    undisturbed = make_trainer(policy, tmp_path / "undisturbed", steps=2)
    undisturbed.run()
    (watch / "hold").touch()

    def kill() -> int:
        deadline = time.monotonic() + 60
        while not (workers := [path.name for path in watch.iterdir() if path.name.isdigit()]):
            assert time.monotonic() < deadline, "no worker has begun"
            time.sleep(0.01)
        os.kill(int(workers[0]), signal.SIGKILL)
        (watch / "hold").unlink()
        return int(workers[0])

    with ThreadPoolExecutor(1) as thread:
        killing = thread.submit(kill)
        make_trainer(policy, tmp_path / "disturbed", steps=2, reward=slow_even_share).run()
        assert str(killing.result()) in {path.name for path in watch.iterdir()}

    def comparable(folder: Path) -> list[dict[str, float]]:
        names = ("reward/mean", "reward/errors", "samples/unscored", "samples/failed", "policy/grad_norm")
        return [{name: row[name] for name in names} for row in repeatable(folder)]

    assert comparable(tmp_path / "disturbed") == comparable(tmp_path / "undisturbed")
