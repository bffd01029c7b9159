"""Data set rows from a local file or the Hugging Face hub, checked row by row.

Files: JSON lines or one JSON array, also gzipped; parquet; arrow; a folder that `datasets` saved; several by a glob.
A malformed row is reported with its line number and the reason, counted, and skipped, up to a stated share of all rows.

    rows = load_rows("train.jsonl.gz", split="train", check=task.check, max_bad_share=0.01, report=print)
"""

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow

Row = dict[str, Any]
CheckRow = Callable[[Row], str | None]
"""None if the row is usable, else the reason why not."""

_SHOWN = 5
_TEXT_ENDINGS = (".jsonl", ".json")
_FILE_ENDINGS = (*_TEXT_ENDINGS, ".parquet", ".arrow")


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberedRow:
    """A usable row and where it stood."""

    number: int
    """Line number in a text file, counted from 1; row number elsewhere. Of several files, counted on through them."""
    row: Row


def load_rows(
    source: str, *, split: str, check: CheckRow, max_bad_share: float, report: Callable[[str], None]
) -> list[NumberedRow]:
    """Reads every row of `source`: a .jsonl, .json, .parquet or .arrow file (text may be .gz), a folder that `datasets`
    saved, several of them as a glob such as "part-*.jsonl", or a hub id `owner/name[:config][@split]`.

    Raises FileNotFoundError for a missing file, and ValueError if more than `max_bad_share` of the rows are malformed
    or none is left. What was skipped goes to `report`, one line per problem for the first few and a count.
    """
    good: list[NumberedRow] = []
    bad: list[str] = []
    before = 0
    for part in _parts(source):
        unit = "line" if Path(part).name.removesuffix(".gz").endswith(_TEXT_ENDINGS) else "row"
        number = 0
        for number, row in _read(part, split):
            reason = row if isinstance(row, str) else check(row)
            if reason is None:
                assert not isinstance(row, str)
                good.append(NumberedRow(number=before + number, row=row))
            else:
                bad.append(f"{part}, {unit} {number}: {reason}")
        before += number
    total = len(good) + len(bad)
    for problem in bad[:_SHOWN]:
        report(problem)
    if bad:
        report(f"{source}: {len(bad)} of {total} rows are malformed")
    if len(bad) > max_bad_share * total:
        raise ValueError(
            f"{source}: {len(bad)} of {total} rows are malformed, more than the allowed share of {max_bad_share:g}; "
            f"first: {bad[0]}"
        )
    if not good:
        raise ValueError(f"{source} has no rows")
    return good


def _parts(source: str) -> list[str]:
    """The files that a glob stands for, in the order of their names; the source itself where it is none."""
    if not glob.has_magic(source) or Path(source).exists():
        return [source]
    found = sorted(glob.glob(source, recursive=True))
    if not found:
        raise FileNotFoundError(f"no file matches {source}")
    return found


def _read(source: str, split: str) -> Iterator[tuple[int, Row | str]]:
    """(number, row) pairs, or (number, reason) where a line is no row."""
    if not source:
        raise ValueError("no data given: add --data with a file or a hub id")
    path = Path(source)
    name = path.name.removesuffix(".gz")
    if path.is_dir() and any((path / found).is_file() for found in ("state.json", "dataset_dict.json")):
        yield from enumerate(_saved_dataset(path, split), 1)
    elif path.is_dir():
        raise ValueError(f"{source} is a folder that `datasets` did not save; for its files write {source}/*.jsonl")
    elif path.is_file():
        if name.endswith(_TEXT_ENDINGS):
            array = _read_json_array(path) if name.endswith(".json") else None
            yield from _read_json_lines(path) if array is None else enumerate(array, 1)
        elif name.endswith((".parquet", ".arrow")):
            yield from enumerate(_read_table(path), 1)
        else:
            raise ValueError(f"{source}: unknown kind of file; known: .jsonl, .json, .parquet, .arrow, text also .gz")
    elif source.count("/") != 1 or source.startswith((".", "/", "~")) or name.endswith(_FILE_ENDINGS):
        raise FileNotFoundError(f"data file {source} not found (a hub id has the form owner/name or owner/name:config)")
    else:
        yield from enumerate(_hub_dataset(source, split), 1)


def _read_json_array(path: Path) -> list[Row | str] | None:
    """The rows of a file that is one array, or the reasons why they are none; None for a file of lines."""
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            if not file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                return None
            file.seek(0)
            values = json.loads(file.read())
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error):
        return None  # read as lines, which says where it breaks
    return [value if isinstance(value, dict) else _no_object(value) for value in values]


def _no_object(value: object) -> str:
    return f"not a JSON object but {type(value).__name__}"


def _read_json_lines(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Read here and not by `datasets`, whose JSON reader cannot say which line is broken."""
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse_line(line.removesuffix("\n"))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); copy it again") from None


def _parse_line(line: str) -> Row | str:
    """The row, or the reason why the line is none."""
    try:
        line.encode()
        row = json.loads(line)
    except UnicodeEncodeError:  # a byte that is no UTF-8 was read as a lone surrogate
        return "not UTF-8"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return f"not usable JSON ({str(error).split(';')[0]})"
    return row if isinstance(row, dict) else _no_object(row)


def _read_table(path: Path) -> Any:
    """Streamed, so that nothing is copied into a cache."""
    from datasets import load_dataset

    kind = path.suffix.removeprefix(".")
    try:
        yield from load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a file of the kind {kind} ({error})") from None


def _saved_dataset(path: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(path))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"{path} has no split {split!r}, only {', '.join(map(str, saved))}; choose one with --split")
    return saved[split]


def _hub_dataset(source: str, split: str) -> Any:
    """A split behind `@` beats the one asked for: many sets for evaluation have a single split, of any name."""
    from datasets import load_dataset

    source, _, only = source.partition("@")
    split = only or split
    name, _, config = source.partition(":")
    try:
        return load_dataset(name, config or None, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(f"data set {source} could not be fetched from the hub: {error}") from error
