"""Training checkpoints: everything an exact continuation needs, in `checkpoints/step_N/` of a run.

The policy is an ordinary Hugging Face folder inside it; the learner's state lies beside it, in pieces that any number
of ranks can read. A checkpoint appears whole or not at all, and the newest one replaces the older ones.

    save_checkpoint(run_dir, learner, step=40, rollouts=rollouts.state.to_plain())
    step, rollouts = load_checkpoint(run_dir, learner)
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from grpo.learner import Learner
from grpo.learner_group import LearnerGroup
from models.checkpoint import replace_folder

_POLICY, _LEARNER, _STATE = "policy", "learner", "trainer.pt"


def save_checkpoint(run_dir: Path, learner: Learner | LearnerGroup, step: int, rollouts: dict[str, Any]) -> Path:
    """Writes the state after `step` finished steps, then removes older checkpoints. `rollouts` says where sampling
    stands, see `grpo.rollouts.RolloutState.to_plain`."""
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    with replace_folder(folder) as fresh:
        for name in (_POLICY, _LEARNER):
            (fresh / name).mkdir()
        learner.write_policy(fresh / _POLICY)
        learner.save(fresh / _LEARNER)
        torch.save({"trainer_step": step, "rollouts": rollouts}, fresh / _STATE)
    for other in folder.parent.glob("step_*"):
        if other != folder:
            shutil.rmtree(other)
    return folder


def latest_checkpoint(run_dir: Path) -> Path | None:
    return max((run_dir / "checkpoints").glob("step_*"), default=None)


def load_checkpoint(run_dir: Path, learner: Learner | LearnerGroup) -> tuple[int, dict[str, Any] | None]:
    """Puts the newest checkpoint into the learner; the number of steps it has finished and where sampling stands, or 0
    and None without a checkpoint."""
    folder = latest_checkpoint(run_dir)
    if folder is None:
        return 0, None
    learner.load(folder / _LEARNER)
    state = torch.load(folder / _STATE, weights_only=True)
    return state["trainer_step"], state["rollouts"]
