"""A learner's state on disk: in pieces, each rank its own, to be read by any number of ranks; and the policy as others
read it.

All functions are collective: every rank of the mesh calls them, and rank 0's folder counts.
"""

import contextlib
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from models import CausalLM, hf_tensors
from models.auto import write_checkpoint
from models.lora import has_adapters
from models.parallel import Alone, whole
from models.shards import refuse

dcp: Any = torch.distributed.checkpoint  # its stubs leave out what is used here
_MODEL = "model"


def save(model: CausalLM, state: dict[str, Any], folder: Path, mesh: Alone) -> None:
    """Writes the weights, in their own dtype, and `state` into an existing folder that every rank sees. Raises what
    failed on one of the ranks, OSError with ENOSPC if the disk is full."""
    with _plain_errors():
        dcp.save({_MODEL: _weights(model), **state}, checkpoint_id=mesh.broadcast(folder))


def load(model: CausalLM, state: dict[str, Any], folder: Path, mesh: Alone) -> None:
    """Reads what `save` wrote into the model and into `state`, whose tensors say how they are sharded now. Raises
    ValueError if the weights are not exactly the model's."""
    weights, folder = _weights(model), mesh.broadcast(folder)
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    shapes = {name.removeprefix(f"{_MODEL}."): x.size for name, x in stored.items() if name.startswith(f"{_MODEL}.")}
    problems = [f"unexpected {name}" for name in shapes if name not in weights]
    problems += [f"missing {name}" for name in weights if name not in shapes]
    problems += [
        f"{name} has shape {list(shapes[name])}, the model has {list(weight.shape)}"
        for name, weight in weights.items()
        if shapes.get(name, weight.shape) != weight.shape
    ]
    refuse(problems, str(folder), "tensors do not fit the model")
    saved = {_MODEL: weights, **state}
    with _plain_errors():
        dcp.load(saved, checkpoint_id=folder)
    module_of(model).load_state_dict(weights, strict=not has_adapters(model))
    state.update({name: saved[name] for name in state})


def _weights(model: CausalLM) -> dict[str, Any]:
    """Of a model with adapters these alone: what is frozen under them stays where it came from."""
    tensors = module_of(model).state_dict()
    return {name: t for name, t in tensors.items() if ".lora_" in name} if has_adapters(model) else tensors


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """The error of a rank in place of torch's collection of them, which is no OSError when a disk is full."""
    with warnings.catch_warnings(action="ignore"):  # of a job without process group, which is meant
        try:
            yield
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            raise first from error


def write_policy(model: CausalLM, folder: Path, mesh: Alone) -> None:
    """Writes a Hugging Face checkpoint into an existing folder; rank 0 does, the others help to gather."""
    if mesh.rank == 0:
        write_checkpoint(model, folder, whole)
    else:
        deque(hf_tensors(model, whole), maxlen=0)


def module_of(model: CausalLM) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model
