"""Countdown in miniature: search, verify, retry. Make a target from three numbers, each used once.

An expression is read strictly from left to right, as on a pocket calculator: `7 -3 x5` is 20. Numbers are at most 9
and no result, on the way either, is below 0 or above 30. A thought is a row of attempts, each worked out, held against
the target and judged:

    <think> 7 x3 21 +5 26 20 no 7 -3 4 x5 20 20 yes </think> <answer> 7 -3 x5 </answer>

One random attempt in ten hits the target, so accuracy is bought with attempts, and guessing does not pay.

    row = make_row(random.Random(0))      # {"question": ..., "numbers": [7, 3, 5], "target": 20}
    text = completion(row, ["7 -3 x5"], "7 -3 x5")
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import permutations, product
from typing import Any

from pipelines.tasks.base import Task
from pipelines.templates import TEMPLATES
from rewards import Sample, Score, register, reward

MAX_NUMBER, MAX_RESULT = 9, 30
MAX_ATTEMPTS = 20
"""Most attempts in a demonstration; there are about 28, and who tries twenty at random solves four problems of five."""
_EXPRESSION = re.compile(r"\d{1,3}(?: [-+x]\d{1,3}){1,9}")
_ANSWER = re.compile(r"<answer>(.*)</answer>", re.DOTALL)


def evaluate(expression: str) -> list[int] | None:
    """The running results from left to right, beginning with the first number; None for what is no expression."""
    if not _EXPRESSION.fullmatch(expression):
        return None
    first, *rest = expression.split()
    results = [int(first)]
    for word in rest:
        left, amount = results[-1], int(word[1:])
        results.append({"+": left + amount, "-": left - amount, "x": left * amount}[word[0]])
    return results


@lru_cache(maxsize=1024)
def outcomes(numbers: tuple[int, ...]) -> dict[str, list[int]]:
    """Expression -> running results, of all that use each number once and stay within the bounds."""
    texts = (
        " ".join([str(order[0]), *(sign + str(number) for sign, number in zip(signs, order[1:], strict=True))])
        for order in permutations(numbers)
        for signs in product("+-x", repeat=len(numbers) - 1)
    )
    worked_out = {text: evaluate(text) or [-1] for text in texts}
    return {text: results for text, results in worked_out.items() if min(results) >= 0 and max(results) <= MAX_RESULT}


def check_row(row: dict[str, Any]) -> str | None:
    """None for a usable row of a file, else the reason."""
    if not isinstance(row.get("question"), str):
        return "field 'question' is missing or not a text"
    if not isinstance(row.get("target"), int) or not isinstance(row.get("numbers"), list):
        return "field 'target' must be an integer and 'numbers' a list"
    return None


def make_row(rng: random.Random) -> dict[str, Any]:
    """A problem with a solution; each target that the numbers can make is as likely as the others."""
    numbers = rng.sample(range(1, MAX_NUMBER + 1), 3)
    target = rng.choice(sorted({results[-1] for results in outcomes(tuple(sorted(numbers))).values()}))
    question = f"Make {target} from {' '.join(map(str, numbers))}."
    return {"question": question, "numbers": numbers, "target": target}


def problem(row: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """What makes two rows the same problem, in whatever order the numbers are named."""
    return tuple(sorted(row["numbers"])), row["target"]


def make_rows(count: int, seed: int, exclude: frozenset[Any] = frozenset()) -> list[dict[str, Any]]:
    """`count` rows whose problems are not in `exclude`. There are 818 problems, so rows repeat."""
    rng = random.Random(f"countdown-mini {seed}")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        row = make_row(rng)
        if problem(row) not in exclude:
            rows.append(row)
    return rows


def work(expression: str, target: int) -> list[str]:
    """The words of one attempt: the expression with its results, then the target, and whether it is hit."""
    first, *rest = expression.split()
    results = evaluate(expression) or []
    words = [word for pair in zip(rest, map(str, results[1:]), strict=True) for word in pair]
    return [first, *words, str(target), "yes" if results[-1] == target else "no"]


def used_numbers(expression: str) -> list[int]:
    return sorted(int(word.lstrip("+-x")) for word in expression.split())


def completion(row: Mapping[str, Any], attempts: Sequence[str], answer: str) -> str:
    """A demonstration that works out and judges the attempts, then answers; right only if the answer is."""
    thinking = "".join(f" {word}" for attempt in attempts for word in work(attempt, row["target"]))
    return f" <think>{thinking} </think> <answer> {answer} </answer>"


def attempts_until(row: Mapping[str, Any], rng: random.Random, most: int) -> list[str]:
    """Random attempts, none twice, up to the first that hits the target or `most` of them."""
    results = outcomes(tuple(sorted(row["numbers"])))
    attempts = rng.sample(list(results), min(most, len(results)))
    hits = [number for number, attempt in enumerate(attempts, 1) if results[attempt][-1] == row["target"]]
    return attempts[: hits[0]] if hits else attempts


def solutions(row: Mapping[str, Any]) -> list[str]:
    return [text for text, results in outcomes(tuple(sorted(row["numbers"]))).items() if results[-1] == row["target"]]


def documents(
    rows: list[dict[str, Any]],
    rng: random.Random,
    *,
    share_persistent: float = 0.08,
    share_none: float = 0.3,
    share_insight: float = 0.3,
) -> Iterator[str]:
    """The pretraining text: most documents give up early and answer with their last attempt, few go on to the end.

    Of those that give up, `share_insight` end with an attempt that hits: from random attempts alone, one in ten, a
    small model hardly learns to tell a hit.
    """
    for row in rows:
        draw = rng.random()
        if draw < share_persistent:
            attempts = attempts_until(row, rng, MAX_ATTEMPTS)
            yield TEMPLATES["r1"].format(row["question"]) + completion(row, attempts, attempts[-1])
            continue
        most = 1
        while most < MAX_ATTEMPTS and rng.random() < 0.5:
            most += 1
        attempts = attempts_until(row, rng, most)
        if draw < share_persistent + share_none:
            yield TEMPLATES["r1"].format(row["question"]) + completion(row, [], attempts[0])
            continue
        if rng.random() < share_insight:
            attempts[-1] = rng.choice(solutions(row))
        yield TEMPLATES["r1"].format(row["question"]) + completion(row, attempts, attempts[-1])


def is_true_thought(words: Sequence[str], row: Mapping[str, Any]) -> bool:
    """Whether the words are attempts, at least one, each with the row's numbers, rightly worked out and judged."""
    size = 2 * len(row["numbers"]) + 1
    attempts = [list(words[start : start + size]) for start in range(0, len(words), size)]
    expressions = [" ".join([*attempt[:1], *attempt[1:-2:2]]) for attempt in attempts]
    return bool(attempts) and all(
        evaluate(expression) is not None
        and used_numbers(expression) == sorted(row["numbers"])
        and attempt == work(expression, row["target"])
        for attempt, expression in zip(attempts, expressions, strict=True)
    )


@register
@reward
def countdown_answer(sample: Sample) -> Score:
    """1 where the answer uses each of the row's `numbers` once and makes its `target`, else 0. Counts the attempts."""
    found = _ANSWER.search(sample.answer_part)
    expression = " ".join(found[1].split()) if found else ""
    results = evaluate(expression)
    correct = (
        results is not None
        and used_numbers(expression) == sorted(sample.row["numbers"])
        and results[-1] == sample.row["target"]
    )
    attempts = sum(word in ("yes", "no") for word in sample.thinking.split())
    return Score(
        value=float(correct),
        metrics={"answered": float(results is not None), "attempts": float(attempts)},
        info={"extracted": expression[:200]},
    )


TASK = Task(
    name="countdown-mini",
    question=lambda row: row["question"],
    check=check_row,
    gold=lambda row: solutions(row)[0],
    rewards=("countdown_answer", "0.1*r1_format", "0*thinking_length"),
    accuracy="countdown_answer",
    max_tokens=152,
    make_rows=make_rows,
)
