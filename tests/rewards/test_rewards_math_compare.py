"""The catalogue of answers that are, and are not, the same: math_same.txt and math_different.txt, one pair a line.

Also pinned: every example of docs/math_answers.md, the reason of a verdict, what the lenient policy adds, and threads.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards.math_compare import compare
from rewards.math_pairs import grade_pair
from rewards.math_scalars import LENIENT
from rewards.math_verify_backend import math_verify_equal

DOCUMENT = Path(__file__).parents[2] / "docs" / "math_answers.md"
_ROW = re.compile(r"^\| `(.+?)` \| `(.+?)` \| (yes|no) \|", re.MULTILINE)


def catalogue(name: str) -> list[tuple[str, str]]:
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split(" | ", 1)) for line in lines if line and not line.startswith("#")]
    assert len(pairs) > 200 and all(len(pair) == 2 for pair in pairs)
    return [(gold, predicted) for gold, predicted in pairs]


def test_the_same_answers() -> None:
    assert not [pair for pair in catalogue("math_same.txt") if not grade_pair(*pair).verdict]


def test_different_answers() -> None:
    wrong = [pair for pair in catalogue("math_different.txt") if grade_pair(*pair).verdict is not False]
    assert not wrong


def test_every_gold_of_the_catalogue_equals_itself() -> None:
    golds = {gold for name in ("math_same.txt", "math_different.txt") for gold, _ in catalogue(name)}
    assert not [gold for gold in golds if not grade_pair(gold, gold).verdict]


def test_every_example_of_the_document() -> None:
    examples = _ROW.findall(DOCUMENT.read_text(encoding="utf-8"))
    assert len(examples) > 90
    wrong = [(gold, answer) for gold, answer, same in examples if grade_pair(gold, answer).verdict != (same == "yes")]
    assert not wrong


@pytest.mark.parametrize(
    ("gold", "predicted", "equal", "reason"),
    [
        ("42", " $42$. ", True, "string"),
        ("42", "42.0", True, "number"),
        ("50", r"50\%", True, "percent_sign"),
        ("42", "43", False, "different"),
        (r"\frac{\pi}{2}", "pi/2", True, "value"),
        ("C", "(C)", True, "choice"),
        ("12:00", "1:00", False, "different"),
        (r"\text{the red one}", "red one", True, "value"),
        ("42", "", False, "empty"),
        ("42", r"\frac{42", False, "not read: '}' expected at 'the end'"),
        ("42", "42\x00", False, "too long, or control characters"),
        ("42", "?", False, "not read: unexpected character '?'"),
        (r"\sqrt{2}", r"\sum_{k=1}^{1999} \sqrt{k}", False, "refused: too much work"),
    ],
)
def test_reasons(gold: str, predicted: str, equal: bool, reason: str) -> None:
    verdict = compare(gold, predicted)
    assert (verdict.equal, verdict.reason) == (equal, reason)


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [(r"\pi", "3.14"), (r"\frac{1}{3}", "0.333"), ("45", r"\sum_{k=0}^{9} k"), (r"\frac{1}{2}", "frac{1}{2}")],
)
def test_the_lenient_policy_adds_these(gold: str, predicted: str) -> None:
    assert not compare(gold, predicted).equal
    assert compare(gold, predicted, LENIENT).equal


def test_the_lenient_policy_is_not_blind() -> None:
    wrong = [("5", "6"), (r"\pi", "3.15"), (r"\frac{1}{3}", "0.33"), ("5", "5 or 6"), (r"\frac{1}{2}", "frac{2}{1}")]
    assert not [pair for pair in wrong if compare(*pair, LENIENT).equal]


def test_threads_agree_with_one_thread() -> None:
    pairs = catalogue("math_same.txt")[::3]
    with ThreadPoolExecutor(8) as threads:  # mpmath's global context would give wrong verdicts here
        assert all(threads.map(lambda pair: compare(*pair).equal, pairs * 4)) == all(
            compare(*pair).equal for pair in pairs
        )


def test_math_verify_as_a_second_backend() -> None:
    pytest.importorskip("math_verify")
    assert math_verify_equal(r"\frac{1}{2}", "0.5", timeout_s=60) == (True, "math_verify")
    assert math_verify_equal(r"\frac{1}{2}", "0.6", timeout_s=60) == (False, "math_verify")
    equal, reason = math_verify_equal("16", "9^{9^{9^{9}}}", timeout_s=0.5)
    assert not equal and reason.startswith(("timeout", "Math-Verify failed", "math_verify"))
