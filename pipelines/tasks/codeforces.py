"""Contest problems whose programs read standard input and write standard output: Codeforces, CodeContests, and others
in the form of rLLM, APPS or SandboxFusion.

Not covered: problems with several right answers (special judges) and interactive ones.
"""

from pipelines.tasks.base import Row, Task
from pipelines.tasks.code_rows import ACCURACY, CODE_REWARDS, coded, fenced, problem_of, program_of, tests_of


def check_row(row: Row) -> str | None:
    """None for a row with a problem and runs to compare with, else the reason."""
    if problem_of(row) is None:
        return "no text in 'problem', 'description', 'content' or 'question'"
    tests = tests_of(row)
    if isinstance(tests, str):
        return tests
    return None if tests.cases else "tests of functions, not of standard input and output; the task leetcode takes them"


def question(row: Row) -> str:
    return (
        f"{problem_of(row)}\n\nWrite a Python program that reads standard input and writes the answer to standard "
        "output. Answer with the whole program in a code block."
    )


TASK = Task(
    name="codeforces",
    question=question,
    check=check_row,
    gold=lambda row: fenced(program_of(row)) if program_of(row) else "",
    rewards=CODE_REWARDS,
    accuracy=ACCURACY,
    max_tokens=4096,
    examples=(
        coded(
            question(
                {"problem": "The first line holds n, the second n integers. Print the largest difference of two."}
            ),
            "The largest difference is that of the largest and the smallest.",
            "input()\nnumbers = list(map(int, input().split()))\nprint(max(numbers) - min(numbers))",
        ),
    ),
    default_data="agentica-org/DeepCoder-Preview-Dataset:codeforces@test",
)
