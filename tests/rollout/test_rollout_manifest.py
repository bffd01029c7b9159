"""Pins fingerprints and manifests: what of a tensor's bits a fingerprint sees, and how a difference is told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rollout.manifest
from rollout.manifest import SyncError, differences, fingerprints, records, refuse

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64]
SHAPES = [(1,), (3,), (7, 5), (6, 8), (4, 3, 5)]


def seen(changed: Tensor, original: Tensor) -> bool:
    return fingerprints([changed]) != fingerprints([original])


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_single_bit_counts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    original = random_tensor(shape, dtype)
    for byte in range(original.nbytes):
        for bit in range(8):
            changed = original.clone()
            changed.view(-1).view(torch.uint8)[byte] ^= 1 << bit
            assert seen(changed, original), (byte, bit)


def test_a_millionth_of_one_element_is_seen() -> None:
    original = random_tensor((2048, 64), torch.float32)
    changed = original.clone()
    changed[1234, 56] += 1e-6
    assert changed[1234, 56] != original[1234, 56]
    assert seen(changed, original)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(SHAPES[1:]), st.sampled_from(DTYPES[:3]))
def test_an_exchange_of_two_elements_is_seen(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    original = random_tensor(shape, dtype)
    flat = original.view(-1).clone()
    i = data.draw(st.integers(0, len(flat) - 1))
    j = data.draw(st.integers(0, len(flat) - 1).filter(lambda j: flat[j] != flat[i]))
    # opposite signs differ in the highest bit alone, which a sum could lose
    flat[j] = data.draw(st.sampled_from([flat[j].item(), -flat[i].item()]))
    swapped = flat.clone()
    swapped[i], swapped[j] = flat[j], flat[i]
    assert seen(swapped.view(shape), flat.view(shape))


def test_two_changes_that_cancel_out_by_row_and_column_are_seen() -> None:
    original = torch.arange(12, dtype=torch.int32).view(3, 4)
    changed = original.clone()
    changed[0, 0] -= 2
    changed[1, 1] += 1
    assert seen(changed, original)


def test_rows_columns_and_halves_that_changed_places_are_seen() -> None:
    original = random_tensor((6, 8), torch.bfloat16)
    assert seen(original[[1, 0, 2, 3, 4, 5]], original)
    assert seen(original[:, [0, 1, 2, 3, 6, 7, 4, 5]], original)
    assert seen(original.roll(3, 0), original)
    assert not seen(original.clone(), original)


def test_views_count_as_what_they_show() -> None:
    stacked = random_tensor((4, 6, 10), torch.bfloat16)
    assert not seen(stacked[2], stacked[2].clone())
    assert not seen(stacked.transpose(0, 1), stacked.transpose(0, 1).contiguous())
    shifted = torch.cat([torch.zeros(1, dtype=torch.bfloat16), stacked[0].flatten()])[1:].view(6, 10)
    assert fingerprints([shifted]) == fingerprints([stacked[0]]), "an odd start in memory changes nothing"


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [random_tensor(shape, torch.float32) for shape in ((50, 7), (7, 50), (400,))] * 100
    whole = fingerprints(tensors)
    monkeypatch.setattr(rollout.manifest, "BLOCK_WORDS", 30)
    assert fingerprints(tensors) == whole == [fingerprints([tensor])[0] for tensor in tensors]
    assert len(set(whole)) == 3


def test_differences_are_told_by_name() -> None:
    tensors = [random_tensor((3, 2), torch.float32, seed) for seed in range(3)]
    sent = records(["a", "b", "c"], tensors)
    assert differences(sent, sent) == []
    found = records(["b", "c", "d"], [tensors[1].bfloat16(), tensors[0], tensors[2]])
    assert differences(sent, found) == [
        "missing a",
        "unexpected d",
        "b is torch.bfloat16 [3, 2], sent was torch.float32 [3, 2]",
        "c has other values than were sent",
    ]
    with pytest.raises(SyncError, match=r"^here: 0; 1; 2; 3; 4; 5; 6; 7 and 2 more$"):
        refuse([str(i) for i in range(10)], "here")
