"""FP8 weights in blocks of 128 x 128, as DeepSeek-V3 publishes them (arXiv:2412.19437 section 3.3).

On disk `X.weight` is float8_e4m3fn and `X.weight_scale_inv` holds one float32 scale per block; a weight is value times
scale. Format `ue8m0` (V3.1) restricts scales to powers of two, so that scaling is exact. The model itself computes in
the dtype it was loaded with: reading dequantises. Not here: FP8 arithmetic.

    values, scales = quantize_block(weight, "ue8m0")
    weight = dequantize_block(values, scales)
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import ScaleFormat
from models.shards import FLOAT_DTYPES, StoredTensor, TensorFiles, refuse

BLOCK = 128
FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""
SCALE_SUFFIX = "_scale_inv"

_ATTENTION = {"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
_QUANTIZED_MODULES = _ATTENTION | {"gate_proj", "up_proj", "down_proj"}
"""Linear layers whose matrix is stored in FP8. Embeddings, head, router, norms and `eh_proj` keep their dtype."""
_SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")


def quantize_block(weight: Tensor, scale_format: ScaleFormat = "float32") -> tuple[Tensor, Tensor]:
    """[N, K] -> values [N, K] in float8_e4m3fn and scales [ceil(N / 128), ceil(K / 128)] in float32.

    A block's scale is its largest magnitude over 448, with `ue8m0` rounded up to a power of two; 1 for a block of
    zeros. Raises ValueError for an infinite or undefined weight, which has no scale.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))  # zeros never raise a block's maximum
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    largest = blocks.abs().amax(dim=(1, 3))
    if not largest.isfinite().all():
        raise ValueError("holds inf or nan, which FP8 blocks cannot store")
    scales = (largest / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scales)  # mantissa in [0.5, 1): exactly 0.5 is a power of two already
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    scales = scales.where(largest > 0, 1.0)
    values = (blocks / scales[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
    return values.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous(), scales


def dequantize_block(values: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """FP8 values [N, K] and their scales, one per block -> the weights [N, K], multiplied in float32."""
    rows, columns = values.shape
    expected = scale_shape((rows, columns))
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"scales have shape {list(scales.shape)}, a weight of [{rows}, {columns}] needs {list(expected)}"
        )
    weight = values.float()
    for band, scale in zip(weight.split(BLOCK), scales.float(), strict=True):
        band.mul_(scale.repeat_interleave(BLOCK)[:columns])
    return weight.to(dtype)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks along each side of a weight; the last ones may be ragged."""
    return tuple(-(-size // BLOCK) for size in shape)


def is_quantized(name: str) -> bool:
    """Whether an FP8 checkpoint stores the tensor of this name in FP8."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in _QUANTIZED_MODULES


def quantization_config(scale_format: ScaleFormat) -> dict[str, Any]:
    """What `config.json` of an FP8 checkpoint says under `quantization_config`."""
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    return config | ({"scale_fmt": "ue8m0"} if scale_format == "ue8m0" else {})


def quantize_tensors(tensors: Iterable[tuple[str, Tensor]], scale_format: ScaleFormat) -> Iterator[tuple[str, Tensor]]:
    """The stream of an FP8 checkpoint: each matrix that is stored in FP8 becomes values and scales, others pass."""
    for name, tensor in tensors:
        if not is_quantized(name):
            yield name, tensor
            continue
        try:
            values, scales = quantize_block(tensor, scale_format)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        yield name, values
        yield name + SCALE_SUFFIX, scales


def weight_names(files: TensorFiles) -> list[str]:
    """The tensors of a checkpoint without the scales, which belong to their weights, in the order of the files.

    Raises ValueError naming each FP8 weight without scale, scale without weight or of a wrong shape, and each tensor
    that is not of floating point.
    """
    problems, weights = [], []
    for name, tensor in files.tensors.items():
        if name.endswith(SCALE_SUFFIX):
            problems += _scale_problems(name, tensor, files.tensors.get(name.removesuffix(SCALE_SUFFIX)))
            continue
        weights.append(name)
        if tensor.dtype == "F8_E4M3":
            if name + SCALE_SUFFIX not in files.tensors:
                problems.append(f"{name} is an FP8 tensor, but there is no {name}{SCALE_SUFFIX}")
        elif tensor.dtype not in FLOAT_DTYPES:
            problems.append(f"{name} has dtype {tensor.dtype}, a weight is one of {', '.join(FLOAT_DTYPES)}")
    refuse(problems, str(files.folder), "tensors cannot be read")
    return weights


def _scale_problems(name: str, scale: StoredTensor, weight: StoredTensor | None) -> list[str]:
    if weight is None or weight.dtype != "F8_E4M3":
        return [f"{name} scales no FP8 tensor"]
    expected = scale_shape(weight.shape)
    if len(expected) != 2 or scale.shape != expected or scale.dtype not in _SCALE_DTYPES:
        found = f"{scale.dtype} {list(scale.shape)}"
        return [f"{name} is {found}, an FP8 weight of {list(weight.shape)} needs F32 {list(expected)}"]
    return []


def read_weight(files: TensorFiles, name: str) -> Tensor:
    """One tensor of a checkpoint that `weight_names` listed; float32 where it was stored in FP8."""
    tensor = files.read(name)
    if tensor.dtype != FP8_DTYPE:
        return tensor
    return dequantize_block(tensor, files.read(name + SCALE_SUFFIX))
