"""Layouts of packed sequences: what attention works on, and beginnings that are computed once.

Shapes: T tokens computed, W tokens of the whole sequences.
"""

import random

import pytest
import torch
from torch import Tensor

from models import SequenceLayout
from models.placement import Placement
from tests.models.test_models_parity import BASE, CORNERS, relative_error, sharp_model

PROMPT, OTHER = 7, 3
LENGTHS = [PROMPT + 4, PROMPT + 1, 9, OTHER + 5, PROMPT + 6, OTHER + 2]
SHARED = [(0, 0), (0, PROMPT), (2, 0), (3, 0), (1, PROMPT), (3, OTHER)]


def random_sequences(rng: random.Random, longest: int) -> tuple[list[int], list[tuple[int, int]]]:
    lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, 9))]
    shared = [(0, 0)]
    for length in lengths[1:]:
        other = rng.randrange(len(shared))
        shared.append((other, rng.choice([0, rng.randint(0, min(length - 1, lengths[other]))])))
    return lengths, shared


def whole(lengths: list[int], shared: list[tuple[int, int]]) -> list[Tensor]:
    """Random numbers, no two alike but for what is shared."""
    sequences: list[Tensor] = []
    for length, (other, count) in zip(lengths, shared, strict=True):
        begin = sequences[other][:count] if count else torch.empty(0)
        sequences.append(torch.cat([begin, torch.rand(length - count)]))
    return sequences


@pytest.mark.parametrize("longest", [5, 60, 2500])
@pytest.mark.parametrize("seed", range(8))
def test_blocks_show_whole_sequences(longest: int, seed: int) -> None:
    lengths, shared = random_sequences(random.Random(seed), longest)
    sequences = whole(lengths, shared)
    for layout in (SequenceLayout.from_lengths(lengths), SequenceLayout.from_lengths(lengths, shared=shared)):
        x_T = layout.computed(torch.cat(sequences))
        blocks = layout.split_blocks(x_T)
        assert [tuple(block.shape) for block in blocks] == list(layout.blocks)
        rows = [row for block in blocks for row in block]
        for sequence in sequences:
            assert any(torch.equal(row[: len(sequence)], sequence) for row in rows)
        assert torch.equal(layout.join_blocks(blocks), x_T)
        assert len(x_T) == len(layout.positions_T)
        positions_W = torch.cat([torch.arange(length) for length in lengths])
        assert torch.equal(layout.positions_T, layout.computed(positions_W))
    num_shared = sum(count for _, count in shared)
    assert len(x_T) == sum(lengths) - num_shared
    if max(lengths) > 2048 and len(lengths) > 1:
        assert all(count.bit_count() == 1 for count, _ in layout.blocks), "few shapes for the GPU"


def test_blocks_are_nearly_full() -> None:
    layout = SequenceLayout.from_lengths([40, 41, 37, 39, 20, 40, 19, 8])
    assert layout.blocks == ((5, 48), (2, 32), (1, 16))
    assert SequenceLayout.from_lengths([6, 6, 6]).in_blocks is None, "the packed memory is the rectangle"


def test_copies_and_their_gradient() -> None:
    tokens_R = torch.tensor([2, 0, -1, 1, 0, 3, 0, 1, -1, 2])
    placement = Placement.of(tokens_R)
    real_R = tokens_R >= 0
    x_T = torch.rand(4, 3, 2, dtype=torch.double, requires_grad=True)
    assert torch.equal(placement.spread(x_T)[real_R], x_T[tokens_R[real_R]])
    assert torch.equal(placement.collect(placement.spread(x_T)), x_T)
    assert torch.autograd.gradcheck(lambda x: placement.spread(x)[real_R], x_T)
    assert torch.autograd.gradcheck(placement.collect, placement.spread(x_T).detach().requires_grad_())


@pytest.mark.parametrize("corner", ["v3_like", "yarn_uneven", "no_shared"])
def test_a_shared_beginning_changes_no_number(corner: str) -> None:
    """Hidden states to rounding, and gradients, though the shared tokens are computed once."""
    one_by_one, shared = sharp_model(CORNERS[corner]), sharp_model(CORNERS[corner])
    layout = SequenceLayout.from_lengths(LENGTHS, shared=SHARED)
    plain = SequenceLayout.from_lengths(LENGTHS)
    ids_W = (torch.cat(whole(LENGTHS, SHARED)) * BASE.vocab_size).long()
    weights_WD = torch.randn(len(ids_W), BASE.hidden_size, generator=torch.Generator().manual_seed(1))
    assert layout.in_sequences is not None

    wanted_WD = one_by_one(ids_W, plain).hidden_TD
    (wanted_WD * weights_WD).sum().backward()
    ids_T = layout.computed(ids_W)
    assert len(ids_T) == len(ids_W) - 2 * PROMPT - OTHER
    found_WD = shared(ids_T, layout).hidden_TD[layout.in_sequences.tokens_R]
    (found_WD * weights_WD).sum().backward()

    assert (found_WD - wanted_WD).abs().max() < 1e-5
    for (name, ours), theirs in zip(shared.model.named_parameters(), one_by_one.model.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert relative_error(ours.grad, theirs.grad) < 1e-5, name
