"""Tables of (gold, answer, verdict) for the numeric grader: forms of a number, near misses, and attacks.

Also pinned: no usable gold gives None whatever the completion says, and each gold of real data scores 1 against itself.
"""

import gzip
import json
import pickle
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import Sample, Score, ScoreStatus, answer_reward, answers_equal, exact_answer, math_answer, parse_number
from rewards.extract import DEFAULT_METHODS
from rewards.math_answer import normalise_answer

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", Fraction(42)),
        (" 42. ", Fraction(42)),
        ("-7", Fraction(-7)),
        ("\u22127", Fraction(-7)),
        ("+7", Fraction(7)),
        ("007", Fraction(7)),
        ("1,234,567.50", Fraction(2469135, 2)),
        ("14{,}916", Fraction(14916)),
        (r"10,\!000", Fraction(10000)),
        (r"10\,000", Fraction(10000)),
        ("0.75", Fraction(3, 4)),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-6 / 8", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{ 10 }{9}", Fraction(-10, 9)),
        (r"\tfrac{-1}{2}", Fraction(-1, 2)),
        (r"\frac12", Fraction(1, 2)),
        ("1e5", Fraction(100000)),
        ("2.5E-3", Fraction(1, 400)),
        ("1e300", Fraction(10**300)),
        ("50%", Fraction(1, 2)),
        (r"12.5\%", Fraction(1, 8)),
        ("28 percent", Fraction(7, 25)),
        ("$5", Fraction(5)),
        (r"\$1,000", Fraction(1000)),
        ("-$5", Fraction(-5)),
        ("$-5", Fraction(-5)),
        ("5$", Fraction(5)),
        ("$42$", Fraction(42)),
        (r"\(42\)", Fraction(42)),
        (r"$\text{42}$", Fraction(42)),
        ("42 dollars", Fraction(42)),
        ("1 dollar", Fraction(1)),
        (r"90^\circ", Fraction(90)),
        ("90 degrees", Fraction(90)),
    ],
)
def test_numbers(text: str, value: Fraction) -> None:
    assert parse_number(text) == value


NOT_NUMBERS = [
    "",
    ".",
    "-",
    "$",
    "%",
    "inf",
    "-inf",
    "nan",
    "Infinity",
    "1_000",
    "0x1F",
    "1e999999999",
    "1e-999999999",
    "1e301",
    "9" * 65,
    "1" + "0" * 100_000,
    "1,23",
    "1,2345",
    "1, 234",
    "1.2.3",
    "5..",
    "--5",
    "1/0",
    r"\frac{1}{0}",
    r"\frac{1}{2",
    "1/2/3",
    "7 3/4",
    r"7\frac{3}{4}",
    "1 2",
    "4$2",
    "35 cm",
    "42 apples",
    "?42",
    "42!",
    "42\x00",
    "x=42",
    "9**9**9",
    "9^{9^{9}}",
    "2+2",
    "\u0664\u0662",
    "\uff14\uff12",
    "\u00bd",
    "\u00b2",
    "__import__('os')",
]


@pytest.mark.parametrize("text", NOT_NUMBERS, ids=lambda text: text[:20])
def test_not_numbers(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("gold", "answer", "how"),
    [
        ("42", " $42$. ", "string"),
        ("14916", "14,916", "number"),
        ("5", "5.0", "number"),
        ("0.75", r"\frac{3}{4}", "number"),
        ("016", "16", "number"),
        (r"28\%", "28 percent", "number"),
        ("0.5", "50%", "number"),
        ("50", "50%", "percent_sign"),
        (r"28\%", "28", "percent_sign"),
        ("(1,2)", "( 1, 2 )", "string"),
        ("x^2", "$$ x^2 $$.", "string"),
        (r"\text{Evelyn}", "Evelyn", "string"),
        (r"\dfrac{x}{2}", r"\frac{x}{2}", "string"),
        (r"\left( 1, 2 \right)", "(1,2)", "string"),
        ("9" * 80, "9" * 80, "string"),
        ("42", "-42", "different"),
        ("42", "43", "different"),
        ("42", "42 or 43", "different"),
        ("42", "41, 42", "different"),
        ("12", "1 2", "different"),
        ("21/4", r"7\frac34", "different"),
        ("1/3", "0.333333333", "different"),
        ("3.14159", "3.14", "different"),
        ("0.05", "5", "different"),
        ("5", "0.05", "different"),
        ("5", "500%x", "different"),
        ("5000", "50%", "different"),
        ("10000", "10001", "different"),
        ("0.0000001", "0.0000002", "different"),
        ("12345678901234567890", "12345678901234567891", "different"),
        ("8", r"8 \text{ apples and } 3 \text{ oranges}", "different"),
        ("1000", "1_000", "different"),
        ("1", "1e999999999", "different"),
        ("inf", "1e301", "different"),
        ("A", "a", "different"),
        ("42", "", "different"),
    ],
)
def test_answers_equal(gold: str, answer: str, how: str) -> None:
    assert answers_equal(gold, answer) == (how != "different", how)


@given(st.text(alphabet="0123456789.,-+/$%e {}\\fracdt()\u2212", max_size=80))
def test_any_text_is_read_without_an_exception_and_equals_itself(text: str) -> None:
    parse_number(text)
    assert answers_equal(text, text) == (True, "string")


@given(st.integers(min_value=-(10**20), max_value=10**20), st.integers(min_value=1, max_value=10**6))
def test_ways_to_write_a_rational_agree(top: int, bottom: int) -> None:
    assert parse_number(f"{top}/{bottom}") == parse_number(rf"$\frac{{{top}}}{{{bottom}}}$.") == Fraction(top, bottom)
    assert parse_number(f"{top:,}") == top


def score(completion: str, answer: object, prompt: str = "", finish_reason: str = "stop") -> Score:
    row = {"answer": answer}
    result = math_answer.score(Sample(prompt=prompt, completion=completion, finish_reason=finish_reason, row=row))
    assert result.status is ScoreStatus.OK, result.info
    return result


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>6*7</think> <answer>42</answer>", (1.0, "answer_tag", "string")),
        ("<think>6*7</think> <answer>$42.00</answer>", (1.0, "answer_tag", "number")),
        (r"\boxed{42}", (1.0, "boxed", "string")),
        ("#### 42", (1.0, "hash", "string")),
        ("The answer is 42.", (1.0, "answer_line", "string")),
        ("that makes 42", (1.0, "last_number", "string")),
        ("<think>42</think> no idea", (0.0, "none", "no answer found (finish_reason stop)")),
        ("<think><answer>42</answer></think> <answer>41</answer>", (0.0, "answer_tag", "different")),
        ("<answer>42 or 43</answer>", (0.0, "answer_tag", "different")),
        ("<answer>42</answer> or <answer>43</answer>", (0.0, "answer_tag", "different")),
        (r"\boxed{40}, \boxed{41}, \boxed{42}", (0.0, "boxed", "different")),
        ("<answer>41</answer> 42", (0.0, "answer_tag", "different")),
        ("<answer>__import__('os').system('true')</answer>", (0.0, "answer_tag", "different")),
        ("", (0.0, "none", "no answer found (finish_reason stop)")),
    ],
)
def test_math_answer(completion: str, expected: tuple) -> None:
    result = score(completion, "Six times seven, so 41+1.\n#### 42")
    assert (result.value, result.info["method"], result.info["reason"]) == expected


@pytest.mark.parametrize(
    ("answer", "completion", "value"),
    [(42, "#### 42", 1.0), (27.0, r"\boxed{27}", 1.0), ("1,000", "#### 1000", 1.0), ("Paris", "Answer: Paris.", 1.0)],
)
def test_kinds_of_gold(answer: object, completion: str, value: float) -> None:
    assert score(completion, answer).value == value


@pytest.mark.parametrize("completion", ["", "<answer>42</answer>", "<answer>None</answer>", "<answer>nan</answer>"])
@pytest.mark.parametrize(
    "answer", [None, "", " ", "???", "#### ", True, [42], float("nan"), float("inf"), "prose " * 50]
)
def test_no_usable_gold_is_none_whatever_the_completion(answer: object, completion: str) -> None:
    result = score(completion, answer)
    assert result.value is None
    assert "the gold answer" in result.info["reason"]


def test_missing_gold_names_the_columns() -> None:
    result = math_answer.score(Sample(prompt="", completion="42", row={"question": "?", "solution": "42"}))
    assert result.value is None
    assert result.info["reason"] == "the row has no 'answer'; its columns: question, solution"


@pytest.mark.parametrize(
    ("prompt", "completion", "value"),
    [
        ("", "<think>a</think> <answer>42</answer>", 1.0),
        ("", r"hence \boxed{42} and fur", 1.0),
        ("", "<think>a</think> <answer>42", 0.0),
        ("", "#### 42", 0.0),
        ("", "The answer is 42", 0.0),
        ("", r"<think>perhaps \boxed{42}, but", 0.0),
        ("A: <think>", r"perhaps \boxed{42}, but", 0.0),
        ("A: <think>", r"a</think> \boxed{42} and fur", 1.0),
    ],
)
def test_truncated_completions_need_a_closed_answer(prompt: str, completion: str, value: float) -> None:
    for finish_reason in ("length", "abort"):
        assert score(completion, "42", prompt, finish_reason).value == value


def test_info_and_metrics_for_the_log() -> None:
    found = score(f"<answer>{'4' * 5000}</answer>", "42")
    assert found.info == {"extracted": "4" * 200, "method": "answer_tag", "reason": "different", "gold": "42"}
    assert found.metrics == {"answered": 1.0}
    assert score("?", "42").metrics == {"answered": 0.0}


def test_answer_reward_settings() -> None:
    strict = answer_reward(name="strict", methods=["answer_tag"], weight=0.5)
    row = {"answer": "42"}
    assert (strict.name, strict.weight) == ("strict", 0.5)
    assert strict.score(Sample(prompt="", completion=r"\boxed{42}", row=row)).value == 0.0
    assert strict.score(Sample(prompt="", completion="<answer>42.0</answer>", row=row)).value == 1.0
    assert exact_answer.score(Sample(prompt="", completion="<answer>42.0</answer>", row=row)).value == 0.0
    with pytest.raises(ValueError, match="unknown extraction method 'tag'"):
        answer_reward(name="typo", methods=["tag"])
    assert pickle.loads(pickle.dumps(math_answer)).score(Sample(prompt="", completion="42", row=row)).value == 1.0


def test_hostile_answers_cost_linear_time() -> None:
    for piece in ["{", "\\", " ", "a ", "$", ".", "9", "\\left", "\\text{", "1,"]:
        text = piece * (200_000 // len(piece))
        normalise_answer(text)
        assert answers_equal("42", text) == (False, "different")


def rows(*names: str) -> list[dict]:
    """Read `.jsonl` or `.jsonl.gz` files of the shared data folder, or skip where it is absent."""
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
    for row in data:
        gold = row["answer"].rpartition("####")[2].strip()
        assert parse_number(gold) is not None, gold
        sample = Sample(prompt=row["question"], completion=f"<think></think> <answer>{gold}</answer>", row=row)
        assert math_answer.score(sample).value == 1.0, gold


def test_every_math_gold_scores_one_against_itself() -> None:
    for row in rows("math/train.jsonl.gz", "math/test.jsonl.gz"):
        value = score(rf"Hence $\boxed{{{row['answer']}}}$.", row["answer"]).value
        assert value == (1.0 if row["answer"] else None), row["answer"]  # two rows have an empty box as gold


def test_no_false_positive_on_the_public_math_pairs() -> None:
    marked = answer_reward(name="marked", methods=DEFAULT_METHODS[:-1])  # last_number guesses, so it is left out
    wrong = [pair for pair in rows("math_pairs_dev.jsonl") if not pair["expect"]]
    assert len(wrong) > 90
    for pair in wrong:
        if pair["kind"] == "completion":
            sample = Sample(prompt="", completion=pair["pred"], row={"answer": pair["gold"]})
            assert not marked.score(sample).value, pair
        else:
            assert not answers_equal(pair["gold"], pair["pred"])[0], pair
