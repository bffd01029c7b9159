"""GSM8K (arXiv:2110.14168): grade-school word problems; the gold answer stands behind `####` in `answer`."""

from typing import Any

from pipelines.tasks.base import Task, lacks_text
from pipelines.tasks.math_rows import MATH_REWARDS, gold_answer, worked
from rewards import extract_answer


def check_row(row: dict[str, Any]) -> str | None:
    """None for a row with a question and a gold answer, else the reason."""
    if problem := lacks_text(row, "question", "answer"):
        return problem
    if extract_answer(row["answer"], ("hash",)).answer is None:
        return "field 'answer' has no `#### result`"
    return None


EXAMPLES = (
    worked(
        "A box holds 6 eggs. Mia buys 3 boxes and uses 5 eggs. How many eggs are left?",
        "3 boxes hold 3 * 6 = 18 eggs. After using 5 there are 18 - 5 = 13 left.",
        "13",
    ),
    worked(
        "Tickets cost $8 for adults and half of that for children. What do 2 adults and 3 children pay together?",
        "A child pays 8 / 2 = 4 dollars. Adults pay 2 * 8 = 16, children 3 * 4 = 12, together 16 + 12 = 28.",
        "28",
    ),
    worked(
        "Ben reads 12 pages a day for 5 days, then 20 pages a day for 2 days, and finishes his book. How many pages "
        "does the book have?",
        "In the first days he reads 12 * 5 = 60 pages, then 20 * 2 = 40 pages. The book has 60 + 40 = 100 pages.",
        "100",
    ),
    worked(
        "A tank of 90 liters is one third full. A pump adds 4 liters a minute. After how many minutes is it full?",
        "There are 90 / 3 = 30 liters in it, 90 - 30 = 60 are missing. That takes 60 / 4 = 15 minutes.",
        "15",
    ),
)

TASK = Task(
    name="gsm8k",
    question=lambda row: row["question"],
    check=check_row,
    gold=gold_answer,
    rewards=MATH_REWARDS,
    accuracy="math_answer",
    max_tokens=1024,
    examples=EXAMPLES,
    default_data="openai/gsm8k:main",
)
