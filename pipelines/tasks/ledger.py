"""The ledger: ten operations on one digit, a task on which thinking pays and guessing does not.

A problem is a start digit and ten operations, each followed by keeping the last digit. Whoever writes the running
result after each operation is right; whoever answers at once can hardly beat the guessing floor of one in ten.

    row = make_row(random.Random(0))      # {"question": ..., "answer": "7", "states": [3, 7, ...]}
    text = document(row, depth=10)        # a demonstration that writes out all ten steps
"""

import random
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.tasks.base import Task, lacks_text
from pipelines.templates import TEMPLATES

NUM_STEPS = 10
GUESSING_FLOOR = 0.1
# Multipliers prime to 10 lose no information, so the answer depends on every step.
OPERATIONS = (*(f"{sign}{digit}" for sign in "+-" for digit in range(1, 10)), "x3", "x7", "x9")


def apply(state: int, operation: str) -> int:
    """The last digit of the result of one operation on one digit."""
    amount = int(operation[1:])
    return {"+": state + amount, "-": state - amount, "x": state * amount}[operation[0]] % 10


def make_row(rng: random.Random) -> dict[str, Any]:
    """A random problem with its solution: `states` are the start digit and the ten running results."""
    states = [rng.randrange(10)]
    operations = [rng.choice(OPERATIONS) for _ in range(NUM_STEPS)]
    for operation in operations:
        states.append(apply(states[-1], operation))
    question = f"Keep the last digit: start at {states[0]} then {' '.join(operations)} gives what?"
    return {"question": question, "answer": str(states[-1]), "states": states}


def make_rows(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """`count` distinct problems whose questions are not in `exclude`."""
    rng = random.Random(f"ledger {seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        row = make_row(rng)
        if row["question"] not in exclude:
            rows.setdefault(row["question"], row)
    return list(rows.values())


def completion(row: Mapping[str, Any], depth: int) -> str:
    """A demonstration that writes the running results up to step `depth`, 0 for none, then the true answer."""
    shown = row["states"][: depth + 1] if depth else []
    thinking = "".join(f" {state}" for state in shown)
    return f" <think>{thinking} </think> <answer> {row['answer']} </answer>"


def document(row: Mapping[str, Any], depth: int) -> str:
    return TEMPLATES["r1"].format(row["question"]) + completion(row, depth)


def documents(
    rows: list[dict[str, Any]], rng: random.Random, *, share_partial: float = 0.25, share_full: float = 0.08
) -> Iterator[str]:
    """The pretraining text: most documents answer at once, some think part of the way, few to the end."""
    for row in rows:
        draw = rng.random()
        if draw < share_full:
            depth = NUM_STEPS
        elif draw < share_full + share_partial:
            depth = rng.randrange(1, NUM_STEPS)
        else:
            depth = 0
        yield document(row, depth)


TASK = Task(
    name="ledger",
    question=lambda row: row["question"],
    check=lambda row: lacks_text(row, "question", "answer"),
    gold=lambda row: row["answer"],
    rewards=("math_answer", "0.1*r1_format", "0*thinking_length"),
    accuracy="math_answer",
    max_tokens=32,
    make_rows=make_rows,
)
