"""The latent key-value cache of MLA: per token and layer one normalised latent and one rotated shared key.

Shapes: B sequences, M new tokens of a sequence, S positions, C kv latent, R rotary dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.config import DeepseekV3Config
from models.packing import SequenceLayout


class LatentCache:
    """Right-padded cache of B sequences; `lengths_B` counts what is valid in each row. Holds the main model's layers,
    or those named in `layers`.
    """

    def __init__(
        self,
        config: DeepseekV3Config,
        num_sequences: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layers: Sequence[int] | None = None,
    ) -> None:
        def empty(width: int) -> dict[int, Tensor]:
            shape = (num_sequences, max_length, width)
            held = range(config.num_hidden_layers) if layers is None else layers
            return {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in held}

        self.kv_c_LBSC = empty(config.kv_lora_rank)
        self.k_pe_LBSR = empty(config.qk_rope_head_dim)
        self.lengths_B = torch.zeros(num_sequences, dtype=torch.long, device=device)

    def next_positions(self, num_new: int) -> Tensor:
        """[B, M] positions of the tokens that come next in each sequence."""
        return self.lengths_B[:, None] + torch.arange(num_new, device=self.lengths_B.device)

    def fill(self, layer: int, layout: SequenceLayout, kv_c_TC: Tensor, k_pe_TR: Tensor) -> None:
        """Stores a layer's whole prompts; `advance` is called once, after the last layer."""
        longest = max(layout.lengths)
        self.kv_c_LBSC[layer][:, :longest] = layout.pad(kv_c_TC)
        self.k_pe_LBSR[layer][:, :longest] = layout.pad(k_pe_TR)

    def append(self, layer: int, kv_c_BMC: Tensor, k_pe_BMR: Tensor) -> None:
        """Stores the next M tokens of every sequence behind what is valid."""
        positions_BM = self.next_positions(kv_c_BMC.shape[1])
        rows_B1 = torch.arange(len(positions_BM), device=positions_BM.device)[:, None]
        self.kv_c_LBSC[layer][rows_B1, positions_BM] = kv_c_BMC
        self.k_pe_LBSR[layer][rows_B1, positions_BM] = k_pe_BMR

    def advance(self, num_tokens_B: Tensor | int) -> None:
        self.lengths_B = self.lengths_B + num_tokens_B

    def truncate(self, lengths_B: Tensor) -> None:
        """Forgets what lies behind these lengths; each sequence may lose another number of tokens, none may gain."""
        assert bool((lengths_B <= self.lengths_B).all()), f"cannot truncate {self.lengths_B} to {lengths_B}"
        self.lengths_B = lengths_B

    def select(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order; a row may be named several times (one prompt, many samples)."""
        self.kv_c_LBSC = {layer: x.index_select(0, rows) for layer, x in self.kv_c_LBSC.items()}
        self.k_pe_LBSR = {layer: x.index_select(0, rows) for layer, x in self.k_pe_LBSR.items()}
        self.lengths_B = self.lengths_B.index_select(0, rows)

    def join(self, other: "LatentCache") -> None:
        """Puts the other's sequences behind these; the wider of the two sets the room of all."""

        def joined(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: join_rows(x, theirs[layer]) for layer, x in ours.items()}

        self.kv_c_LBSC = joined(self.kv_c_LBSC, other.kv_c_LBSC)
        self.k_pe_LBSR = joined(self.k_pe_LBSR, other.k_pe_LBSR)
        self.lengths_B = torch.cat([self.lengths_B, other.lengths_B])


def join_rows(x_BS: Tensor, y_BS: Tensor) -> Tensor:
    """[B + B', max(S, S'), ...] both, one above the other, the narrower filled with zeros."""
    width = max(x_BS.shape[1], y_BS.shape[1])
    joined_BS = x_BS.new_zeros(len(x_BS) + len(y_BS), width, *x_BS.shape[2:])
    joined_BS[: len(x_BS), : x_BS.shape[1]] = x_BS
    joined_BS[len(x_BS) :, : y_BS.shape[1]] = y_BS
    return joined_BS
