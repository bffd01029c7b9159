"""Contest problems whose programs read standard input and write standard output: Codeforces, CodeContests, and others
in the form of rLLM, APPS or SandboxFusion.

Not covered: problems with several right answers (special judges) and interactive ones.
"""

from functools import partial

from pipelines.tasks.base import Row, Task
from pipelines.tasks.code_rows import ACCURACY, CODE_REWARDS, check_problem, coded, gold_program, problem_of


def question(row: Row) -> str:
    return (
        f"{problem_of(row)}\n\nWrite a Python program that reads standard input and writes the answer to standard "
        "output. Answer with the whole program in a code block."
    )


TASK = Task(
    name="codeforces",
    question=question,
    check=partial(check_problem, calls=False),
    gold=gold_program,
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
