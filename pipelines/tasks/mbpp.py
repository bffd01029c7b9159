"""MBPP (arXiv:2108.07732) and MBPP+ (arXiv:2305.01210): a sentence, three tests that are shown, a function to write.

The tests of MBPP are part of the question, so a program can hold their results; MBPP+ judges by tests not shown.
"""

from dataclasses import replace

from pipelines.tasks.base import Row, Task
from pipelines.tasks.code_rows import ACCURACY, CODE_REWARDS, coded, fenced, problem_of, program_of
from pipelines.tasks.evalplus import check_tests, prepare_tests


def check_row(row: Row) -> str | None:
    """None for a row with a text and tests, else the reason."""
    if problem_of(row) is None:
        return "no text in 'text' or 'prompt'"
    tests = row.get("test_list")
    return None if isinstance(tests, list) and tests else "field 'test_list' holds no tests"


def question(row: Row) -> str:
    tests = "\n".join(row["test_list"])
    return f"{problem_of(row)} Answer with the Python code in a code block. It must pass these tests:\n{fenced(tests)}"


TASK = Task(
    name="mbpp",
    question=question,
    check=check_row,
    gold=lambda row: fenced(program_of(row)),
    rewards=CODE_REWARDS,
    accuracy=ACCURACY,
    max_tokens=1024,
    examples=(
        coded(
            question(
                {
                    "text": "Write a function to find the second largest of the distinct numbers in a list.",
                    "test_list": ["assert second([3, 1, 2]) == 2", "assert second([5, 5, 4]) == 4"],
                }
            ),
            "A set leaves each number once; sorted, the second largest is the last but one.",
            "def second(numbers):\n    return sorted(set(numbers))[-2]",
        ),
    ),
    default_data="google-research-datasets/mbpp:full",
)
PLUS = replace(
    TASK,
    name="mbpp+",
    check=lambda row: check_row(row) or check_tests(row),
    prepare=prepare_tests,
    default_data="evalplus/mbppplus@test",
)
