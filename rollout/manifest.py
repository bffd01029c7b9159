"""What a sync is held against: every tensor's name, shape, dtype and fingerprint, under a version number.

The sender writes the manifest while the tensors pass; an engine compares it with what arrived and with what it holds
afterwards. So a tensor that is missing, given twice, misshapen, stale or altered by one bit is an error that names it,
however little it moves the model's outputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Fingerprint = tuple[int, int, int]


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
    The tensors are on one device, which is waited for once.
    """
    sums = [_sums(tensor) for tensor in tensors]
    return [(a, b, c) for a, b, c in torch.stack(sums).tolist()] if sums else []


def _sums(tensor: Tensor) -> Tensor:
    """[3] int64. The sums widen as they read: no copy of the tensor in wider integers exists at any time."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.itemsize % 4:
        flat = flat.clone()  # begins inside a word
    narrow = {1: torch.uint8, 2: torch.int16}.get(flat.itemsize, torch.int32)
    words = flat.view(narrow if flat.nbytes % 4 else torch.int32)
    rows = len(tensor) if tensor.dim() > 1 and words.numel() % len(tensor) == 0 else 1
    table_RC = words.view(rows, -1)
    rows_R, columns_C = table_RC.sum(1, dtype=torch.int64), table_RC.sum(0, dtype=torch.int64)
    return torch.stack([rows_R.sum(), _weighted(rows_R), _weighted(columns_C)])


def _weighted(sums_N: Tensor) -> Tensor:
    return (sums_N * torch.arange(1, len(sums_N) + 1, device=sums_N.device)).sum()


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
