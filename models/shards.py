"""The safetensors files of a checkpoint folder: one `model.safetensors`, or shards with an index.

Reading checks every header first, so that a damaged checkpoint is refused before any weight is read, and then gives one
tensor at a time. Writing holds one shard at a time. Not here: what the tensors mean.

    files = TensorFiles("checkpoint_dir")
    embedding = files.read("model.embed_tokens.weight")
    write_shards(Path("out_dir"), tensors, max_shard_bytes=5_000_000_000)
"""

import errno
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

DEFAULT_SHARD_BYTES = 5_000_000_000
FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")
"""Dtypes, as safetensors names them, that a weight outside FP8 may have."""

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
_REMEDY = "download or copy the checkpoint again"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where one tensor lies and what it is, as its file's header says."""

    path: Path
    dtype: str
    """As safetensors names it: F32, BF16, F8_E4M3, I64."""
    shape: tuple[int, ...]
    num_bytes: int


class TensorFiles:
    """All tensors of a checkpoint folder by name, file by file; only headers are read before `read`.

    Raises FileNotFoundError for an absent file, ValueError for a file that is damaged or contradicts the index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self._open: dict[Path, Any] = {}
        weight_map = _read_index(self.folder)
        for path in _tensor_files(self.folder, weight_map):
            self._add(path)
        if weight_map is not None:
            self._compare(weight_map)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in the dtype it is stored in; may share memory with the file, so never write to it."""
        path = self.tensors[name].path
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            return self._open[path].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: {name} cannot be read: {error}; {_REMEDY}") from None

    def _add(self, path: Path) -> None:
        problems = []
        for name, tensor in sorted(_read_header(path).items(), key=lambda item: item[1][0]):
            if name in self.tensors:
                problems.append(f"{name} is in {self.tensors[name].path.name} and in {path.name}")
            self.tensors[name] = tensor[1]
        refuse(problems, str(self.folder), f"tensors are stored twice ({_REMEDY})")

    def _compare(self, weight_map: dict[str, str]) -> None:
        """Index and shards must name the same tensors in the same files."""
        problems = []
        for name, file in weight_map.items():
            if name not in self.tensors:
                problems.append(f"{name} should be in {file}, which lacks it")
            elif self.tensors[name].path.name != file:
                problems.append(f"{name} should be in {file}, but is in {self.tensors[name].path.name}")
        problems += [
            f"{name} in {tensor.path.name} is not in the index"
            for name, tensor in self.tensors.items()
            if name not in weight_map
        ]
        refuse(problems, str(self.folder), f"tensors contradict {INDEX_NAME} ({_REMEDY})")


def refuse(problems: Sequence[str], source: str, what: str) -> None:
    """Raises ValueError naming the first problems, if there are any."""
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source}: {len(problems)} {what}: {shown}")


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name, None without an index."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        names = {Path(file).name == file for file in weight_map.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of tensors ({type(error).__name__}: {error}); {_REMEDY}") from None
    if names - {True}:
        raise ValueError(f"{path}: names files outside {folder}")
    if (folder / SINGLE_NAME).is_file() and SINGLE_NAME not in weight_map.values():
        raise ValueError(
            f"{folder} holds {SINGLE_NAME} beside {INDEX_NAME}, which does not name it: remove one of them"
        )
    return weight_map


def _tensor_files(folder: Path, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is None:
        if not (folder / SINGLE_NAME).is_file():
            raise FileNotFoundError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}")
        return [folder / SINGLE_NAME]
    files = [folder / name for name in sorted(set(weight_map.values()))]
    if absent := [path.name for path in files if not path.is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent[:8])}, named by {INDEX_NAME}; {_REMEDY}")
    return files


def _read_header(path: Path) -> dict[str, tuple[int, StoredTensor]]:
    """Name -> place in the file and description. Raises ValueError for a file that is cut short or no safetensors."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size} bytes")
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            stored = StoredTensor(path=path, dtype=entry["dtype"], shape=tuple(entry["shape"]), num_bytes=end - start)
            tensors[name] = (start, stored)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: damaged or not a safetensors file ({type(error).__name__}: {error}); {_REMEDY}"
        ) from None
    needed = 8 + length + max((start + stored.num_bytes for start, stored in tensors.values()), default=0)
    if size != needed:
        cut = [name for name, (start, stored) in tensors.items() if 8 + length + start + stored.num_bytes > size]
        lost = f", which cuts {len(cut)} tensors, the first {cut[0]}" if cut else ""
        raise ValueError(f"{path}: has {size} bytes, its header needs {needed}{lost}; {_REMEDY}")
    return tensors


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return content


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> int:
    """Writes a stream of tensors into an existing folder; returns their bytes.

    One `model.safetensors` if all fit into `max_shard_bytes`, else shards with an index; a tensor is never split. Holds
    the tensors of one shard at a time: about `max_shard_bytes` beside what the stream itself holds, and nothing where
    the stream gives views of memory that lives anyway. Raises OSError when the disk is full.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be >= 1, got {max_shard_bytes}")
    shard: dict[str, Tensor] = {}
    addresses: set[int] = set()
    shards: list[list[str]] = []
    seen: set[str] = set()
    written = pending = 0

    def flush() -> None:
        shards.append(list(shard))
        _save(shard, folder / f"{len(shards)}.part")
        shard.clear()
        addresses.clear()

    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"tensor {name} is given twice")
        seen.add(name)
        if shard and pending + tensor.nbytes > max_shard_bytes:
            flush()
            pending = 0
        stored = tensor.detach().cpu().contiguous()
        if stored.data_ptr() in addresses:  # two names for one memory, which safetensors refuses
            stored = stored.clone()
        addresses.add(stored.data_ptr())
        shard[name] = stored
        pending += tensor.nbytes
        written += tensor.nbytes
    flush()
    _name_shards(folder, shards, written)
    return written


def _save(shard: dict[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode  # what the user's umask gives; safetensors would leave the file to its owner alone
    try:
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        code = errno.ENOSPC if f"os error {errno.ENOSPC}" in str(error) else errno.EIO
        raise OSError(code, f"{path} cannot be written: {error}") from None


def _name_shards(folder: Path, shards: list[list[str]], total_size: int) -> None:
    """Final names, which say how many shards there are, and the index."""
    if len(shards) == 1:
        (folder / "1.part").rename(folder / SINGLE_NAME)
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
