"""The latent key-value cache of MLA: per token and layer one normalised latent and one rotated shared key.

Shapes: B sequences, S positions, C kv latent, R rotary dimensions.
"""

import torch
from torch import Tensor

from models.config import DeepseekV3Config
from models.packing import SequenceLayout


class LatentCache:
    """Right-padded cache of B sequences; `lengths_B` counts what is valid in each row."""

    def __init__(
        self, config: DeepseekV3Config, num_sequences: int, max_length: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        def empty(width: int) -> list[Tensor]:
            shape = (num_sequences, max_length, width)
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

        self.kv_c_LBSC = empty(config.kv_lora_rank)
        self.k_pe_LBSR = empty(config.qk_rope_head_dim)
        self.lengths_B = torch.zeros(num_sequences, dtype=torch.long, device=device)

    def fill(self, layer: int, layout: SequenceLayout, kv_c_TC: Tensor, k_pe_TR: Tensor) -> None:
        """Stores a layer's whole prompts; `advance` is called once, after the last layer."""
        longest = max(layout.lengths)
        self.kv_c_LBSC[layer][:, :longest] = layout.pad(kv_c_TC)
        self.k_pe_LBSR[layer][:, :longest] = layout.pad(k_pe_TR)

    def append(self, layer: int, kv_c_BC: Tensor, k_pe_BR: Tensor) -> None:
        """Stores one new token per sequence at its next position."""
        rows_B = torch.arange(len(self.lengths_B), device=self.lengths_B.device)
        self.kv_c_LBSC[layer][rows_B, self.lengths_B] = kv_c_BC
        self.k_pe_LBSR[layer][rows_B, self.lengths_B] = k_pe_BR

    def advance(self, num_tokens_B: Tensor | int) -> None:
        self.lengths_B = self.lengths_B + num_tokens_B

    def select(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order; a row may be named several times (one prompt, many samples)."""
        self.kv_c_LBSC = [x.index_select(0, rows) for x in self.kv_c_LBSC]
        self.k_pe_LBSR = [x.index_select(0, rows) for x in self.k_pe_LBSR]
        self.lengths_B = self.lengths_B.index_select(0, rows)
