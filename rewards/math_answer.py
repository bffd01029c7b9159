r"""Rewards for answers to mathematical questions: find the final answer, compare it with the row's gold answer.

Extraction is in extract.py, comparison in math_compare.py, every convention in docs/math_answers.md. This file joins
them into reward functions and says in each `Score` what was extracted, how, and why it was right or wrong.

Usage: `math_answer.score(Sample(prompt=..., completion=r"\boxed{42}", row={"answer": "... #### 42"})).value == 1.0`.

Covered: any completion and any gold text, in bounded time and memory, in any thread; nothing is evaluated as code.
Not covered: proofs, integrals and limits left unevaluated, answers of more than 2,000 characters.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from rewards.base import RewardFunction, Sample, Score, reward
from rewards.extract import CLOSED_METHODS, DEFAULT_METHODS, Extraction, extract_answer, own_turn
from rewards.math_choice import is_time
from rewards.math_compare import compare
from rewards.math_nodes import Refused
from rewards.math_number import parse_number, read_number
from rewards.math_parser import parse
from rewards.math_scalars import LENIENT, STRICT, MathPolicy
from rewards.math_text import has_control_characters, normalise_answer, words

__all__ = [
    "CompareAnswers",
    "answer_reward",
    "answers_equal",
    "exact_answer",
    "gold_answer",
    "math_answer",
    "normalise_answer",
    "parse_number",
    "strict_math_answer",
    "texts_equal",
]

CompareAnswers = Callable[[str, str], tuple[bool, str]]

_MAX_GOLD_CHARS = 280
_MAX_LOGGED_CHARS = 200
STRICT_METHODS = ("boxed",)


def texts_equal(gold: str, predicted: str) -> tuple[bool, str]:
    """Compare as normalised text; return the verdict and "string" or "different"."""
    equal = normalise_answer(gold) == normalise_answer(predicted)
    return equal, "string" if equal else "different"


def answers_equal(gold: str, predicted: str, policy: MathPolicy = STRICT) -> tuple[bool, str]:
    """Compare as answers; return the verdict and the reason, see `math_compare.compare`."""
    verdict = compare(gold, predicted, policy)
    return verdict.equal, verdict.reason


lenient_answers_equal = partial(answers_equal, policy=LENIENT)


@lru_cache(maxsize=4096)
def read_gold(text: str) -> tuple[str | None, str]:
    """The bare answer in a gold text: what follows the last `####`, else the last box, else the whole.

    None and a reason where that is no usable gold: without a letter or digit, not finite, too long, or not an answer
    that can be read: such rows say nothing about a completion.
    """
    bare = text.rpartition("####")[2].strip()
    if "boxed" in bare or "fbox" in bare:
        bare = extract_answer(bare, ("boxed",)).answer or bare
    if len(bare) > _MAX_GOLD_CHARS:
        return None, f"the gold answer has {len(bare)} characters, more than {_MAX_GOLD_CHARS}; give the bare answer"
    if not any(map(str.isalnum, bare)) or bare.lower() in ("nan", "inf", "-inf"):
        return None, f"the gold answer has no letter or digit, or is not finite: {bare!r}"
    if has_control_characters(bare):
        return None, f"the gold answer has control characters: {bare!r}"
    if read_number(bare) is not None or _is_prose(bare) or is_time(bare):
        return bare, ""
    parsed = parse(bare, True, frozenset())  # as math_compare.py calls it, so that it is read once
    if isinstance(parsed, Refused):
        return None, f"the gold answer cannot be read: {bare!r}: {parsed}"
    return bare, ""


def _is_prose(text: str) -> bool:
    """Whether a text is made of words, perhaps with some mathematics: compared as words."""
    plain = words(re.sub(r"\\(?!text|mbox|mathrm)[A-Za-z]+", " ", text))
    return sum(map(len, (word for word in plain.split() if word.isalpha() and len(word) > 1))) * 2 >= len(plain)


def gold_answer(row: Mapping[str, Any]) -> tuple[str | None, str]:
    """Read the gold answer of a data set row, see `read_gold`; None and a reason where there is none."""
    if "answer" not in row:
        return None, f"the row has no 'answer'; its columns: {', '.join(map(str, row)) or 'none'}"
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None, f"the gold answer must be a string or a number, got {type(answer).__name__}"
    return read_gold(str(answer))


def answer_reward(
    *,
    name: str,
    methods: Sequence[str] = DEFAULT_METHODS,
    equal: CompareAnswers = answers_equal,
    one_answer: bool = False,
    weight: float = 1.0,
) -> RewardFunction:
    """Make a reward that is 1 where the answer found by `methods` is `equal` to the row's gold answer, else 0.

    With `one_answer`, all boxes of the answer must hold the same answer: hedging scores 0.
    None depends on the row alone (no usable gold), never on the completion: a wrong answer cannot leave the average.
    A completion that did not stop by itself counts only with a closed answer, and not inside unfinished thinking.
    """
    extract_answer("", methods)  # refuses unknown methods now, not at the first sample
    scored = partial(_score_answer, methods=methods, equal=equal, one_answer=one_answer)
    return reward(name=name, weight=weight)(scored)


def _score_answer(sample: Sample, methods: Sequence[str], equal: CompareAnswers, one_answer: bool) -> Score:
    gold, problem = gold_answer(sample.row)
    if gold is None:
        return Score(value=None, info={"reason": problem})
    found = extract_answer(own_turn(sample.answer_part), _usable_methods(sample, methods))
    if found.answer is None:
        correct, reason = False, f"no answer found (finish_reason {sample.finish_reason})"
    elif one_answer and (other := _other_answer(found, equal)):
        correct, reason = False, f"more than one answer: {other[:_MAX_LOGGED_CHARS]}"
    else:
        correct, reason = equal(gold, found.answer)
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


def _other_answer(found: Extraction, equal: CompareAnswers) -> str | None:
    """A box that holds another answer than the last one."""
    distinct = dict.fromkeys(found.boxes)
    if len(distinct) > 8:
        return ", ".join(distinct)
    *others, last = distinct or ("",)
    return next((other for other in others if not equal(last, other)[0]), None)


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
strict_math_answer = answer_reward(name="strict_math_answer", methods=STRICT_METHODS, one_answer=True)
