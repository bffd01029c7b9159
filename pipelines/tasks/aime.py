"""AIME: 30 problems a year whose answers are whole numbers from 0 to 999; 1983 to 2023 to train on, 2024 and 2025 to
evaluate. With 30 problems an evaluation needs many samples of each.
"""

from pipelines.tasks.base import Row
from pipelines.tasks.math_rows import answer_of, math_task
from pipelines.tasks.math_rows import check_row as check_math


def check_row(row: Row) -> str | None:
    """None for a usable row, else the reason; the answer must be a whole number."""
    reason = check_math(row)
    answer = answer_of(row) if reason is None else None
    if answer is not None and not (answer.isascii() and answer.isdigit()):
        return f"an answer of AIME is a whole number from 0 to 999, got {answer!r}"
    return reason


TASK = math_task(name="aime", check=check_row, max_tokens=8192)
AIME24 = math_task(name="aime24", check=check_row, max_tokens=8192, default_data="HuggingFaceH4/aime_2024@train")
AIME25 = math_task(name="aime25", check=check_row, max_tokens=8192, default_data="math-ai/aime25@test")
