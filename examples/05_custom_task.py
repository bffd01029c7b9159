"""A task of one's own in one file: questions, gold answers, reward, worked examples.

    python examples/05_custom_task.py
    grpo zero --model base --task examples/05_custom_task.py --num-prompts 1000
    grpo sample --model base --task examples/05_custom_task.py --num-prompts 100 --shots 1
    grpo eval --model base --task examples/05_custom_task.py --limit 100

Every command with `--task` takes the path of such a file. What it needs is `TASK` at its end; a task whose rows come
from a file or the hub has no `make_rows`, and `check` says of each row why it cannot be used.
"""

import random

from pipelines.tasks import Example, Task
from rewards import Sample, load_rubric, reward


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Words to spell backwards; the same seed gives the same rows."""
    rng = random.Random(f"backwards {seed}")
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(count)]
    return [{"word": word, "answer": word[::-1]} for word in words]


def check(row: dict[str, str]) -> str | None:
    return None if isinstance(row.get("word"), str) and "answer" in row else "needs the fields 'word' and 'answer'"


def question(row: dict[str, str]) -> str:
    return f"Spell {row['word']!r} backwards."


@reward
def backwards(sample: Sample) -> float:
    """1 for the right word in answer tags, part of it for each letter in its place."""
    answer, gold = sample.answer_part.partition("<answer>")[2].partition("</answer>")[0].strip(), sample.row["answer"]
    if answer == gold:
        return 1.0
    return 0.5 * sum(a == b for a, b in zip(answer, gold, strict=False)) / max(len(answer), len(gold))


TASK = Task(
    name="backwards",
    question=question,
    check=check,
    gold=lambda row: row["answer"],
    rewards=(f"{__file__}:backwards", "0.1*r1_format"),
    accuracy="backwards",
    max_tokens=128,
    examples=(Example("Spell 'tree' backwards.", " <think> t r e e, e e r t </think> <answer> eert </answer>"),),
    make_rows=make_rows,
)


def main() -> None:
    rubric = load_rubric(TASK.rewards)
    for row in make_rows(3, seed=0):
        for answer in (TASK.gold(row) if TASK.gold else "", row["word"]):
            completion = f" <think> letter by letter </think> <answer> {answer} </answer>"
            score = rubric.score(Sample(prompt=question(row), completion=completion, row=row))
            print(f"{question(row)}  {answer:10} reward {score.value:.2f}")


if __name__ == "__main__":
    main()
