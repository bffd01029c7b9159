"""Conversion of a checkpoint to another precision: FP8 blocks to bfloat16 and back, prediction modules kept or dropped.

    grpo convert SRC --out DST --to bf16
    grpo convert SRC --out DST --to fp8 --scale-format ue8m0 --mtp drop

Goes from files to files, one tensor at a time; no model is built. `DST` appears whole or not at all.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tyro.conf import Positional

from models.checkpoint import layer_of, replace_folder
from models.config import DeepseekV3Config, ScaleFormat, fp8_scale_format
from models.fp8 import SCALE_SUFFIX, is_quantized, quantization_config, quantize_tensors, read_weight, weight_names
from models.shards import TensorFiles, write_shards
from pipelines.console import console, progress_bar

_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}
"""Of what is not stored in FP8."""
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """`grpo convert`: a checkpoint in another precision."""

    source: Positional[str]
    """Folder of a Hugging Face checkpoint."""
    out: str
    """Folder of the new checkpoint."""
    to: Literal["bf16", "fp8", "fp32"] = "bf16"
    """Precision of the matrices; `fp8` leaves embedding, head, router and norms in bfloat16."""
    scale_format: ScaleFormat = "float32"
    """Scales of the FP8 blocks: any number, or powers of two only (`ue8m0`)."""
    mtp: Literal["keep", "drop"] = "keep"
    """Whether multi-token-prediction modules come along."""
    max_shard_gb: float = 5.0
    """Largest file, in units of 1e9 bytes."""

    def __post_init__(self) -> None:
        if self.scale_format != "float32" and self.to != "fp8":
            raise ValueError(f"scale_format={self.scale_format!r} has no effect with to={self.to!r}: use --to fp8")
        if self.max_shard_gb <= 0:
            raise ValueError(f"max_shard_gb must be > 0, got {self.max_shard_gb}")


def run_convert(config: ConvertConfig) -> Path:
    """The whole of `grpo convert`; the folder of the new checkpoint."""
    source, out = _check_paths(config)
    model_config = DeepseekV3Config.load(source)
    raw = json.loads((source / "config.json").read_text())
    files = TensorFiles(source)
    names = weight_names(files)
    num_layers = model_config.num_hidden_layers
    if config.mtp == "drop":
        names = [name for name in names if layer_of(name) < num_layers]
    num_mtp = len({layer_of(name) for name in names} - set(range(-1, num_layers)))
    if config.mtp == "keep" and num_mtp != model_config.num_nextn_predict_layers:
        raise ValueError(
            f"{source} holds {num_mtp} multi-token-prediction layers, its config.json says num_nextn_predict_layers="
            f"{model_config.num_nextn_predict_layers}: correct the file, or leave them out with --mtp drop"
        )
    started = time.perf_counter()
    with replace_folder(out) as fresh, progress_bar("converting", len(names)) as bar:
        _copy_other_files(source, fresh)
        (fresh / "config.json").write_text(json.dumps(_new_config(raw, config), indent=2) + "\n")
        tensors = _convert(files, names, config, fp8_scale_format(raw), on_tensor=lambda: bar.advance(""))
        written = write_shards(fresh, tensors, int(config.max_shard_gb * 1e9))
    console.print(
        f"{len(names)} tensors, {files.num_bytes:,} bytes in, {written:,} bytes out, "
        f"{time.perf_counter() - started:.1f} s: {out}",
        soft_wrap=True,
    )
    return out


def _check_paths(config: ConvertConfig) -> tuple[Path, Path]:
    """Source and destination. Raises ValueError if writing the one could destroy the other, or something else."""
    if not config.source or not config.out:
        raise ValueError("name both folders: grpo convert SRC --out DST")
    source, out = Path(config.source), Path(config.out)
    absolute = source.resolve(), out.resolve()
    if absolute[0] == absolute[1] or absolute[0] in absolute[1].parents or absolute[1] in absolute[0].parents:
        raise ValueError(f"{source} is never overwritten: choose an --out that is neither it, around it nor in it")
    if out.exists() and not (out / "config.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no checkpoint that could be replaced: choose another --out")
    return source, out


def _convert(
    files: TensorFiles,
    names: list[str],
    config: ConvertConfig,
    source_scales: ScaleFormat | None,
    on_tensor: Callable[[], None],
) -> Iterator[tuple[str, Tensor]]:
    """The stream of the new checkpoint. FP8 weights that are wanted as they are pass untouched."""
    for name in names:
        if config.to != "fp8" or not is_quantized(name):
            # The router's bias decides between experts that differ by less than bfloat16 resolves.
            dtype = torch.float32 if name.endswith("e_score_correction_bias") else _DTYPES[config.to]
            yield name, read_weight(files, name).to(dtype)
        elif files.tensors[name].dtype == "F8_E4M3" and config.scale_format == source_scales:
            yield name, files.read(name)
            yield name + SCALE_SUFFIX, files.read(name + SCALE_SUFFIX).float()
        else:
            yield from quantize_tensors([(name, read_weight(files, name))], config.scale_format)
        on_tensor()


def _new_config(raw: dict[str, Any], config: ConvertConfig) -> dict[str, Any]:
    """`config.json` of the result: all keys of the source but those about precision and prediction modules."""
    new = {key: value for key, value in raw.items() if key not in ("quantization_config", "torch_dtype")}
    new["dtype"] = str(_DTYPES[config.to]).removeprefix("torch.")
    if config.to == "fp8":
        new["quantization_config"] = quantization_config(config.scale_format)
    if config.mtp == "drop":
        new["num_nextn_predict_layers"] = 0
    return new


def _copy_other_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template, generation defaults: what lies beside the weights, folders and hidden files not."""
    for path in sorted(source.iterdir()):
        is_weight = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not (is_weight or path.name.startswith(".") or path.name == "config.json"):
            shutil.copyfile(path, target / path.name)
