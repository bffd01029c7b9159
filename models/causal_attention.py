"""Causal attention inside packed sequences: the one place that chooses a kernel, for our model and dense ones.

Shapes: T packed tokens, B sequences of a block, S their padded length, H heads, X query and key width, W value width.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.packing import LONGEST_FLASH, SequenceLayout

_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
DENSE_NAME = "packed_causal"
"""Under which transformers knows `dense_attention`."""


def causal_attention(q_THX: Tensor, k_THX: Tensor, v_THW: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """Each token attends to itself and those before it in its own sequence, -> [T, H, W].

    In rectangles by default: padding stands behind each sequence, where causality hides it from real tokens. On CUDA,
    cuDNN's kernel comes first, twice as fast as flash attention on long sequences because it takes values narrower than
    keys; but each new shape costs it an eighth of a second. Shorter sequences of mixed lengths therefore take flash
    attention, which knows no shapes (docs/log.md has the figures).
    """
    half_on_gpu = q_THX.is_cuda and q_THX.dtype in (torch.bfloat16, torch.float16)
    is_one_length = layout.in_blocks is None and len(layout.lengths) > 1
    if half_on_gpu and not is_one_length and max(layout.lengths) <= LONGEST_FLASH:
        return _flash_attention(q_THX, k_THX, v_THW, layout, scale)
    out_blocks = []
    for q, k, v in zip(*map(layout.split_blocks, (q_THX, k_THX, v_THW)), strict=True):
        with sdpa_kernel(_KERNELS, set_priority=True) if q.is_cuda else nullcontext():
            out_BHSW = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=scale
            )
        out_blocks.append(out_BHSW.transpose(1, 2))
    return layout.join_blocks(out_blocks)


def _flash_attention(q_THX: Tensor, k_THX: Tensor, v_THW: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """PyTorch's flash attention over packed sequences, for values padded to the width of keys."""
    from torch.nn.attention.varlen import varlen_attn  # CUDA only

    if layout.in_sequences is not None:
        q_THX, k_THX, v_THW = map(layout.in_sequences.spread, (q_THX, k_THX, v_THW))
    longest, width = max(layout.lengths), v_THW.shape[-1]
    v_THX = F.pad(v_THW, (0, q_THX.shape[-1] - width)) if width < q_THX.shape[-1] else v_THW
    offsets_B, causal = layout.offsets_B, (-1, 0)
    out_THX = varlen_attn(q_THX, k_THX, v_THX, offsets_B, offsets_B, longest, longest, scale=scale, window_size=causal)
    assert isinstance(out_THX, Tensor)
    out_THW = out_THX[..., :width]
    return out_THW if layout.in_sequences is None else layout.in_sequences.collect(out_THW)


def dense_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, layout: SequenceLayout,
    scaling: float, sliding_window: int | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`causal_attention` in the form in which transformers calls attention: [1, H, T, X] in, [1, T, H, X] out.

    Heads of keys and values may be fewer than those of queries. Raises ValueError for what it does not compute.
    """
    unknown = {name: value for name, value in options.items() if name in ("softcap", "s_aux") and value is not None}
    if sliding_window is not None or attention_mask is not None or unknown:
        raise ValueError(f"{type(module).__name__}: only plain causal attention is packed, got {unknown or 'a window'}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    shared_by = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared_by, dim=1) for x in (k, v))
    return causal_attention(q, k, v, layout, scaling)[None], None
