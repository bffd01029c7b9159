"""Pins the presets: each is known by name, written down in docs/grpo.md, and learns."""

from pathlib import Path
from typing import get_args

import pytest

from grpo.batch import Aggregation
from grpo.learner import Learner
from grpo.learner_config import LearnerConfig
from grpo.losses import KLEstimator, PolicyLoss
from grpo.metrics import read_metrics
from grpo.presets import PRESETS, preset
from models import load_pretrained
from tests.grpo.test_grpo_trainer import make_trainer, policy

__all__ = ["policy"]


@pytest.mark.parametrize("name", PRESETS)
def test_it_learns(name: str, policy: Path, tmp_path: Path) -> None:
    """Two optimizer steps per batch, so that ratios leave 1; the share of even tokens goes from a half to nearly 1."""
    algorithm = preset(name, max_tokens=6)
    config = LearnerConfig(lr=1e-2, token_budget=400, objective=algorithm.objective, correction=algorithm.correction)
    trainer = make_trainer(
        policy, tmp_path, learner=Learner(load_pretrained(policy), config, total_steps=40), steps=16,
        prompts_per_step=6, completions_per_prompt=8, minibatches=2, advantages=algorithm.advantages,
    )  # fmt: skip
    trainer.run()
    rewards = [row["reward/mean"] for row in read_metrics(tmp_path)]
    assert sum(rewards[:2]) / 2 < 0.7 and sum(rewards[-3:]) / 3 > 0.85


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="there is no preset 'ppo'; known: grpo, r1, dr_grpo, dapo"):
        preset("ppo", max_tokens=1)


def test_the_page_has_every_name() -> None:
    page = (Path(__file__).parents[2] / "docs/grpo.md").read_text()
    names = [*PRESETS, *get_args(PolicyLoss), *get_args(Aggregation), *get_args(KLEstimator)]
    assert not [name for name in names if f"`{name}`" not in page]
