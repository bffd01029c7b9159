"""What a sync is held against: every tensor's name, shape, dtype and fingerprint, under a version number.

The sender writes the manifest while the tensors pass; an engine compares it with what arrived and with what it holds
afterwards. So a tensor that is missing, given twice, misshapen, stale or altered by one bit is an error that names it,
however little it moves the model's outputs.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Fingerprint = tuple[int, int, int]

BLOCK_WORDS = 2**24
"""Words that are widened to 64 bits at a time: 128 MiB."""


class SyncError(RuntimeError):
    """An engine does not hold the weights it was given."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What is known of one tensor without having it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class Manifest:
    """All tensors of one policy version, by checkpoint name."""

    version: int
    tensors: dict[str, TensorRecord]


@torch.no_grad()
def fingerprints(tensors: Iterable[Tensor]) -> list[Fingerprint]:
    """Three sums modulo 2^64 over each tensor's raw bits, read as integers in a table: plain, by row, by column.

    Equal tensors have equal fingerprints on any device: integer sums do not depend on their order. A change of one or
    two elements, an exchange of two among them, is always seen: either the plain sum moves, or the difference d of an
    exchange is weighted by another row or column, and |d| < 2^33 times a distance < 2^31 is not 0 modulo 2^64. Two rows
    that changed places are seen unless their sums are equal. Beyond that it is a hash, and no defense against malice.
    """
    found: list[Fingerprint] = []
    rest = iter(tensors)
    while tables := [_words(tensor) for tensor in itertools.islice(rest, 256)]:
        sums = [_row_and_column_sums(table_RC) for table_RC in tables]
        rows, columns = _moments([rows_R for rows_R, _ in sums]), _moments([columns_C for _, columns_C in sums])
        found += [(total, by_row, by_column) for (total, by_row), (_, by_column) in zip(rows, columns, strict=True)]
    return found


def _words(tensor: Tensor) -> Tensor:
    """[R, C] the bits as integers of 32 bits where the size allows, in the tensor's rows where they are whole words."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.itemsize % 4:
        flat = flat.clone()  # begins inside a word
    narrow = {1: torch.uint8, 2: torch.int16}.get(flat.itemsize, torch.int32)
    words = flat.view(narrow if flat.nbytes % 4 else torch.int32)
    rows = len(tensor) if tensor.dim() > 1 and words.numel() % len(tensor) == 0 else 1
    return words.view(rows, -1)


def _row_and_column_sums(table_RC: Tensor) -> tuple[Tensor, Tensor]:
    """[R] and [C] int64; widened block by block, so that no wide copy of a large tensor exists."""
    rows, columns = [], []
    for block in table_RC.split(max(1, BLOCK_WORDS // table_RC.shape[1])):
        wide = block.long()
        rows.append(wide.sum(1))
        columns.append(wide.sum(0))
    return torch.cat(rows), torch.stack(columns).sum(0)


def _moments(sums: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(sum, sum weighted by position) of each vector; those of one length at once, as GPUs like it."""
    moments = [(0, 0)] * len(sums)
    by_length: dict[int, list[int]] = {}
    for i, sums_N in enumerate(sums):
        by_length.setdefault(len(sums_N), []).append(i)
    for length, group in by_length.items():
        stacked_GN = torch.stack([sums[i] for i in group])
        positions_N = torch.arange(1, length + 1, device=stacked_GN.device)
        both_G2 = torch.stack([stacked_GN.sum(1), (stacked_GN * positions_N).sum(1)], dim=1)
        for i, (total, weighted) in zip(group, both_G2.tolist(), strict=True):
            moments[i] = (total, weighted)
    return moments


def records(names: Iterable[str], tensors: Sequence[Tensor]) -> dict[str, TensorRecord]:
    """The record of each tensor, all on one device."""
    return {
        name: TensorRecord(tuple(tensor.shape), tensor.dtype, fingerprint)
        for name, tensor, fingerprint in zip(names, tensors, fingerprints(tensors), strict=True)
    }


def refuse(problems: Sequence[str], what: str) -> None:
    """Raises SyncError naming the first eight problems, if there are any."""
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise SyncError(f"{what}: {'; '.join(problems[:8])}{more}")


def differences(wanted: Mapping[str, TensorRecord], found: Mapping[str, TensorRecord]) -> list[str]:
    """A sentence for each tensor that is missing, unexpected or different."""
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted]
    for name, want in wanted.items():
        got = found.get(name, want)
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            problems.append(f"{name} is {got.dtype} {list(got.shape)}, sent was {want.dtype} {list(want.shape)}")
        elif want.fingerprint != got.fingerprint:
            problems.append(f"{name} has other values than were sent")
    return problems
