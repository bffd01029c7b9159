"""The math reward from completion to `Score`: forms of a plain number, extraction, strict mode, golds without a score.

Also pinned: no usable gold gives None whatever the completion says. What equals what: test_rewards_math_compare.py.
"""

import pickle
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import Sample, Score, ScoreStatus, answer_reward, answers_equal, exact_answer, math_answer, parse_number
from rewards.math_answer import strict_math_answer


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
        ("5..", Fraction(5)),
        ("\uff14\uff12", Fraction(42)),
        ("\u00bd", Fraction(1, 2)),
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
    "5/",
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
    "\u00b2",
    "__import__('os')",
]


@pytest.mark.parametrize("text", NOT_NUMBERS, ids=lambda text: text[:20])
def test_not_numbers(text: str) -> None:
    assert parse_number(text) is None


@given(st.text(alphabet="0123456789.,-+/$%e {}\\fracdt()\u2212", max_size=80))
def test_any_text_is_read_without_an_exception_and_equals_itself(text: str) -> None:
    parse_number(text)
    assert answers_equal(text, text) == ((True, "string") if text.strip() else (False, "empty"))


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
        ("<answer>__import__('os').system('true')</answer>", (0.0, "answer_tag", "not read: unexpected character '.'")),
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
    assert found.info == {
        "extracted": "4" * 200,
        "method": "answer_tag",
        "reason": "too long, or control characters",
        "gold": "42",
    }
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


@pytest.mark.parametrize(
    ("completion", "value", "reason"),
    [
        (r"so \boxed{42}", 1.0, "string"),
        (r"\boxed{42} ... \boxed{42.0}", 1.0, "number"),
        (r"\boxed{41} no wait \boxed{42}", 0.0, "more than one answer: 41"),
        (r"\boxed{41} or \boxed{42}", 0.0, "more than one answer: 41"),
        (r"<think>\boxed{41}</think> \boxed{42}", 1.0, "string"),
        ("The answer is 42.", 0.0, "no answer found (finish_reason stop)"),
        (" ".join(rf"\boxed{{{n}}}" for n in range(50)), 0.0, None),
    ],
)
def test_strict_mode_asks_for_one_boxed_answer(completion: str, value: float, reason: str | None) -> None:
    result = strict_math_answer.score(Sample(prompt="", completion=completion, row={"answer": "42"}))
    assert result.value == value
    assert reason is None or result.info["reason"] == reason


@pytest.mark.parametrize("answer", [r"\frac{1}{", r"\int_0^1 x", "x = ", "((1)"])
def test_unreadable_gold_is_none_and_says_why(answer: str) -> None:
    for completion in ("", rf"\boxed{{{answer}}}"):
        result = score(completion, answer)
        assert result.value is None
        assert result.info["reason"].startswith("the gold answer cannot be read")
