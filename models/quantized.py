"""Frozen weights in 4 bits (NF4, arXiv:2305.14314 section 3) for dense models of transformers, by bitsandbytes."""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor


def four_bit_arguments(dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """For transformers' `from_pretrained`: 4.1 bits per weight with its quantized scales, computing in `dtype`.

    Raises ValueError without bitsandbytes.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("4-bit weights need bitsandbytes: pip install 'grpo-toolkit[quantized]'")
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": how, "device_map": {"": device}}


def settle(reference: Any) -> None:
    """Makes a model loaded so one for training adapters: exact on CPUs, and written as an ordinary checkpoint."""
    del reference.config.quantization_config, reference.hf_quantizer  # what is written is dequantized
    for module in reference.modules():
        # On some CPUs bitsandbytes repacks weights for a kernel in bfloat16, in passes without gradient alone.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantized(parameter: Any) -> Tensor:
    """The weights that a 4-bit parameter stands for, in the dtype they came from; any other tensor as it is."""
    if getattr(parameter, "quant_state", None) is None:
        return parameter.detach()
    dequantize = importlib.import_module("bitsandbytes.functional").dequantize_4bit
    return dequantize(parameter.detach(), parameter.quant_state)
