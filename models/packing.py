"""Sequences packed end to end without padding: what every layer but attention works on.

Every per-token layer works on packed tokens [T, ...]; only attention needs to know where a sequence begins. Sequences
that begin alike, such as the completions of one prompt, may have that beginning computed once: a token depends on those
before it alone, so the numbers are the same, and only attention sees it in each of them.

Shapes: T tokens computed, W tokens of the whole sequences laid end to end (more than T where some are shared).

    layout = SequenceLayout.from_lengths([5, 3])
    x_BS = layout.pad(x_T)      # [2, 5, ...], right-padded
    blocks = layout.split_blocks(x_T)   # for attention: [b, s, ...] of nearly equal lengths; join_blocks goes back
    layout = SequenceLayout.from_lengths([5, 4], shared=[(0, 0), (0, 3)])  # 6 tokens: layout.computed(ids_W)
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.moves import move_rows, moved
from models.placement import Placement

LONGEST_FLASH = 2048
"""Up to this length, causal_attention.py takes flash attention on a GPU where lengths are mixed."""


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """Where each packed token stands: sequence b occupies tokens `offsets[b]` to `offsets[b + 1]` of the W."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, all at least 1."""
    positions_T: Tensor
    """[T] position inside its own sequence."""
    padded_rows_T: Tensor
    """[T] row in the flattened [B * S] padded form; of a shared token, the first."""
    offsets_B: Tensor
    """[B + 1] index of each sequence's first token, and the total; int32, as attention kernels take it."""
    blocks: tuple[tuple[int, int], ...]
    """(sequences, padded length) of each rectangle that attention works on, longest first."""
    in_blocks: Placement | None
    """The rows of the rectangles, flattened and laid end to end; None if that is the packed memory itself."""
    in_sequences: Placement | None
    """The rows of whole sequences laid end to end; None if that is the packed memory, with nothing shared."""

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        shared: Sequence[tuple[int, int]] = (),
    ) -> "SequenceLayout":
        """With `shared`, sequence b has its first n tokens in common with the earlier sequence a, where `shared[b]` is
        (a, n); n is 0 for none.
        """
        assert lengths and min(lengths) >= 1, f"every sequence needs at least one token, got lengths {lengths}"
        longest = max(lengths)
        lengths_B = torch.tensor(lengths)
        starts_B = lengths_B.cumsum(0) - lengths_B
        positions_W = torch.arange(sum(lengths)) - starts_B.repeat_interleave(lengths_B)
        padded_rows_W = (torch.arange(len(lengths)) * longest).repeat_interleave(lengths_B) + positions_W
        blocks, first_rows = _rectangles(lengths)
        block_rows_W = torch.tensor(first_rows).repeat_interleave(lengths_B) + positions_W
        tokens_W = _tokens(lengths, shared or [(0, 0)] * len(lengths))
        in_sequences = Placement.of(tokens_W) if any(count for _, count in shared) else None
        num_rows = sum(count * length for count, length in blocks)
        tokens_R = torch.full((num_rows,), -1).index_copy_(0, block_rows_W, tokens_W)
        is_packed = torch.equal(tokens_R, torch.arange(num_rows))
        first_T = slice(None) if in_sequences is None else in_sequences.rows_T
        layout = cls(
            lengths=tuple(lengths),
            positions_T=positions_W[first_T],
            padded_rows_T=padded_rows_W[first_T],
            offsets_B=F.pad(lengths_B.cumsum(0), (1, 0)).to(torch.int32),
            blocks=blocks,
            in_blocks=None if is_packed else Placement.of(tokens_R),
            in_sequences=in_sequences,
        )
        return layout.to(torch.device(device))

    def to(self, device: torch.device) -> "SequenceLayout":
        return moved(self, device)

    @property
    def offsets(self) -> tuple[int, ...]:
        """[B + 1] index of each sequence's first token, and the total."""
        return (0, *itertools.accumulate(self.lengths))

    def computed(self, x_W: Tensor) -> Tensor:
        """[W, ...] -> [T, ...]: of what is given for whole sequences, what is said of the tokens computed."""
        return x_W if self.in_sequences is None else x_W[self.in_sequences.rows_T]

    def tokens_at(self, places_N: Tensor) -> Tensor:
        """[N] places among the W -> the tokens computed that stand there, of the T."""
        return places_N if self.in_sequences is None else self.in_sequences.tokens_R[places_N]

    def pad(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...] with zeros behind each sequence's end. Nothing may be shared."""
        num_sequences, longest = len(self.lengths), max(self.lengths)
        if min(self.lengths) < longest:
            x_T = move_rows(x_T, self.padded_rows_T, num_sequences * longest)
        return x_T.reshape(num_sequences, longest, *x_T.shape[1:])

    def split_blocks(self, x_T: Tensor) -> list[Tensor]:
        """[T, ...] -> one [b, s, ...] for each of `blocks`; what stands behind a sequence's end must not be read."""
        x_R = x_T if self.in_blocks is None else self.in_blocks.spread(x_T)
        parts = x_R.split([count * length for count, length in self.blocks])
        return [part.unflatten(0, block) for part, block in zip(parts, self.blocks, strict=True)]

    def join_blocks(self, blocks: list[Tensor]) -> Tensor:
        """The opposite of `split_blocks`."""
        x_R = torch.cat([block.flatten(0, 1) for block in blocks]) if len(blocks) > 1 else blocks[0].flatten(0, 1)
        return x_R if self.in_blocks is None else self.in_blocks.collect(x_R)


def _tokens(lengths: Sequence[int], shared: Sequence[tuple[int, int]]) -> Tensor:
    """[W] the token that stands in each place of the whole sequences."""
    sequences: list[Tensor] = []
    next_token = 0
    for length, (other, count) in zip(lengths, shared, strict=True):
        own = torch.arange(next_token, next_token + length - count)
        sequences.append(torch.cat([sequences[other][:count], own]) if count else own)
        next_token += length - count
    return torch.cat(sequences)


def _rectangles(lengths: Sequence[int]) -> tuple[tuple[tuple[int, int], ...], list[int]]:
    """Blocks of sequences of nearly the same length, longest first, and the row where each sequence begins. Several
    sequences of one length are one block as they are, as in training on texts cut to that length.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    in_order = [lengths[i] for i in order]
    if len(in_order) > 1 and in_order[0] == in_order[-1]:
        blocks = [(len(in_order), in_order[0])]
    else:
        blocks = _close_blocks(in_order) if in_order[0] <= LONGEST_FLASH else _repeatable_blocks(in_order)
    rows = itertools.accumulate((length for count, length in blocks for _ in range(count)), initial=0)
    first_rows = dict(zip(order, rows, strict=False))
    return tuple(blocks), [first_rows[i] for i in range(len(lengths))]


def _close_blocks(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """A block takes what is at least 7/8 of its longest. Its length is a multiple of 16, all of a CPU's vectors: in a
    vector that is not full a kernel may round otherwise, and a token would depend on what else is in the batch."""
    blocks: list[tuple[int, int]] = []
    longest = 0
    for length in lengths:
        if blocks and length >= 7 / 8 * longest:
            blocks[-1] = (blocks[-1][0] + 1, blocks[-1][1])
        else:
            longest = length
            blocks.append((1, -(-length // 16) * 16))
    return blocks


def _repeatable_blocks(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Few shapes over a whole run: lengths rounded up to one of four steps per doubling, a power of two of sequences in
    a block. A GPU spends an eighth of a second on preparing its attention for each new shape.
    """
    blocks: list[tuple[int, int]] = []
    for length, same in itertools.groupby(map(_rounded_up, lengths)):
        count = len(list(same))
        blocks += [(1 << bit, length) for bit in reversed(range(count.bit_length())) if count >> bit & 1]
    return blocks


def _rounded_up(length: int) -> int:
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step
