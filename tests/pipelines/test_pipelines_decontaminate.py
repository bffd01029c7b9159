"""Overlap with evaluation sets, against a plain search that shares no code with it; and `grpo decontaminate`."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.data import iter_rows
from pipelines.overlap import EvaluationText, Overlap, evaluation_texts, row_texts, words_of
from tests.pipelines.conftest import GSM8K, grpo
from tests.pipelines.test_pipelines_task_data import DATA


def plain_words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


def shares_passage(one: str, other: str, length: int) -> bool:
    grams = {tuple(plain_words(other)[i : i + length]) for i in range(len(plain_words(other)) - length + 1)}
    words = plain_words(one)
    return any(tuple(words[i : i + length]) in grams for i in range(len(words) - length + 1))


def evaluation(*texts: str) -> list[EvaluationText]:
    return [EvaluationText(where=f"e, line {i}", text=text) for i, text in enumerate(texts, 1)]


@pytest.mark.parametrize("ngram", [2, 3, 8])
def test_matches_are_those_of_a_plain_search(ngram: int) -> None:
    rng = random.Random(ngram)
    texts = [
        " ".join(rng.choices("abcdef"[: 6 if ngram < 8 else 2], k=rng.randrange(1, 9 + ngram))) for _ in range(400)
    ]
    known, asked = texts[:20], texts[20:]
    overlap = Overlap(evaluation(*known), ngram=ngram, max_shared=20)
    found = [overlap.find([text]) is not None for text in asked]
    assert found == [any(shares_passage(text, one, ngram) for one in known) for text in asked]
    assert 0.02 < sum(found) / len(found) < 0.999


def test_punctuation_and_case_do_not_matter_but_order_does() -> None:
    overlap = Overlap(evaluation("Tom has 3 red apples, and 4 green ones."), ngram=5)
    match = overlap.find(["so: TOM -- has 3 (red) Apples!"])
    assert match is not None and (match.where, match.passage) == ("e, line 1", "tom has 3 red apples")
    assert overlap.find(["Tom has 3 apples red and green 4 ones"]) is None
    assert overlap.find(["Tom has 5 red apples, and 5 green ones."]) is None


def test_short_questions_match_as_a_whole_only() -> None:
    overlap = Overlap([*evaluation("What is 2 + 2?"), EvaluationText(where="e", text="4", is_question=False)])
    assert overlap.find([], questions=["what is 2+2"]) is not None
    assert overlap.find(["what is 2+2"], questions=["what is 2+2 then", "4"]) is None


def test_passages_of_many_problems_are_form() -> None:
    form = "Keep the last digit of the sum that you get when you start at"
    overlap = Overlap(evaluation(*(f"{form} {i}" for i in range(5))), ngram=8, max_shared=4)
    assert overlap.find([f"{form} 9"]) is None
    assert Overlap(evaluation(*(f"{form} {i}" for i in range(5))), ngram=8, max_shared=5).find([form]) is not None
    once_more = [*evaluation(*[f"{form} 3"] * 32), EvaluationText(where="other", text=f"{form} 4")]
    found = Overlap(once_more, ngram=8, max_shared=2).find([form])
    assert found is not None and found.where == "e, line 1", "a problem that is repeated 32 times is one"


def test_chinese_has_words_of_one_character() -> None:
    assert words_of("\u4eca\u5929 3kg\u82f9\u679c!") == ["\u4eca", "\u5929", "3kg", "\u82f9", "\u679c"]


def test_texts_of_a_row() -> None:
    row: dict[str, Any] = {"problem": "p", "solution": "s", "id": "x", "n": 5, "messages": [
        {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}  # fmt: skip
    assert row_texts(row) == (["p", "u"], ["s", "a"])


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_writes_clean_rows_and_a_report(tmp_path: Path) -> None:
    _, _, gsm8k = next(iter_rows(str(GSM8K), ""))
    assert isinstance(gsm8k, dict)
    rows = [{"text": "nothing to see \u00e9", "n": 1}, {"text": f"Copied: {gsm8k['question']}"}, {"question": "2+2?"}]
    data, out = write_rows(tmp_path / "d.jsonl", *rows), tmp_path / "sub" / "clean.jsonl"
    outcome = grpo("decontaminate", data, "--against", GSM8K, "--out", out)
    assert outcome.status == 0 and "3 rows, 1 contaminated" in outcome.out
    assert [json.loads(line) for line in out.read_text().splitlines()] == [rows[0], rows[2]]
    report = json.loads((tmp_path / "sub" / "clean.jsonl.report.json").read_text())
    assert (report["rows"], report["contaminated"], report["by_evaluation_file"]) == (3, 1, {str(GSM8K): 1})
    [match] = report["matches"]
    assert match["row"] == f"{data}, line 2" and match["evaluation"] == f"{GSM8K}, line 1"
    assert match["evaluation_text"] == gsm8k["question"] and match["passage"] in " ".join(plain_words(match["text"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "need a training set, --against FILE... and --out FILE.jsonl"),
        (("d.jsonl", "--against", "e.jsonl", "--out", "d.jsonl"), "d.jsonl exists already"),
        (("d.jsonl", "--against", "bad.jsonl", "--out", "o.jsonl"), "bad.jsonl, line 1: no text in any of question"),
        (("bad.jsonl", "--against", "d.jsonl", "--out", "o.jsonl"), "1 of 1 rows are malformed; first: bad.jsonl"),
        (("d.jsonl", "--against", "d.jsonl", "--out", "o.jsonl", "--ngram", 1), "need ngram >= 2"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "d.jsonl", {"text": "a"})
    write_rows(tmp_path / "bad.jsonl", {"x": "a"})
    assert message in grpo("decontaminate", *arguments).one_line_error()
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}: the data sets lie beside the project")
def test_known_contamination_of_real_sets() -> None:
    """MATH's train set repeats one question of MATH-500, as was counted before without this code."""
    overlap = Overlap(evaluation_texts([str(DATA / "math500/test.jsonl.gz")], split="test"))
    questions = [
        row["problem"] for _, _, row in iter_rows(str(DATA / "math/train.jsonl.gz"), "") if isinstance(row, dict)
    ]
    assert sum(overlap.find([], [question]) is not None for question in questions) == 1
