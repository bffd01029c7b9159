"""Training checkpoints: everything an exact continuation needs, in `checkpoints/step_N/` of a run.

    policy/         the policy as others read it, an ordinary Hugging Face folder; adapters are merged
                    in it, and alone in its `adapter/`
    learner/        weights, optimizer, place in the schedule, past gradient norms, reference model: in pieces that any
                    number of ranks can read
    trainer.pt      finished steps, where sampling stands (data cursor, groups in flight), random number generators
    manifest.json   size and checksum of every other file, written last

A checkpoint appears whole or not at all, also when the power fails, and older ones go only after that. What was damaged
later is noticed by its manifest, and the one before it is used.

    save_checkpoint(run_dir, learner, step=40, rollouts=rollouts.state.to_plain())
    step, rollouts = load_checkpoint(run_dir, learner)
"""

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from models.checkpoint import recover_folder, replace_folder

_LOG = logging.getLogger(__name__)
_POLICY, _LEARNER, _TRAINER, _MANIFEST = "policy", "learner", "trainer.pt", "manifest.json"


class Saved(Protocol):
    """What is kept of whoever trains: a `Learner`, a `LearnerGroup`, or another with these four."""

    @property
    def device(self) -> torch.device: ...

    def write_policy(self, folder: Path) -> None: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def save_checkpoint(run_dir: Path, learner: Saved, step: int, rollouts: dict[str, Any], keep: int = 2) -> Path:
    """Writes the state after `step` finished steps, then removes all but the last `keep` checkpoints. `rollouts` says
    where sampling stands, see `grpo.rollouts.RolloutState.to_plain`. Raises OSError with ENOSPC if the disk is full.
    """
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    with replace_folder(folder) as fresh:
        for name in (_POLICY, _LEARNER):
            (fresh / name).mkdir()
        learner.write_policy(fresh / _POLICY)
        learner.save(fresh / _LEARNER)
        _write(fresh / _TRAINER, {"step": step, "rollouts": rollouts, "random": random_states(learner.device)})
        _write_manifest(fresh)
    # Later steps than this one are of before a fallback, and damaged.
    kept = [other for other in checkpoints(run_dir) if _step_of(other) <= step][-keep:]
    for other in set(checkpoints(run_dir)) - set(kept):
        shutil.rmtree(other)
    return folder


def checkpoints(run_dir: Path) -> list[Path]:
    """All of them, damaged ones too, the newest last."""
    return sorted((run_dir / "checkpoints").glob("step_*"), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def load_checkpoint(
    run_dir: Path,
    learner: Saved,
    tell: Callable[[str], None] = _LOG.warning,
    last: int | None = None,
) -> tuple[int, dict[str, Any] | None]:
    """Puts the newest whole checkpoint, of step `last` at most, into the learner; the number of steps it has finished
    and where sampling stands, or 0 and None if none was ever written.

    Half-written folders are removed. `tell` hears of damaged checkpoints; ValueError if all of them are.
    """
    for leftover in (run_dir / "checkpoints").glob(".step_*"):
        recover_folder(leftover.with_name(leftover.stem[1:]))
    damages = []
    for folder in reversed(checkpoints(run_dir)):
        if last is not None and _step_of(folder) > last:
            continue
        damage = find_damage(folder)
        if damage is None:
            if damages:
                tell(f"damaged checkpoints: {'; '.join(damages)}. Going back to {folder.name}")
            return _load(folder, learner)
        damages.append(f"{folder.name}: {damage}")
    if damages:
        raise ValueError(
            f"all checkpoints in {run_dir / 'checkpoints'} are damaged ({'; '.join(damages)}): put a copy back, or "
            "remove the folder to begin again from step 0"
        )
    return 0, None


def _load(folder: Path, learner: Saved) -> tuple[int, dict[str, Any]]:
    learner.load(folder / _LEARNER)
    state = torch.load(folder / _TRAINER, weights_only=True)
    set_random_states(state["random"], learner.device)
    return state["step"], state["rollouts"]


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest: sizes first, then every byte. None if it is whole."""
    try:
        expected = json.loads((folder / _MANIFEST).read_bytes())
        for name, file in expected.items():
            if (size := (folder / name).stat().st_size) != file["bytes"]:
                return f"{name} has {size} bytes instead of {file['bytes']}"
        for name, file in expected.items():
            if _checksum(folder / name) != file["sha256"]:
                return f"{name} holds other bytes than were written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} or a file it names cannot be read: {error}"
    return None


def _write(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:  # torch's own writer would not say that the disk is full
        torch.save(state, file)


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _checksum(path)} for path in files
    }
    (folder / _MANIFEST).write_text(json.dumps(entries, indent=2) + "\n")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def random_states(device: torch.device) -> dict[str, Any]:
    """The global generators. Sampling and the order of prompts draw from seeds of their own; a user's reward in this
    process, or dropout in an adapter, may use these.
    """
    numpy_kind, numpy_keys, *numpy_rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (numpy_kind, numpy_keys.tolist(), *numpy_rest),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """As `random_states` gave them; a generator of CUDA is left as it is if the state comes from a CPU."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
