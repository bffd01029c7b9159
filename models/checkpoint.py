"""Hugging Face checkpoints of DeepseekV3ForCausalLM, in and out: `config.json` and `model.safetensors`.

On disk every routed expert has its own gate, up and down matrix; in memory a layer's experts are stacked. That is the
only difference between the two sets of names. Loading is strict: each missing, unexpected or misshapen tensor is named.

    save_pretrained(model, "out_dir")
    model = load_pretrained("out_dir", dtype=torch.float32)
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.config import DeepseekV3Config
from models.transformer import DeepseekV3ForCausalLM

_INDEX_NAME = "model.safetensors.index.json"


def hf_tensors(model: DeepseekV3ForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its checkpoint name, layer by layer, detached views of the parameters; experts are split."""
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix(".gate_up_proj")
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2, dim=0)
                yield f"{prefix}.{expert}.gate_proj.weight", gate
                yield f"{prefix}.{expert}.up_proj.weight", up
        elif name.endswith("mlp.experts.down_proj"):
            prefix = name.removesuffix(".down_proj")
            for expert, down in enumerate(tensor):
                yield f"{prefix}.{expert}.down_proj.weight", down
        else:
            yield name, tensor


@torch.no_grad()
def load_hf_tensors(model: DeepseekV3ForCausalLM, tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Copies checkpoint tensors into the model, in the model's dtypes.

    Raises ValueError naming every tensor that is missing, unexpected, given twice or of another shape; what was right
    has been copied by then, so a model that raised must not be used.
    """
    targets = dict(hf_tensors(model))  # views: copying into them fills the stacked parameters
    problems, seen = [], set()
    for name, tensor in tensors:
        if name not in targets:
            problems.append(f"unexpected {name}")
        elif name in seen:
            problems.append(f"given twice {name}")
        elif targets[name].shape != tensor.shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, the config needs {list(targets[name].shape)}")
        else:
            targets[name].copy_(tensor)
        seen.add(name)
    problems += [f"missing {name}" for name in targets if name not in seen]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source}: {len(problems)} tensors do not fit the model: {shown}")


@contextmanager
def replace_folder(folder: str | Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder` and puts it in its place when the block ends without an error.

    A crash at any moment leaves either the old folder or the new one whole, never a mixture.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    for path in [*fresh.rglob("*"), fresh]:
        _flush_to_disk(path)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    _flush_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(model: DeepseekV3ForCausalLM, folder: Path) -> None:
    """Writes `config.json` and `model.safetensors` into an existing folder."""
    config = model.config.to_dict() | {"dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in hf_tensors(model)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_pretrained(model: DeepseekV3ForCausalLM, folder: str | Path) -> None:
    """Writes a checkpoint that transformers and vLLM load; an existing folder is replaced whole, or not at all."""
    with replace_folder(folder) as fresh:
        write_checkpoint(model, fresh)


def load_pretrained(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DeepseekV3ForCausalLM:
    """Builds the model of `config.json` and fills it from safetensors; the router's bias stays float32.

    Raises FileNotFoundError for a missing file and ValueError for tensors that do not fit, naming them.
    """
    folder = Path(folder)
    config = DeepseekV3Config.load(folder)
    model = DeepseekV3ForCausalLM(config).to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    load_hf_tensors(model, read_tensors(folder), source=str(folder))
    return model


def tensor_shapes(folder: str | Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor on disk, read from the file headers alone."""
    shapes = {}
    for path in _tensor_files(Path(folder)):
        with safe_open(path, framework="pt") as shard:
            shapes |= {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118
    return shapes


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors on disk, one at a time."""
    for path in _tensor_files(folder):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (safe_open is not a mapping)
                yield name, shard.get_tensor(name)


def _tensor_files(folder: Path) -> list[Path]:
    """The files of a single-file or sharded checkpoint. Raises FileNotFoundError naming the one that is absent."""
    index, single = folder / _INDEX_NAME, folder / "model.safetensors"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    elif single.is_file():
        files = [single]
    else:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor {_INDEX_NAME}")
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is named by {_INDEX_NAME} but does not exist")
    return files
