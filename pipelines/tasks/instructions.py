"""Instructions that a rule can check: write a word so many times, or some words backwards (after IFEval,
arXiv:2311.07911, whose instructions are "verifiable" in this sense too).

The general task beside reasoning in small chains of stages: no thought is needed, only doing what was asked.

    row = make_row(random.Random(0))      # {"question": "Write the word blue 3 times.", "answer": "blue blue blue"}
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.tasks.base import Task, lacks_text
from pipelines.templates import TEMPLATES

WORDS = ("apple", "blue", "cat", "door", "green", "house", "lamp", "moon", "river", "stone", "tree", "window")
MAX_WORDS = 5


def make_row(rng: random.Random) -> dict[str, Any]:
    count = rng.randint(2, MAX_WORDS)
    if rng.random() < 0.5:
        word = rng.choice(WORDS)
        return {"question": f"Write the word {word} {count} times.", "answer": " ".join([word] * count)}
    words = rng.sample(WORDS, count)
    return {"question": f"Write {' '.join(words)} backwards.", "answer": " ".join(reversed(words))}


def make_rows(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """`count` rows whose questions are not in `exclude`; of the 60 or so about one word many are alike."""
    rng = random.Random(f"instructions {seed}")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        row = make_row(rng)
        if row["question"] not in exclude:
            rows.append(row)
    return rows


def completion(answer: str) -> str:
    return f" <think> </think> <answer> {answer} </answer>"


def documents(rows: Sequence[Mapping[str, Any]], rng: random.Random, *, share_right: float = 0.5) -> Iterator[str]:
    """The pretraining text: some documents do what is asked, the others use the right words in number or order as it
    happens."""
    for row in rows:
        words = row["answer"].split()
        if rng.random() >= share_right:
            words = [rng.choice(words) for _ in range(rng.randint(1, MAX_WORDS))]
        yield TEMPLATES["r1"].format(row["question"]) + completion(" ".join(words))


TASK = Task(
    name="instructions",
    question=lambda row: row["question"],
    check=lambda row: lacks_text(row, "question", "answer"),
    gold=lambda row: row["answer"],
    rewards=("exact_answer", "0.1*r1_format", "0*thinking_length"),
    accuracy="exact_answer",
    max_tokens=32,
    make_rows=make_rows,
)
