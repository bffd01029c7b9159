"""Where a running vLLM model holds the tensors of its checkpoint, so that they can be read back.

vLLM fuses, pads and repacks. The fused and padded ones are views here; a place whose layout is another one (prepacked
for a kernel, say, in the same shape) is found out at the start, when it must equal the file that was loaded.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

Place = tuple[str, str, Callable[[], Tensor | None]]
"""Checkpoint name, the place's name, and how to read it; None where there is nothing of the checkpoint's shape."""

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
        if expert := EXPERT_NAME.fullmatch(name):
            held, rows = EXPERTS[expert[3]]
            if expert[1] in experts:
                place = experts[expert[1]].replace("w13_weight", held)
                yield name, place, _reader(model, place, rows, shape, index=int(expert[2]))
            continue
        ending = next((ending for ending in FUSED if name.endswith(ending)), None)
        place, rows = (
            (name, "first") if ending is None else (name.removesuffix(ending) + FUSED[ending][0], FUSED[ending][1])
        )
        if place in parameters:
            yield name, place, _reader(model, place, rows, shape)
    for name, module in model.named_modules():
        kv_b = re.sub(r"\.self_attn\..*", ".self_attn.kv_b_proj.weight", name)
        if kv_b in shapes and hasattr(module, "W_UK_T"):
            yield kv_b, f"{name}.W_UK_T and W_UV", _absorbed_reader(module)


def _reader(
    model: nn.Module, place: str, rows: str, shape: Sequence[int], index: int | None = None
) -> Callable[[], Tensor | None]:
    def read() -> Tensor | None:
        tensor = model.get_parameter(place)
        if index is not None and tensor.dim() == 3 and index < len(tensor):
            tensor = tensor[index]
        if tensor.dim() != len(shape) or tensor.shape[1:] != torch.Size(shape[1:]) or len(tensor) < shape[0]:
            return None
        return tensor[: shape[0]] if rows == "first" else tensor[len(tensor) - shape[0] :]

    return read


def _absorbed_reader(module: nn.Module) -> Callable[[], Tensor | None]:
    """kv_b_proj [heads * (nope + value), latent], put together again from the copies that decoding uses."""

    def read() -> Tensor | None:
        # W_UK_T [heads, nope, latent], W_UV [heads, latent, value]
        up_k_HPL, up_v_HLV = getattr(module, "W_UK_T"), getattr(module, "W_UV")  # noqa: B009
        return torch.cat([up_k_HPL, up_v_HLV.transpose(1, 2)], dim=1).flatten(0, 1)

    return read
