"""Holds docs/metrics.md against what runs log: every name is on the page, and every name on the page is logged.

In the page's names NAME, METRIC and N stand for anything.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo.corrections import CorrectionConfig
from grpo.metrics import read_metrics
from grpo.objective import ObjectiveConfig
from grpo.rollouts import RolloutConfig
from rewards import Sample, Score, reward
from rollout.environment_pool import EnvironmentPool
from rollout.ray_pool import RayPool
from tests.grpo.test_grpo_trainer import make_learner, make_trainer, policy

__all__ = ["policy"]

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
PLACEHOLDERS = {"NAME": "[a-z_0-9]+", "METRIC": "[a-z_0-9]+", "N": "[0-9]+"}


def names_on_page() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)


def matches(entry: str, name: str) -> bool:
    pattern = "".join(
        PLACEHOLDERS.get(part, re.escape(part)) for part in re.split(r"\b(NAME|METRIC|N)\b|(?<=_)(N)$", entry) if part
    )
    return re.fullmatch(pattern, name) is not None


@reward
def even_share_and_length(sample: Sample) -> Score:
    share = sum(token % 2 == 0 for token in sample.completion_ids) / len(sample.completion_ids)
    return Score(value=share, metrics={"length": len(sample.completion_ids)})


@pytest.fixture(scope="module")
def logged(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """By a run with all that brings metrics of its own, and by pools that no such run has."""
    run_dir = tmp_path_factory.mktemp("run")
    correction = CorrectionConfig(kind="token_tis", old_logprobs="learner")
    objective = ObjectiveConfig(kl_coef=0.1, entropy_top_share=0.9)
    learner = make_learner(policy, lr=1e-2, objective=objective, correction=correction)
    rollout = RolloutConfig(overlap=True, max_policy_lag=1)
    make_trainer(policy, run_dir, learner=learner, reward=even_share_and_length, minibatches=2, rollout=rollout).run()
    names = {name for row in read_metrics(run_dir) for name in row} - {"step"}
    ray = SimpleNamespace(_restarts=0, _reissued=0)
    turns = SimpleNamespace(pool=SimpleNamespace(counters={}), num_steps=0, num_failed=0, num_timeouts=0)
    return names | set(RayPool.counters.fget(ray)) | set(EnvironmentPool.counters.fget(turns))  # type: ignore[misc]


def test_every_logged_name_is_on_the_page(logged: set[str]) -> None:
    page = names_on_page()
    assert len(page) == len(set(page)) > 40
    missing = sorted(name for name in logged if not any(matches(entry, name) for entry in page))
    assert not missing, f"say in docs/metrics.md what these are: {missing}"


def test_every_name_on_the_page_is_logged(logged: set[str]) -> None:
    page = names_on_page()
    general = logged - set(page)  # what an entry with a placeholder must be there for
    gone = [entry for entry in page if entry not in logged and not any(matches(entry, name) for name in general)]
    assert not gone, f"no run logs these entries of docs/metrics.md: {gone}"
