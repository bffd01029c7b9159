"""Hugging Face checkpoints of DeepseekV3ForCausalLM, in and out: `config.json` and safetensors, sharded when large.

On disk every routed expert has its own gate, up and down matrix; in memory a layer's experts are stacked. A tied head
is absent on disk; prediction modules carry copies of embedding and head there. Everything streams: beside the model,
saving holds one shard at most and loading one tensor. Loading is strict: each tensor that is missing, unexpected,
misshapen or given twice is named, before memory is taken for the model.

    save_pretrained(model, "out_dir")
    model = load_pretrained("out_dir", dtype=torch.bfloat16)
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.allocate import allocate, skeleton
from models.config import DeepseekV3Config, ScaleFormat
from models.fp8 import quantization_config, quantize_tensors, read_weight, weight_names
from models.lora import plain_tensors
from models.mtp import shared_copies
from models.shards import DEFAULT_SHARD_BYTES, TensorFiles, refuse, write_shards
from models.transformer import DeepseekV3ForCausalLM

_MISFIT = "tensors do not fit the model"


def hf_tensors(
    model: DeepseekV3ForCausalLM, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its checkpoint name, layer by layer, detached views of the parameters; experts are split.

    `whole` gathers a parameter that is sharded, before its experts are split. Adapters are merged, into copies.
    """
    for name, tensor in plain_tensors(model, whole):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
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
    for name, parameter in shared_copies(model):
        yield name, whole(parameter)


@torch.no_grad()
def load_hf_tensors(model: DeepseekV3ForCausalLM, tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Copies checkpoint tensors into the model, in the model's dtypes.

    Raises ValueError naming every tensor that is missing, unexpected, given twice, of another shape, or that differs
    from one it shares its memory with; what was right has been copied by then, so a model that raised must not be used.
    """
    targets = dict(hf_tensors(model))  # views: copying into them fills the stacked parameters
    problems: list[str] = []
    seen: set[str] = set()
    filled: dict[int, str] = {}  # address -> name: a prediction module's embedding and head are the main model's
    for name, tensor in tensors:
        target = targets.get(name)
        if name in seen:
            problems.append(f"given twice {name}")
        elif target is None:
            problems.append(f"unexpected {name}")
        elif target.shape != tensor.shape:
            problems.append(_misshapen(name, tuple(tensor.shape), target))
        elif not tensor.is_floating_point() or tensor.element_size() < 2:
            problems.append(f"{name} has dtype {tensor.dtype}, floats of 16 bits or more are due")
        elif (first := filled.setdefault(target.data_ptr(), name)) == name:
            target.copy_(tensor)
        elif not torch.equal(target, tensor.to(target)):
            problems.append(f"{name} differs from {first}, the model has one parameter for both")
        seen.add(name)
    problems += [f"missing {name}" for name in targets if name not in seen]
    refuse(problems, source, _MISFIT)


def _misshapen(name: str, shape: tuple[int, ...], target: Tensor) -> str:
    return f"{name} has shape {list(shape)}, the config needs {list(target.shape)}"


@contextmanager
def replace_folder(folder: str | Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder` and puts it in its place when the block ends without an error.

    After a crash at any moment the old content or the new is there whole, never a mixture. In the instant between the
    two renames it has the hidden name `.NAME.old`; the next call finds it there and puts it back first.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = recover_folder(folder)
    fresh.mkdir()
    try:
        yield fresh
        for path in [*fresh.rglob("*"), fresh]:
            flush_to_disk(path)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if is_disk_full(error):
            message = f"the disk is full: {folder} was not written, what stood there before is untouched; free space"
            raise OSError(errno.ENOSPC, message) from error
        raise
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    for names in (folder.parent, folder.parent.parent):  # the second: the first may be new itself
        flush_to_disk(names)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> tuple[Path, Path]:
    """Removes what a crash in `replace_folder` left beside `folder`, or puts it back; the two hidden names."""
    fresh, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    return fresh, old


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that nothing more can be written: full, or over a quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def flush_to_disk(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(
    model: DeepseekV3ForCausalLM,
    folder: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    fp8: ScaleFormat | None = None,
    whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Writes `config.json` and the tensors into an existing folder; with `fp8`, matrices as FP8 blocks.

    Peak extra memory is about one shard for a model on an accelerator or in FP8, next to nothing for one on the CPU,
    whose parameters are written from where they are. `whole` as in `hf_tensors`.
    """
    config = model.config.to_dict() | {"dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}
    tensors = hf_tensors(model, whole)
    if fp8 is not None:
        config["quantization_config"] = quantization_config(fp8)
        tensors = quantize_tensors(tensors, fp8)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_shards(folder, tensors, max_shard_bytes)


def save_pretrained(
    model: DeepseekV3ForCausalLM,
    folder: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    fp8: ScaleFormat | None = None,
) -> None:
    """Writes a checkpoint that transformers and vLLM load; an existing folder is replaced whole, or not at all."""
    with replace_folder(folder) as fresh:
        write_checkpoint(model, fresh, max_shard_bytes=max_shard_bytes, fp8=fp8)


def load_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    drop_mtp: bool = False,
) -> DeepseekV3ForCausalLM:
    """Builds the model of `config.json` and fills it from safetensors, FP8 blocks dequantised.

    Every parameter is allocated once, in `dtype` on `device`, and filled tensor by tensor; the router's bias stays
    float32. `drop_mtp` leaves prediction modules out. Raises FileNotFoundError for a missing file and ValueError for
    tensors that do not fit, naming them.
    """
    folder = Path(folder)
    config = DeepseekV3Config.load(folder)
    if drop_mtp:
        config = replace(config, num_nextn_predict_layers=0)
    model = skeleton(config)
    files = TensorFiles(folder)
    names = [n for n in weight_names(files) if not (drop_mtp and layer_of(n) >= config.num_hidden_layers)]
    _check_fit(model, files, names)
    allocate(model, dtype, torch.device(device))
    load_hf_tensors(model, ((name, read_weight(files, name)) for name in names), source=str(folder))
    return model


def layer_of(name: str) -> int:
    """The layer that a checkpoint tensor belongs to, -1 for embedding, final norm and head."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _check_fit(model: DeepseekV3ForCausalLM, files: TensorFiles, names: list[str]) -> None:
    """Compares the headers with a model that has no memory yet; raises ValueError naming each misfit."""
    targets = dict(hf_tensors(model))
    config = model.config
    unexpected = [name for name in names if name not in targets]
    beyond = sorted({layer_of(name) for name in unexpected if layer_of(name) >= config.num_hidden_layers})
    if beyond and config.num_nextn_predict_layers == 0:
        raise ValueError(
            f"{files.folder}: holds multi-token-prediction layers {beyond}, but num_nextn_predict_layers is 0 in "
            f"config.json: set it to {len(beyond)} to use them, pass drop_mtp=True, or remove them for good with "
            "`grpo convert --mtp drop`"
        )
    problems = [f"unexpected {name}" for name in unexpected]
    problems += [
        _misshapen(name, files.tensors[name].shape, targets[name])
        for name in names
        if name in targets and files.tensors[name].shape != tuple(targets[name].shape)
    ]
    present = set(names)
    problems += [f"missing {name}" for name in targets if name not in present]
    refuse(problems, str(files.folder), _MISFIT)


def tensor_shapes(folder: str | Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor on disk, scales of FP8 blocks included, read from the file headers alone."""
    return {name: list(tensor.shape) for name, tensor in TensorFiles(folder).tensors.items()}


def read_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, one at a time, FP8 blocks dequantised to float32."""
    files = TensorFiles(folder)
    for name in weight_names(files):
        yield name, read_weight(files, name)
