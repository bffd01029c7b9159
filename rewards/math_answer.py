r"""Comparing a final answer with the gold answer: as text, then as exact rational numbers.

This file is not an algebra system: it never evaluates text (no eval, no sympy). Its work is bounded: what is longer
than 64 characters or has an exponent beyond 300 is no number here.

Usage: `math_answer.score(Sample(prompt=..., completion=r"\boxed{42}", row={"answer": "... #### 42"})).value == 1.0`.

Covered: integers, decimals, thousands separators (`1,234`, `1{,}234`, `1,\!234`, `1\,234`), `a/b`, `\frac{a}{b}`,
`\dfrac`, `\tfrac`, `\frac12`, `1.5e3`; a sign, a dollar sign before or behind, one trailing period, math delimiters or
`\text{}` around the whole; one unit behind: `%`, percent, pct, dollars, degrees, `^\circ`. No other unit is dropped.
Not covered, so compared as text only: roots, pi and other expressions, mixed numbers (`7 3/4`), `3 \times 10^5`,
tuples, sets, intervals, other units (`35 cm`), decimal commas, non-ASCII digits.

Policy:
- Numbers compare exactly: 0.5 = 1/2 = 0.50, but 0.333 is not 1/3 and 3.14 is not 3.1416. Nothing is rounded.
- A percentage is its value: 50% = 0.5. It also equals the bare number 50, because questions that ask for a percentage
  have gold answers of both kinds; `answers_equal` says "percent_sign" then. Two bare numbers never differ by 100.
- Text compares case-sensitively, after removing what does not change the meaning (`normalise_answer`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from rewards.base import RewardFunction, Sample, Score, reward
from rewards.extract import CLOSED_METHODS, DEFAULT_METHODS, extract_answer

CompareAnswers = Callable[[str, str], tuple[bool, str]]

_MAX_NUMBER_CHARS = 64
_MAX_EXPONENT = 300
_MAX_GOLD_CHARS = 200
_MAX_LOGGED_CHARS = 200

_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|boxed|fbox)\{([^{}]*)\}")
_DIGITS = r"(?:[0-9]{1,3}(?:(?:,|\{,\}|,\\!|\\,)[0-9]{3})+|[0-9]+)"
_SIMPLE = r"[-+]?[0-9]+(?:\.[0-9]+)?"
_NUMBER = re.compile(
    rf"""
    (?:\\?\$\s*)? (?P<sign>[-+]?) \s* (?:\\?\$\s*)?
    (?: (?P<decimal>{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+) (?:[eE](?P<exponent>[-+]?[0-9]+))?
      | (?P<over>{_DIGITS}) \s*/\s* (?P<under>{_DIGITS})
      | \\[dt]?frac \s* (?:\{{\s*(?P<top>{_SIMPLE})\s*\}}|(?P<top_digit>[0-9]))
                    \s* (?:\{{\s*(?P<bottom>{_SIMPLE})\s*\}}|(?P<bottom_digit>[0-9]))
    )
    \s* (?: (?P<percent>\\?%|percent|pct) | \\?\$ | dollars? | degrees? | \^\\circ | \^\{{\\circ\}} )?
    """,
    re.VERBOSE,
)


def parse_number(text: str) -> Fraction | None:
    """Read `text` as one number, 50% as 1/2; None where it is not one of the forms this module covers."""
    number = _read_number(text)
    return None if number is None else number[0]


def _read_number(text: str) -> tuple[Fraction, bool] | None:
    """Return the exact value, and whether a percent sign scaled it by 1/100."""
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    match = _NUMBER.fullmatch(_strip_marks(text))
    if match is None:
        return None
    value = _fraction(match)
    if value is None:
        return None
    if match["sign"] == "-":
        value = -value
    is_percent = match["percent"] is not None
    return (value / 100 if is_percent else value), is_percent


def _fraction(match: re.Match[str]) -> Fraction | None:
    """Turn a match of `_NUMBER` into its unsigned value; None for a zero denominator or a huge exponent."""
    if match["decimal"]:
        exponent = int(match["exponent"] or "0")
        if abs(exponent) > _MAX_EXPONENT:
            return None
        return _exact(match["decimal"]) * Fraction(10) ** exponent
    top = _exact(match["over"] or match["top"] or match["top_digit"])
    bottom = _exact(match["under"] or match["bottom"] or match["bottom_digit"])
    return None if bottom == 0 else top / bottom


def _exact(digits: str) -> Fraction:
    return Fraction(re.sub(r"[^-0-9.]", "", digits))


def _strip_marks(text: str) -> str:
    """Remove what may surround an answer (see the module docstring), and write the Unicode minus in ASCII."""
    text = text.strip().removesuffix(".").rstrip().replace("\u2212", "-")
    for left, right in _DELIMITERS:
        if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
            text = text[len(left) : -len(right)].strip()
            break
    wrapped = _TEXT_COMMAND.fullmatch(text)
    return wrapped[1].strip() if wrapped else text


def normalise_answer(text: str) -> str:
    r"""Write equal texts equally: without math delimiters or `\text{}` around the whole, a trailing period, sizing and
    spacing commands, and spaces except between two letters or digits (`1 2` is not `12`)."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\!", "", _strip_marks(text))
    text = re.sub(r"\\[,;: ]", " ", text)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text).replace("{,}", ",")
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(text.split()))


def texts_equal(gold: str, predicted: str) -> tuple[bool, str]:
    """Compare as normalised text; return the verdict and "string" or "different"."""
    equal = normalise_answer(gold) == normalise_answer(predicted)
    return equal, "string" if equal else "different"


def answers_equal(gold: str, predicted: str) -> tuple[bool, str]:
    """Compare as text, then as numbers; return the verdict and "string", "number", "percent_sign" or "different"."""
    if texts_equal(gold, predicted)[0]:
        return True, "string"
    gold_number, predicted_number = _read_number(gold), _read_number(predicted)
    if gold_number is None or predicted_number is None:
        return False, "different"
    (gold_value, gold_percent), (value, percent) = gold_number, predicted_number
    if gold_value == value:
        return True, "number"
    if gold_percent != percent and gold_value == (value / 100 if gold_percent else value * 100):
        return True, "percent_sign"
    return False, "different"


def gold_answer(row: Mapping[str, Any]) -> tuple[str | None, str]:
    """Read the gold answer of a data set row: what follows the last `####` if there is one, else the whole.

    Returns None and a reason where there is no usable gold: not in the row, neither text nor a finite number, without a
    letter or digit, or so long that it is a worked solution rather than an answer.
    """
    if "answer" not in row:
        return None, f"the row has no 'answer'; its columns: {', '.join(map(str, row)) or 'none'}"
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None, f"the gold answer must be a string or a number, got {type(answer).__name__}"
    text = str(answer).rpartition("####")[2].strip()
    if len(text) > _MAX_GOLD_CHARS:
        return None, f"the gold answer has {len(text)} characters, more than {_MAX_GOLD_CHARS}; give the bare answer"
    if not any(map(str.isalnum, text)) or text.lower() in ("nan", "inf", "-inf"):
        return None, f"the gold answer has no letter or digit, or is not finite: {text!r}"
    return text, ""


def answer_reward(
    *,
    name: str,
    methods: Sequence[str] = DEFAULT_METHODS,
    equal: CompareAnswers = answers_equal,
    weight: float = 1.0,
) -> RewardFunction:
    """Make a reward that is 1 where the answer found by `methods` is `equal` to the row's gold answer, else 0.

    None depends on the row alone (no usable gold), never on the completion: a wrong answer cannot leave the average.
    A completion that did not stop by itself counts only with a closed answer, and not inside unfinished thinking.
    """
    extract_answer("", methods)  # refuses unknown methods now, not at the first sample
    return reward(name=name, weight=weight)(partial(_score_answer, methods=methods, equal=equal))


def _score_answer(sample: Sample, methods: Sequence[str], equal: CompareAnswers) -> Score:
    gold, problem = gold_answer(sample.row)
    if gold is None:
        return Score(value=None, info={"reason": problem})
    found = extract_answer(sample.answer_part, _usable_methods(sample, methods))
    if found.answer is not None:
        correct, reason = equal(gold, found.answer)
    else:
        correct, reason = False, f"no answer found (finish_reason {sample.finish_reason})"
    return Score(
        value=float(correct),
        metrics={"answered": float(found.answer is not None)},
        info={
            "extracted": found.answer and found.answer[:_MAX_LOGGED_CHARS],
            "method": found.method,
            "reason": reason,
            "gold": gold,
        },
    )


def _usable_methods(sample: Sample, methods: Sequence[str]) -> Sequence[str]:
    """Keep the methods that cannot be fooled by a cut-off end; none at all inside unfinished thinking."""
    if sample.finish_reason == "stop":
        return methods
    thinks = sample.think_prefilled or "<think>" in sample.completion
    if thinks and "</think>" not in sample.completion:
        return ()
    return [method for method in methods if method in CLOSED_METHODS]


math_answer = answer_reward(name="math_answer")
exact_answer = answer_reward(name="exact_answer", equal=texts_equal)
