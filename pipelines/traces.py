"""Traces: sampled completions with their scores and where they come from, one JSON object a line.

Written by `grpo sample`, read by the stages that train on a teacher's text. What a trace says of its prompt and its
completion is exact: prompt + completion is the text that the model saw and wrote, without the end-of-text token.

    write_traces(Path("traces.jsonl"), traces)
    traces = read_traces(Path("traces.jsonl"))
    checkpoint_hash("runs/zero/model")     # "4f2c..."; the same for a copy of the folder
"""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from pipelines.config import describe_error

_WHOLE_BYTES = 1 << 30
_PAGE = 4096
_SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What sampled a trace, and how."""

    model: str
    """Folder of the checkpoint, or the name under which a server offers it."""
    weights: str
    """`checkpoint_hash` of the folder; empty for a server's model."""
    temperature: float
    max_tokens: int
    seed: int
    """Of the whole run that sampled it."""
    top_p: float = 1.0
    top_k: int = 0
    """0 for the whole vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One completion of one prompt."""

    id: str
    """Unique within the file: the prompt's id, a slash, the number of the completion."""
    prompt_id: str
    """Equal for the completions of one prompt."""
    task: str
    template: str
    """Name of the prompt template, `chat` for the tokenizer's chat template."""
    question: str
    """What the template wraps."""
    prompt: str
    """The exact text before the completion."""
    completion: str
    """The exact text that was sampled, without end-of-text."""
    finish_reason: str
    """`stop` if the model ended it, `length` if the token limit did."""
    tokens: int
    """Sampled tokens, the end-of-text token included."""
    reward: float | None
    """The rubric's value; None if it has none."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Each reward's value and metrics."""
    row: dict[str, Any] = field(default_factory=dict)
    """The data set row behind the prompt."""
    source: Source

    def to_json(self) -> str:
        """One line, without a line end. Values of `row` that JSON does not know become text."""
        return json.dumps(asdict(self), ensure_ascii=False, default=str)


_TRACE = TypeAdapter(Trace)


def iter_traces(path: Path) -> Iterator[Trace]:
    """The traces of a .jsonl or .jsonl.gz file, one at a time; fields that a trace does not have are passed over.

    Raises FileNotFoundError, and ValueError that names file and line for what is no trace.
    """
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(line, f"{path}, line {number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); copy it again") from None


def _parse(line: bytes, where: str) -> Trace:
    try:
        return _TRACE.validate_json(line, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "missing":
            raise ValueError(f"{where}: a trace needs the field {problem['loc'][-1]!r}") from None
        raise ValueError(f"{where}: no trace: {describe_error(error)}") from None


def read_traces(path: Path) -> list[Trace]:
    """All traces of a file; raises as `iter_traces` does, and ValueError where an id stands twice or there is none."""
    traces: dict[str, Trace] = {}
    for trace in iter_traces(path):
        if trace.id in traces:
            raise ValueError(f"{path}: the id {trace.id!r} stands there twice; ids must be unique within a file")
        traces[trace.id] = trace
    if not traces:
        raise ValueError(f"{path} has no traces")
    return list(traces.values())


def write_traces(path: Path, traces: Iterable[Trace]) -> int:
    """Writes the file whole or not at all, packed if its name ends in .gz; how many there were. The same traces give
    the same bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    count = 0
    with fresh.open("wb") as file:
        packed = gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) if path.suffix == ".gz" else None
        for trace in traces:
            (packed or file).write(f"{trace.to_json()}\n".encode())
            count += 1
        if packed:
            packed.close()
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    return count


def append_traces(path: Path, traces: Iterable[Trace]) -> None:
    """Adds traces to a .jsonl file; on the disk when it returns. What a kill leaves, `resume_traces` mends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write("".join(f"{trace.to_json()}\n" for trace in traces).encode())
        file.flush()
        os.fsync(file.fileno())


def resume_traces(path: Path) -> list[Trace]:
    """What an interrupted run has appended, [] for no file; a last line that was cut off is removed from the file."""
    if not path.exists():
        return []
    with path.open("rb+") as file:
        file.truncate(_end_of_last_line(file))
    return list(iter_traces(path))


def _end_of_last_line(file: BinaryIO) -> int:
    """Number of bytes up to and with the last line end."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def checkpoint_hash(folder: str | Path) -> str:
    """16 hex digits that tell checkpoints apart by weights, configuration and tokenizer, wherever the folder stands.

    Files up to 1 GiB count whole; of larger safetensors files the header and three pages of each tensor (its beginning,
    middle and end), so that this takes seconds. Raises FileNotFoundError for a folder without safetensors.
    """
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{folder} holds no .safetensors file: give the folder of a Hugging Face checkpoint")
    digest = hashlib.blake2b(digest_size=8)
    for path in [*weights, *(folder / name for name in _SMALL_FILES)]:
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                for piece in _pieces(file, path.stat().st_size):
                    digest.update(piece)
    return digest.hexdigest()


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    if size <= _WHOLE_BYTES:
        while piece := file.read(1 << 20):
            yield piece
        return
    header_bytes = int.from_bytes(file.read(8), "little")
    header = file.read(header_bytes)
    yield header
    tensors: Mapping[str, Any] = json.loads(header)
    spans = sorted(entry["data_offsets"] for name, entry in tensors.items() if name != "__metadata__")
    for start, end in spans:
        for at in sorted({start, (start + end) // 2, max(start, end - _PAGE)}):
            file.seek(8 + header_bytes + at)
            yield file.read(min(_PAGE, end - at))
