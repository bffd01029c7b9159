"""Variables: who depends on whom, resolved step by step modulo 11, on chains longer than the base saw worked out.

A problem defines variables in random order, each by a number or by another variable and one operation, and asks for
one of them. `depth` operations lie between the number and what is asked; other variables hang off the chain and lead
nowhere. A thought goes back to the number, then forth with the values:

    c= a x4 d= c +9 a= 7 b= a -3 what is d?
    <think> d c a a= 7 c= 6 d= 4 </think> <answer> 4 </answer>

    row = make_row(random.Random(0), depth=2)
    text = document(row, shown=9)         # a demonstration that writes out nine words of the thought
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.templates import TEMPLATES

MODULUS = 11
GUESSING_FLOOR = 1 / MODULUS
NAMES = "abcdefghijklmnop"
MAX_DEPTH = 10
MAX_SHOWN_DEPTH = 4
"""Deepest problems that the base sees worked out; it sees the bare answers of deeper ones."""
TRAINING_DEPTHS = range(3, 9)
"""Of the problems for RL."""
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
    """A random problem: `chain` are the variables from the number to what is asked, `values` theirs."""
    names = rng.sample(NAMES, depth + 1 + rng.randrange(4))
    chain, others = names[: depth + 1], names[depth + 1 :]
    values = [rng.randrange(MODULUS)]
    definitions = [f"{chain[0]}= {values[0]}"]
    for parent, name in zip(chain, chain[1:], strict=False):
        operation = rng.choice(OPERATIONS)
        values.append(apply(values[-1], operation))
        definitions.append(f"{name}= {parent} {operation}")
    definitions += [f"{name}= {rng.choice(chain[:-1] or chain)} {rng.choice(OPERATIONS)}" for name in others]
    rng.shuffle(definitions)
    question = f"{' '.join(definitions)} what is {chain[-1]} ?"
    return {"question": question, "answer": str(values[-1]), "depth": depth, "chain": chain, "values": values}


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


def thought(row: Mapping[str, Any]) -> list[str]:
    """All words: back to the number, then forth with the values."""
    chain, values = row["chain"], row["values"]
    return [*reversed(chain), *(w for name, value in zip(chain, values, strict=True) for w in (f"{name}=", str(value)))]


def completion(row: Mapping[str, Any], shown: int) -> str:
    """A demonstration that writes out the first `shown` words of the thought, then the true answer."""
    thinking = "".join(f" {word}" for word in thought(row)[:shown])
    return f" <think>{thinking} </think> <answer> {row['answer']} </answer>"


def document(row: Mapping[str, Any], shown: int) -> str:
    return TEMPLATES["r1"].format(row["question"]) + completion(row, shown)


def documents(
    rows: list[dict[str, Any]], rng: random.Random, *, share_partial: float = 0.2, share_full: float = 0.12
) -> Iterator[str]:
    """The pretraining text: most documents answer at once, and those deeper than `MAX_SHOWN_DEPTH` all do."""
    for row in rows:
        draw, length = rng.random(), 3 * (row["depth"] + 1)
        shown = 0
        if row["depth"] <= MAX_SHOWN_DEPTH and draw < share_full + share_partial:
            shown = length if draw < share_full else rng.randrange(1, length)
        yield document(row, shown)
