"""Real data: every gold equals itself, perturbed golds do not, and the public pairs of shared/data.

Skipped where that folder is absent; numbers beside Math-Verify come from `python -m bench.rewards`.
"""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench.math_mutations import perturbed
from rewards import Sample, math_answer, parse_number
from rewards.math_answer import read_gold
from rewards.math_pairs import grade_file, grade_pair

DATA = Path(__file__).parents[3] / "shared" / "data"


def rows(*names: str) -> list[dict[str, Any]]:
    if not DATA.is_dir():
        pytest.skip(f"no data folder at {DATA}")
    contents = [(DATA / name).read_bytes() for name in names]
    texts = [
        gzip.decompress(data) if name.endswith(".gz") else data for name, data in zip(names, contents, strict=True)
    ]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def test_every_gsm8k_gold_scores_one_against_itself() -> None:
    data = rows("gsm8k/train.jsonl.gz", "gsm8k/test.jsonl.gz")
    assert len(data) == 7473 + 1319
    for row in data[::4]:
        gold = row["answer"].rpartition("####")[2].strip()
        assert parse_number(gold) is not None, gold
        sample = Sample(prompt=row["question"], completion=f"<think></think> <answer>{gold}</answer>", row=row)
        assert math_answer.score(sample).value == 1.0, gold


def test_golds_of_math_equal_themselves_and_nothing_near() -> None:
    rng = random.Random(0)
    golds = [str(row["answer"]) for row in rows("math/train.jsonl.gz", "math/test.jsonl.gz")]
    unreadable = [gold for gold in golds if read_gold(gold)[0] is None]
    assert unreadable == ["", ""]  # two rows have an empty box
    wrong = 0
    usable = [gold for gold in golds if gold][::3]
    for gold in usable:
        assert grade_pair(gold, gold).verdict, gold
        assert grade_pair(gold, rf"Hence $\boxed{{{gold}}}$.", "completion").verdict, gold
        near = perturbed(gold, rng)
        wrong += near is not None and bool(grade_pair(gold, near).verdict)
    assert wrong <= len(usable) // 1000, wrong


@pytest.mark.parametrize("name", ["math500/test.jsonl.gz", "aime/aime24.jsonl.gz", "amc23/test.jsonl.gz"])
def test_golds_of_test_sets_equal_themselves(name: str) -> None:
    assert not [row["answer"] for row in rows(name) if not grade_pair(str(row["answer"]), str(row["answer"])).verdict]


def test_public_pairs(tmp_path: Path) -> None:
    pairs = rows("math_pairs_dev.jsonl")
    summary = grade_file(DATA / "math_pairs_dev.jsonl", tmp_path / "out.jsonl")
    graded = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in graded] == [row["id"] for row in pairs]
    assert summary["rows"] == len(pairs)
    assert max(row["seconds"] for row in graded) < 2
    strict = [(pair, row) for pair, row in zip(pairs, graded, strict=True) if pair["policy"] == "strict"]
    wrong = [pair["id"] for pair, row in strict if bool(row["verdict"]) != pair["expect"]]
    assert len(wrong) <= len(strict) // 100, wrong
    assert not [pair["id"] for pair, row in strict if row["verdict"] and not pair["expect"]]


def test_grade_file_needs_no_data_folder(tmp_path: Path) -> None:
    pairs = [
        {"id": "a", "gold": "1/2", "pred": "0.5", "kind": "answer", "expect": True},
        {"id": "b", "gold": "1/2", "pred": r"so \boxed{0.6}", "kind": "completion", "expect": False},
        {"id": "c", "gold": r"\int_0^1", "pred": "1", "kind": "answer"},
        {"id": "d", "gold": r"\pi", "pred": "3.14"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    summary = grade_file(path, tmp_path / "out.jsonl", "lenient")
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in out] == [True, False, None, True]
    assert [row["status"] for row in out] == ["ok", "ok", "unreadable gold", "ok"]
    assert (summary["correct"], summary["wrong"], summary["unreadable_gold"]) == (2, 1, 1)
    assert (summary["agreement"], summary["false_positives"]) == (1.0, 0)
    with pytest.raises(ValueError, match="policy must be one of strict, lenient, got 'loose'"):
        grade_file(path, tmp_path / "out.jsonl", "loose")
    path.write_text('{"id": "a", "gold": "1"}\n')
    with pytest.raises(ValueError, match=r"row 1 of .* has no 'pred'; its keys: id, gold"):
        grade_file(path, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="the kind of a pair must be one of answer, completion, got 'text'"):
        grade_pair("1", "1", "text")
