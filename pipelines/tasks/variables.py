"""Variables: who depends on whom, resolved step by step modulo 11, on chains longer than the base saw worked out.

A problem defines variables in random order, each by another one and an operation: `a +4 c` says that c is a + 4. It
asks for the last of a chain of `depth` operations, given the first; other chains have nothing to do with the question.
A thought walks from the number that is given to the variable that is asked for:

    c x4 d h -2 g a +10 c what is d if a is 7 ?
    <think> 7 a +10 6 c x4 2 d </think> <answer> 2 </answer>

    row = make_row(random.Random(0), depth=2)
    text = document(row, shown=8)         # a demonstration that writes out eight words of the thought
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pipelines.tasks.base import Task
from pipelines.templates import TEMPLATES

MODULUS = 11
GUESSING_FLOOR = 1 / MODULUS
NAMES = "abcdefghi"
MAX_DEPTH = 6
MAX_SHOWN_DEPTH = 3
"""Deepest problems that the base sees worked out; it sees the bare answers of deeper ones."""
TRAINING_DEPTHS = range(2, 6)
"""Of the problems for RL."""
CORPUS_DEPTHS = (1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5, 6)
# 11 is prime, so every operation can be undone, and the answer depends on each step.
OPERATIONS = (*(f"{sign}{number}" for sign in "+-" for number in range(1, MODULUS)), *(f"x{n}" for n in range(2, 11)))


def apply(value: int, operation: str) -> int:
    """The result of one operation modulo 11."""
    amount = int(operation[1:])
    return {"+": value + amount, "-": value - amount, "x": value * amount}[operation[0]] % MODULUS


def check_row(row: dict[str, Any]) -> str | None:
    """None for a usable row of a file, else the reason."""
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str):
            return f"field {key!r} is missing or not a text"
    return None


def make_row(rng: random.Random, depth: int) -> dict[str, Any]:
    """A random problem: `chain` are the variables from the given one to what is asked, `values` theirs."""
    names = rng.sample(NAMES, depth + 1 + rng.choice((0, 2)))
    chain, others = names[: depth + 1], names[depth + 1 :]
    values, operations = [rng.randrange(MODULUS)], [rng.choice(OPERATIONS) for _ in range(depth)]
    for operation in operations:
        values.append(apply(values[-1], operation))
    definitions = [
        f"{parent} {operation} {name}" for (parent, name), operation in zip(pairwise(chain), operations, strict=True)
    ]
    definitions += [f"{parent} {rng.choice(OPERATIONS)} {name}" for parent, name in pairwise(others)]
    rng.shuffle(definitions)
    question = f"{' '.join(definitions)} what is {chain[-1]} if {chain[0]} is {values[0]} ?"
    thought = [str(values[0]), chain[0]]
    for operation, value, name in zip(operations, values[1:], chain[1:], strict=True):
        thought += [operation, str(value), name]
    return {"question": question, "answer": str(values[-1]), "depth": depth, "thought": thought}


def make_rows(
    count: int, seed: int, exclude: frozenset[str] = frozenset(), depths: Sequence[int] = TRAINING_DEPTHS
) -> list[dict[str, Any]]:
    """`count` distinct problems of these depths, in turn, whose questions are not in `exclude`."""
    rng = random.Random(f"variables {seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        row = make_row(rng, depths[len(rows) % len(depths)])
        if row["question"] not in exclude:
            rows.setdefault(row["question"], row)
    return list(rows.values())


def completion(row: Mapping[str, Any], shown: int) -> str:
    """A demonstration that writes out the first `shown` words of the thought, then the true answer."""
    thinking = "".join(f" {word}" for word in row["thought"][:shown])
    return f" <think>{thinking} </think> <answer> {row['answer']} </answer>"


def document(row: Mapping[str, Any], shown: int) -> str:
    return TEMPLATES["r1"].format(row["question"]) + completion(row, shown)


def documents(
    rows: list[dict[str, Any]], rng: random.Random, *, share_partial: float = 0.4, share_full: float = 0.3
) -> Iterator[str]:
    """The pretraining text: most documents answer at once, and those deeper than `MAX_SHOWN_DEPTH` all do."""
    for row in rows:
        draw, length = rng.random(), len(row["thought"])
        shown = 0
        if row["depth"] <= MAX_SHOWN_DEPTH and draw < share_full + share_partial:
            shown = length if draw < share_full else rng.randrange(1, length)
        yield document(row, shown)


TASK = Task(
    name="variables",
    question=lambda row: row["question"],
    check=check_row,
    gold=lambda row: row["answer"],
    rewards=("math_answer", "0.1*r1_format", "0*thinking_length"),
    accuracy="math_answer",
    max_tokens=32,
    make_rows=make_rows,
)
