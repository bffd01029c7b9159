"""Training checkpoints: everything an exact continuation needs, in `checkpoints/step_N/` of a run.

The policy is an ordinary Hugging Face folder inside it (merged, with `adapter/` in it, where adapters are trained);
optimizer and counters lie beside it. A checkpoint appears
whole or not at all, and the newest one replaces the older ones.

    save_checkpoint(run_dir, learner, step=40, rollouts=rollouts.state.to_plain())
    step, rollouts = load_checkpoint(run_dir, learner)
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from grpo.learner import Learner
from models.auto import restore_checkpoint, write_checkpoint
from models.checkpoint import replace_folder

_POLICY, _STATE = "policy", "learner.pt"


def save_checkpoint(run_dir: Path, learner: Learner, step: int, rollouts: dict[str, Any]) -> Path:
    """Writes the state after `step` finished steps, then removes older checkpoints. `rollouts` says where sampling
    stands, see `grpo.rollouts.RolloutState.to_plain`."""
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    with replace_folder(folder) as fresh:
        (fresh / _POLICY).mkdir()
        write_checkpoint(learner.model, fresh / _POLICY)
        state = {"trainer_step": step, "learner": learner.state_dict(), "rollouts": rollouts}
        torch.save(state, fresh / _STATE)
    for other in folder.parent.glob("step_*"):
        if other != folder:
            shutil.rmtree(other)
    return folder


def latest_checkpoint(run_dir: Path) -> Path | None:
    return max((run_dir / "checkpoints").glob("step_*"), default=None)


def load_checkpoint(run_dir: Path, learner: Learner) -> tuple[int, dict[str, Any] | None]:
    """Puts the newest checkpoint into the learner; the number of steps it has finished and where sampling stands, or 0
    and None without a checkpoint."""
    folder = latest_checkpoint(run_dir)
    if folder is None:
        return 0, None
    restore_checkpoint(learner.model, folder / _POLICY)
    state = torch.load(folder / _STATE, weights_only=True)
    learner.load_state_dict(state["learner"])
    return state["trainer_step"], state["rollouts"]
