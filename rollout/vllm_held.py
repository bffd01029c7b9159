"""Where a running vLLM model holds the tensors of its checkpoint, so that they can be read back.

vLLM fuses, pads and repacks. The fused and padded ones are views here; a place whose layout is another one (prepacked
for a kernel, say, in the same shape) is found out at the start, when it must equal the file that was loaded.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[str, str, Callable[[], Tensor]]
"""Checkpoint name, the place's name, and how to read it in the checkpoint's shape."""

# Checkpoint's ending -> vLLM's, and whether it is the first or the last of the rows.
FUSED = {
    "gate_proj.weight": ("gate_up_proj.weight", "first"),
    "up_proj.weight": ("gate_up_proj.weight", "last"),
    "self_attn.q_a_proj.weight": ("self_attn.fused_qkv_a_proj.weight", "first"),
    "self_attn.kv_a_proj_with_mqa.weight": ("self_attn.fused_qkv_a_proj.weight", "last"),
}
EXPERTS = {"gate_proj": ("w13_weight", "first"), "up_proj": ("w13_weight", "last"), "down_proj": ("w2_weight", "first")}
EXPERT_NAME = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def places(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Iterator[Place]:
    """Every place that may hold a tensor of the checkpoint, with the absorbed copies of MLA's up-projections."""
    parameters = dict(model.named_parameters())
    experts = {
        re.sub(r"\.(routed_experts\.)?w(13|2)_weight$", "", n): n for n in parameters if n.endswith("w13_weight")
    }
    for name, shape in shapes.items():
        index = None
        if expert := EXPERT_NAME.fullmatch(name):
            held, rows = EXPERTS[expert[3]]
            index, place = int(expert[2]), experts.get(expert[1], "").replace("w13_weight", held)
        else:
            ending = next((ending for ending in FUSED if name.endswith(ending)), "")
            held, rows = FUSED.get(ending, ("", "first"))
            place = name.removesuffix(ending) + held
        if place in parameters and _fits(parameters[place], index, shape):
            yield name, place, partial(_read, model, place, index, rows, shape[0])
    for name, module in model.named_modules():
        kv_b = re.sub(r"\.self_attn\..*", ".self_attn.kv_b_proj.weight", name)
        if kv_b in shapes and hasattr(module, "W_UK_T"):
            yield kv_b, f"{name}.W_UK_T and W_UV", partial(_read_absorbed, module)


def _fits(parameter: Tensor, index: int | None, shape: Sequence[int]) -> bool:
    """Whether it has at least the rows of the shape, each of the same width."""
    sizes = list(parameter.shape if index is None else parameter.shape[1:])
    return len(sizes) == len(shape) and sizes[1:] == list(shape[1:]) and sizes[0] >= shape[0]


def _read(model: nn.Module, place: str, index: int | None, rows: str, num_rows: int) -> Tensor:
    parameter = model.get_parameter(place)
    tensor = parameter if index is None else parameter[index]
    return tensor[:num_rows] if rows == "first" else tensor[len(tensor) - num_rows :]


def _read_absorbed(module: Any) -> Tensor:
    """kv_b_proj [heads * (nope + value), latent], put together again from the copies that decoding uses."""
    # W_UK_T [heads, nope, latent], W_UV [heads, latent, value]
    return torch.cat([module.W_UK_T, module.W_UV.transpose(1, 2)], dim=1).flatten(0, 1)
