"""A learner's state on disk: in pieces, each rank its own, to be read by any number of ranks; and the policy as others
read it.

All functions are collective: every rank of the mesh calls them, and rank 0's folder counts.
"""

import warnings
from collections import deque
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint
from torch import nn

from models import CausalLM, hf_tensors
from models.auto import write_checkpoint
from models.parallel import Alone, whole

dcp: Any = torch.distributed.checkpoint  # its stubs leave out what is used here


def save(model: CausalLM, state: dict[str, Any], folder: Path, mesh: Alone) -> None:
    """Writes the weights, in their own dtype, and `state` into an existing folder that every rank sees."""
    with warnings.catch_warnings(action="ignore"):  # of a job without process group, which is meant
        dcp.save({"model": module_of(model).state_dict(), **state}, checkpoint_id=mesh.broadcast(folder))


def load(model: CausalLM, state: dict[str, Any], folder: Path, mesh: Alone) -> None:
    """Reads what `save` wrote into the model and into `state`, whose tensors say how they are sharded now."""
    weights = module_of(model).state_dict()
    saved = {"model": weights, **state}
    with warnings.catch_warnings(action="ignore"):
        dcp.load(saved, checkpoint_id=mesh.broadcast(folder))
    module_of(model).load_state_dict(weights)
    state.update({name: saved[name] for name in state})


def write_policy(model: CausalLM, folder: Path, mesh: Alone) -> None:
    """Writes a Hugging Face checkpoint into an existing folder; rank 0 does, the others help to gather."""
    if mesh.rank == 0:
        write_checkpoint(model, folder, whole)
    else:
        deque(hf_tensors(model, whole), maxlen=0)


def module_of(model: CausalLM) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model
