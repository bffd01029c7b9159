"""Countdown in TinyZero's form: make an equation from all the numbers, each used once, that equals the target.

A row has `nums` and `target`; where it also has an `answer` with a solution in answer tags, that is the gold. Equations
are read with `ast` and worked out in fractions: nothing is evaluated as code, and powers are refused.
"""

import ast
import operator
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pipelines.tasks.base import Row, Task
from pipelines.tasks.math_rows import worked
from rewards import Sample, Score, extract_answer, register, reward

_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_MAX_CHARS = 200
_QUESTION = (
    "Using the numbers {nums}, create an equation that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and each number can only be used once."
)


def check_row(row: Row) -> str | None:
    """None for a row with numbers and a target, else the reason."""
    nums, target = row.get("nums"), row.get("target")
    if not isinstance(nums, list) or not nums or not all(type(number) is int for number in nums):
        return f"field 'nums' must be a list of whole numbers, got {nums!r}"
    return None if type(target) is int else f"field 'target' must be a whole number, got {target!r}"


def evaluate(equation: str) -> tuple[Fraction, list[int]]:
    """The value of an equation of + - * / and brackets, and the numbers in it, sorted. Raises ValueError for others."""
    if len(equation) > _MAX_CHARS:
        raise ValueError(f"the equation has {len(equation)} characters, more than {_MAX_CHARS}")
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        raise ValueError(f"{ast.unparse(node)!r} is no sum, difference, product, quotient or whole number")

    try:
        result = value(ast.parse(equation.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return result, sorted(numbers)


def judge(equation: str | None, row: Mapping[str, Any]) -> str:
    """ "" for a right equation, else what is wrong."""
    if equation is None:
        return "no answer found"
    try:
        result, numbers = evaluate(equation.partition("=")[0])
    except ValueError as error:
        return str(error)
    if numbers != sorted(row["nums"]):
        return f"uses {numbers}, not {sorted(row['nums'])}"
    return "" if result == row["target"] else f"equals {result}, not {row['target']}"


@register
@reward
def countdown(sample: Sample) -> Score:
    """1 for a right equation in answer tags or a box, 0 for another."""
    found = extract_answer(sample.answer_part, ("answer_tag", "boxed"))
    problem = judge(found.answer, sample.row)
    answered = float(found.answer is not None)
    return Score(
        value=float(not problem), metrics={"answered": answered}, info={"extracted": found.answer, "reason": problem}
    )


def gold(row: Row) -> str:
    """The equation of the row's solution; empty where it has none."""
    tagged = re.search(r"<answer>(.*?)</answer>", str(row.get("answer", "")), re.DOTALL)
    return tagged[1].strip() if tagged else ""


def _question(row: Row) -> str:
    return _QUESTION.format(nums=row["nums"], target=row["target"])


TASK = Task(
    name="countdown",
    question=_question,
    check=check_row,
    gold=gold,
    rewards=("countdown", "0.1*r1_format", "0*thinking_length"),
    accuracy="countdown",
    max_tokens=1024,
    examples=(
        worked(
            _QUESTION.format(nums=[3, 8, 20], target=44),
            "20 + 8 = 28 is too small. 20 * 3 = 60, 60 - 8 = 52 is too large. 8 * 3 = 24, 24 + 20 = 44 is it.",
            "8 * 3 + 20",
        ),
        worked(
            _QUESTION.format(nums=[10, 6, 2, 7], target=33),
            "10 + 6 + 2 + 7 = 25 is too small. 10 * 2 = 20, then 20 + 6 + 7 = 33 is it.",
            "10 * 2 + 6 + 7",
        ),
    ),
    default_data="Jiayi-Pan/Countdown-Tasks-3to4@train",
)
