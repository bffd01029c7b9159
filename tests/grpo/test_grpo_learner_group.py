"""Pins the learners of several ranks driven as one from rank 0: the same answers as one learner gives, a caller that
stops in the middle of the weights, and a rank that fails, which must end the job with its reason and never hang it.
"""

import functools
import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from grpo.batch import TrainingSample
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.learner_group import LearnerGroup, serve
from grpo.ray_learner import started_ranks
from models import build_model, find_config, from_pretrained
from models.parallel import MeshConfig, join, leave
from tests.ranks import run_ranks

CONFIG = LearnerConfig(lr=1e-3, token_budget=40)
SAMPLES = [
    TrainingSample(
        token_ids=list(range(length)),
        loss_mask=[False] + [True] * (length - 1),
        sampling_logprobs=[0.0] + [-4.0] * (length - 1),
        advantage=1.0 if length % 2 else -1.0,
    )
    for length in (5, 12, 30, 9)
]


def make_learner(config: MeshConfig) -> Learner:
    model = build_model(find_config("tiny").with_vocabulary(64, bos=None, eos=1, pad=0), seed=0)
    return Learner(model, CONFIG, 9, join(config, torch.device("cpu")))


def drive(learner: Learner | LearnerGroup, folder: Path) -> dict[str, Any]:
    first = learner.update(SAMPLES)
    for _ in learner.named_weights():
        break  # an engine that died, say
    learner.save(folder)
    learner.update(SAMPLES)
    learner.load(folder)
    scores = learner.score([[1, 2, 3], [4, 5]])
    policy = folder.with_name(f"{folder.name}_policy")
    policy.mkdir()
    learner.write_policy(policy)
    weights = {name: tensor.clone() for name, tensor in learner.named_weights()}
    return {"report": first, "scores": scores, "weights": weights}


def job(folder: Path) -> dict[str, Any] | None:
    learner = make_learner(MeshConfig(ranks=2, expert_ranks=2))
    if learner.mesh.rank:
        return serve(learner)
    group = LearnerGroup(learner)
    answers = drive(group, folder)
    group.close()
    return answers


def failing_job() -> str:
    learner = make_learner(MeshConfig(ranks=2))
    if learner.mesh.rank:
        learner.score = _fail  # type: ignore[method-assign]
        with pytest.raises(ArithmeticError) as failure:
            serve(learner)
    else:
        with pytest.raises(RuntimeError) as failure:
            LearnerGroup(learner).score([[1, 2, 3]])
    leave()  # closes the connections, as the end of the process does
    return str(failure.value)


def _fail(sequences: object) -> list[list[float]]:
    raise ArithmeticError("a cosmic ray")


@pytest.mark.slow
def test_a_group_answers_as_one_learner(tmp_path: Path) -> None:
    answers, nothing = run_ranks(job, 2, tmp_path, tmp_path / "group")
    assert nothing is None
    alone = drive(make_learner(MeshConfig()), tmp_path / "alone")
    assert answers["report"] == pytest.approx(alone["report"], rel=1e-4, abs=1e-6)
    for one, other in zip(answers["scores"], alone["scores"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    written = dict(from_pretrained(tmp_path / "group_policy").state_dict())
    loaded = dict(from_pretrained(tmp_path / "alone_policy").state_dict())
    assert list(answers["weights"]) == list(alone["weights"])
    for name, weight in alone["weights"].items():
        assert (answers["weights"][name] - weight).norm() <= 1e-4 * weight.norm(), name
    for name, weight in loaded.items():
        assert (written[name] - weight).norm() <= 1e-4 * weight.norm(), name


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job(tmp_path: Path) -> None:
    told, _ = run_ranks(failing_job, 2, tmp_path)
    assert "score failed on rank 1 of the learner" in told and "a cosmic ray" in told


def _rank_of_ray(failing: Path) -> None:
    failing.touch()
    raise ArithmeticError("a cosmic ray")


@pytest.mark.slow
def test_a_ray_actor_that_fails_gives_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = tmp_path / "failing"
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that they are put back
    with (
        pytest.raises(ArithmeticError, match="a cosmic ray"),
        started_ranks(2, functools.partial(_rank_of_ray, failing), num_threads=1),
    ):
        assert os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] == "2"
        deadline = time.monotonic() + 100
        while not failing.exists():  # an actor may take long to start; a closed connection comes after it has failed
            assert time.monotonic() < deadline
            time.sleep(0.1)
        raise RuntimeError("connection closed")
    assert not ray.is_initialized()
