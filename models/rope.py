"""Rotary position embedding as DeepSeek uses it: interleaved pairs, plain or YaRN (arXiv:2309.00071).

Shapes: T tokens, R rotary dimensions, ... any leading dimensions.

    cos_TR, sin_TR = RotaryTable(config)(positions_T)
    q_pe = rotate(q_pe, cos, sin)
"""

import math

import torch
from torch import Tensor, nn

from models.config import DeepseekV3Config, RopeParameters
from models.fused import fused


def inverse_frequencies(dim: int, rope: RopeParameters) -> Tensor:
    """[dim / 2] angular frequencies theta^(-2i/dim); YaRN blends them with those divided by `factor`."""
    frequencies = rope.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if rope.rope_type == "default":
        return frequencies.float()

    def dimension_turning(rotations: float) -> float:
        """The dimension that makes this many full turns over the original context."""
        period = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(rope.rope_theta))

    low = max(math.floor(dimension_turning(rope.beta_fast)), 0)
    high = min(math.ceil(dimension_turning(rope.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return (frequencies / rope.factor * ramp + frequencies * (1 - ramp)).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x0, x1), (x2, x3), ... of [..., R] by the angles given as [..., R / 2].

    Returns [all first elements | all second elements]; queries and keys share this order, so their products do not see
    it.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


@fused
def rotate_last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the last R of the last dimension, where cos and sin have R / 2, and leaves what stands before them."""
    plain, rotary = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    return torch.cat([plain, rotate(rotary, cos, sin)], dim=-1)


class RotaryTable(nn.Module):
    """Cosines and sines of any position; holds the frequencies, no parameter."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        rope = config.rope_parameters
        self.inverse_frequencies_R: Tensor
        self.register_buffer(
            "inverse_frequencies_R", inverse_frequencies(config.qk_rope_head_dim, rope), persistent=False
        )
        # Multiplies cosines and sines; 1 for DeepSeek-V3, whose two mscale values are equal.
        self.magnitude = rope.magnitude(rope.mscale) / rope.magnitude(rope.mscale_all_dim)

    def forward(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[T] integer positions -> cosines and sines, each [T, R / 2] in `dtype`."""
        angles_TR = positions_T.float()[:, None] * self.inverse_frequencies_R
        return (angles_TR.cos() * self.magnitude).to(dtype), (angles_TR.sin() * self.magnitude).to(dtype)
