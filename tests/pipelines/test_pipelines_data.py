"""Reading data sets.

Pinned: (1) a malformed row is reported with its line number and the reason, counted and skipped up to the stated share,
above it the reading fails; (2) line numbers are those of an editor, whatever ends the lines, and characters that only
Unicode takes for line ends do not split a row; (3) text, plain or gzipped, and parquet give the same rows; (4) what
cannot be read at all is one line that names the file; (5) without network a hub id is one line, too; (6) the real GSM8K
files hold 7473 and 1319 rows and no bad one.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from pipelines.data import NumberedRow, Row, load_rows
from pipelines.tasks import get_task, gsm8k
from tests.pipelines.conftest import GSM8K, ROOT

SHARED_GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
BAD = "not JSON (Expecting property name enclosed in double quotes at column 2)"


def check(row: Row) -> str | None:
    return None if isinstance(row.get("q"), str) else "field 'q' is missing"


Read = Callable[..., tuple[list[tuple[int, Any]], list[str]]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Writes bytes to a file and reads it: (number, value of q) of the good rows, and what was reported."""

    def read_bytes(content: bytes, *, share: float = 0.0, name: str = "d.jsonl") -> tuple[list[Any], list[str]]:
        (tmp_path / name).write_bytes(content)
        reports: list[str] = []
        rows = load_rows(str(tmp_path / name), split="train", check=check, max_bad_share=share, report=reports.append)
        return [(row.number, row.row["q"]) for row in rows], [line.replace(f"{tmp_path}/", "") for line in reports]

    return read_bytes


def lines(*values: str) -> bytes:
    """Rows as JSON lines, nothing escaped."""
    return "".join(json.dumps({"q": value}, ensure_ascii=False) + "\n" for value in values).encode()


MALFORMED = {
    "broken JSON": (b"{bad", BAD),
    "cut off": (b'{"q": "a', "not JSON (Unterminated string starting at at column 7)"),
    "two objects": (b'{"q": "a"} {"q": "b"}', "not JSON (Extra data at column 12)"),
    "list": (b"[1]", "not a JSON object but list"),
    "number": (b"5", "not a JSON object but int"),
    "null": (b"null", "not a JSON object but NoneType"),
    "missing field": (b'{"z": "a"}', "field 'q' is missing"),
    "wrong type": (b'{"q": 5}', "field 'q' is missing"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_reported_and_skipped(read: Read, name: str) -> None:
    content, reason = MALFORMED[name]
    rows, reports = read(lines("a") + content + b"\n" + lines("c"), share=0.34)
    assert rows == [(1, "a"), (3, "c")]
    assert reports == [f"d.jsonl, line 2: {reason}", "d.jsonl: 1 of 3 rows are malformed"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("not UTF-8", b'{"q": "caf\xe9"}'), ("endless number", b'{"q": ' + b"9" * 5000 + b"}"), ("deep", b"[" * 100_000)],
)
def test_a_row_that_cannot_be_decoded_is_malformed_like_any_other(read: Read, name: str, content: bytes) -> None:
    rows, reports = read(lines("a") + content + b"\n" + lines("c"), share=0.34)
    assert rows == [(1, "a"), (3, "c")]
    assert reports[0].startswith("d.jsonl, line 2: ") and len(reports) == 2


def test_above_the_share_reading_fails(read: Read) -> None:
    content = lines(*"abcdefghi") + b"{bad\n"
    assert len(read(content, share=0.1)[0]) == 9
    with pytest.raises(ValueError) as caught:
        read(content, share=0.09)
    start, _, first = str(caught.value).partition("; first: ")
    assert start.endswith("d.jsonl: 1 of 10 rows are malformed, more than the allowed share of 0.09")
    assert first.endswith(f"d.jsonl, line 10: {BAD}")


def test_many_problems_are_reported_in_few_lines(read: Read) -> None:
    rows, reports = read(b"{bad\n" * 30 + lines("a"), share=1.0)
    assert rows == [(31, "a")]
    assert len(reports) <= 10 and reports[-1] == "d.jsonl: 30 of 31 rows are malformed"


def test_blank_lines_are_no_rows_but_count_as_lines(read: Read) -> None:
    rows, reports = read(b"\n\n" + lines("a") + b"   \n{bad\n" + lines("b") + b"\n", share=0.34)
    assert rows == [(3, "a"), (6, "b")]
    assert reports == [f"d.jsonl, line 5: {BAD}", "d.jsonl: 1 of 3 rows are malformed"]


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_file_without_rows_is_refused(read: Read, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"d\.jsonl has no rows$"):
        read(content)


def test_only_line_ends_end_a_line(read: Read) -> None:
    values = ("a\u2028b", "c\u2029d", "e\x85f")  # all three are line ends for str.splitlines
    rows, reports = read(lines(*values) + b"{bad\n", share=0.25)
    assert rows == list(enumerate(values, 1))
    assert reports[0] == f"d.jsonl, line 4: {BAD}"


@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
def test_line_ends_of_other_systems(read: Read, end: bytes) -> None:
    rows, reports = read(lines("a", "b").replace(b"\n", end) + b"{bad" + end + lines("c").strip(), share=0.25)
    assert rows == [(1, "a"), (2, "b"), (4, "c")]
    assert reports[0] == f"d.jsonl, line 3: {BAD}"


def test_no_line_end_at_the_end(read: Read) -> None:
    assert read(lines("a", "b").strip()) == ([(1, "a"), (2, "b")], [])


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_byte_order_mark_is_no_part_of_the_first_row(read: Read, compress: Callable[[bytes], bytes]) -> None:
    name = "d.jsonl" if compress is bytes else "d.jsonl.gz"
    assert read(compress(b"\xef\xbb\xbf" + lines("a", "b")), name=name) == ([(1, "a"), (2, "b")], [])


def test_a_long_file_is_numbered_through(read: Read) -> None:
    """More than one chunk of the reader, with a bad line beyond the first."""
    content = lines(*(f"{i} {'x' * 1000}" for i in range(15_000))) + b"{bad\n" + lines("last")
    rows, reports = read(content, share=0.01)
    assert [number for number, _ in rows] == [*range(1, 15_001), 15_002]
    assert rows[12_345][1].startswith("12345 ") and reports[0].startswith("d.jsonl, line 15001: ")


def test_gzip(read: Read) -> None:
    content = lines("a") + b"{bad\n" + lines("c")
    rows, reports = read(gzip.compress(content), name="d.jsonl.gz", share=0.34)
    assert rows == [(1, "a"), (3, "c")] and reports[0] == f"d.jsonl.gz, line 2: {BAD}"
    assert read(gzip.compress(lines("a")), name="d.json.gz") == ([(1, "a")], [])


def test_parquet(read: Read, tmp_path: Path) -> None:
    table = pyarrow.table({"q": ["a", None, "c"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    rows, reports = read(content, name="d.parquet", share=0.34)
    assert rows == [(1, "a"), (3, "c")]
    assert reports == ["d.parquet, row 2: field 'q' is missing", "d.parquet: 1 of 3 rows are malformed"]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("indent", [None, 1])
def test_one_json_array(read: Read, compress: Callable[[bytes], bytes], indent: int | None) -> None:
    content = b" \n" + json.dumps([{"q": "a"}, 5, {"q": "c"}], indent=indent).encode()
    name = "d.json" if compress is bytes else "d.json.gz"
    rows, reports = read(compress(content), name=name, share=0.34)
    assert rows == [(1, "a"), (3, "c")] and reports[0] == f"{name}, line 2: not a JSON object but int"


def test_what_datasets_saves(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"q": ["a", "b"]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    [arrow] = (tmp_path / "one").glob("*.arrow")
    for source, split, expected in (
        ("one", "any", "ab"),
        ("two", "train", "ab"),
        ("two", "test", "b"),
        (arrow, "", "ab"),
    ):
        rows = load_rows(str(tmp_path / source), split=split, check=check, max_bad_share=0, report=pytest.fail)
        assert "".join(row.row["q"] for row in rows) == expected
    with pytest.raises(ValueError, match="two has no split 'dev', only train, test"):
        load_rows(str(tmp_path / "two"), split="dev", check=check, max_bad_share=0, report=pytest.fail)
    with pytest.raises(ValueError, match="is a folder that `datasets` did not save"):
        load_rows(str(tmp_path), split="train", check=check, max_bad_share=0, report=pytest.fail)


def test_several_files_by_a_glob(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(lines("c") + b"{bad\n" + lines("d"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("a", "b")))
    reports: list[str] = []
    pattern = f"{tmp_path}/*.jsonl*"
    rows = load_rows(pattern, split="train", check=check, max_bad_share=0.5, report=reports.append)
    assert [(row.number, row.row["q"]) for row in rows] == [(1, "a"), (2, "b"), (3, "c"), (5, "d")]
    assert reports == [f"{tmp_path}/b.jsonl, line 2: {BAD}", f"{pattern}: 1 of 5 rows are malformed"]
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.csv"):
        load_rows(f"{tmp_path}/*.csv", split="train", check=check, max_bad_share=0.5, report=print)


def test_a_split_behind_the_hub_id_beats_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> list[Row]:
        asked.append((*arguments, options))
        return [{"q": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("o/n", "o/n:c", "o/n@test", "o/n:c@test"):
        load_rows(source, split="train", check=check, max_bad_share=0, report=print)
    train, test = {"split": "train"}, {"split": "test"}
    assert asked == [("o/n", None, train), ("o/n", "c", train), ("o/n", None, test), ("o/n", "c", test)]


UNREADABLE = {
    "not gzip": ("d.jsonl.gz", lines("a")),
    "cut-off gzip": ("d.jsonl.gz", gzip.compress(lines(*map(str, range(500))))[:-20]),
    "not parquet": ("d.parquet", b"nope"),
    "unknown ending": ("d.csv", b"q\na\n"),
    "cut-off array": ("d.json", json.dumps([{"q": "a"}, {"q": "b"}], indent=1).encode()[:-3]),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named_in_one_line(read: Read, name: str) -> None:
    file, content = UNREADABLE[name]
    with pytest.raises((ValueError, OSError)) as caught:
        read(content, name=file)
    assert file in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_is_no_pattern(read: Read, tmp_path: Path) -> None:
    (tmp_path / "part1.jsonl").write_bytes(lines("wrong"))
    assert read(lines("a"), name="part[1].jsonl") == ([(1, "a")], [])


@pytest.mark.parametrize("source", ["no.jsonl", "folder/no.jsonl.gz", "./owner/name", "/owner/name", "name", "a/b/c"])
def test_a_missing_file_is_named(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"^data file {source} not found .*owner/name"):
        load_rows(source, split="train", check=check, max_bad_share=0, report=print)


def test_a_hub_id_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as caught:
        load_rows("nobody/nothing:main", split="train", check=check, max_bad_share=0, report=print)
    message = str(caught.value)
    assert message.startswith("data set nobody/nothing:main could not be fetched from the hub: ")
    assert "\n" not in message and "Offline" in message


def test_rows_of_gsm8k_from_the_fixture() -> None:
    rows = load_rows(str(GSM8K), split="test", check=gsm8k.check_row, max_bad_share=0, report=print)
    assert [row.number for row in rows] == list(range(1, 9)) and all(isinstance(row, NumberedRow) for row in rows)
    assert rows[0].row["answer"].endswith("#### 18")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "answer": "so\n#### 5"}, None),
        ({"question": " ", "answer": "#### 5"}, "field 'question' is missing or not a text"),
        ({"question": "q", "answer": 5}, "field 'answer' is missing or not a text"),
        ({"answer": "#### 5"}, "field 'question' is missing or not a text"),
        ({"question": "q", "answer": "5"}, "field 'answer' has no `#### result`"),
        ({"question": "q", "answer": "5 ####"}, "field 'answer' has no `#### result`"),
    ],
)
def test_what_makes_a_gsm8k_row(row: Row, reason: str | None) -> None:
    assert gsm8k.check_row(row) == reason


@pytest.mark.skipif(not SHARED_GSM8K.is_dir(), reason=f"no {SHARED_GSM8K}, the whole of GSM8K lies beside the project")
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_the_real_gsm8k(split: str, count: int) -> None:
    reports: list[str] = []
    source = str(SHARED_GSM8K / f"{split}.jsonl.gz")
    rows = load_rows(source, split="", check=get_task("gsm8k").check, max_bad_share=0, report=reports.append)
    assert len(rows) == count and reports == []
    assert [row.number for row in rows] == list(range(1, count + 1))
