"""Data set rows from a local file or the Hugging Face hub, checked row by row.

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
_FILE_ENDINGS = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberedRow:
    """A usable row and where it stood."""

    number: int
    """Line number in a text file, counted from 1; row number elsewhere."""
    row: Row


def load_rows(
    source: str, *, split: str, check: CheckRow, max_bad_share: float, report: Callable[[str], None]
) -> list[NumberedRow]:
    """Reads every row of `source`: a .jsonl, .json, .parquet file (text may be .gz) or a hub id `owner/name[:config]`.

    Raises FileNotFoundError for a missing file, and ValueError if more than `max_bad_share` of the rows are malformed
    or none is left. What was skipped goes to `report`, one line per problem for the first few and a count.
    """
    good: list[NumberedRow] = []
    bad: list[tuple[int, str]] = []
    for number, row in _read(source, split):
        reason = row if isinstance(row, str) else check(row)
        if reason is None:
            assert not isinstance(row, str)
            good.append(NumberedRow(number=number, row=row))
        else:
            bad.append((number, reason))
    total = len(good) + len(bad)
    unit = "line" if Path(source).name.removesuffix(".gz").endswith((".jsonl", ".json")) else "row"
    for number, reason in bad[:_SHOWN]:
        report(f"{source}, {unit} {number}: {reason}")
    if bad:
        report(f"{source}: {len(bad)} of {total} rows are malformed")
    if len(bad) > max_bad_share * total:
        raise ValueError(
            f"{source}: {len(bad)} of {total} rows are malformed, more than the allowed share of {max_bad_share:g}; "
            f"first: {unit} {bad[0][0]}, {bad[0][1]}"
        )
    if not good:
        raise ValueError(f"{source} has no rows")
    return good


def _read(source: str, split: str) -> Iterator[tuple[int, Row | str]]:
    """(number, row) pairs, or (number, reason) where a line is no row."""
    if not source:
        raise ValueError("no data given: add --data with a file or a hub id")
    path = Path(source)
    name = path.name.removesuffix(".gz")
    if path.is_file():
        if name.endswith((".jsonl", ".json")):
            yield from _read_json_lines(path)
        elif name.endswith(".parquet"):
            yield from enumerate(_read_parquet(path), 1)
        else:
            raise ValueError(f"{source}: unknown kind of file; known: .jsonl, .json (one object a line), .parquet, .gz")
    elif source.count("/") != 1 or source.startswith((".", "/", "~")) or name.endswith(_FILE_ENDINGS):
        raise FileNotFoundError(f"data file {source} not found (a hub id has the form owner/name or owner/name:config)")
    else:
        yield from enumerate(_hub_dataset(source, split), 1)


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
    return row if isinstance(row, dict) else f"not a JSON object but {type(row).__name__}"


def _read_parquet(path: Path) -> Any:
    """Streamed, so that nothing is copied into a cache."""
    from datasets import load_dataset

    try:
        yield from load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from None


def _hub_dataset(source: str, split: str) -> Any:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        return load_dataset(name, config or None, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(f"data set {source} could not be fetched from the hub: {error}") from error
