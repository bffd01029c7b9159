"""HumanEval (arXiv:2107.03374) and HumanEval+ (arXiv:2305.01210): write the body of a Python function whose head and
docstring are given. `humaneval` asks for the whole function in a code block, `humaneval-complete` has a base model go
on with the text.
"""

from dataclasses import replace

from pipelines.tasks.base import Row, Task, lacks_text
from pipelines.tasks.code_rows import ACCURACY, CODE_REWARDS, coded, fenced
from pipelines.tasks.evalplus import PLUS_REWARDS, check_tests, prepare_tests


def check_row(row: Row) -> str | None:
    """None for a row with a prompt, tests and the function's name, else the reason."""
    return lacks_text(row, "prompt", "test", "entry_point")


def question(row: Row) -> str:
    return f"Complete this Python function. Answer with the whole function in a code block.\n{fenced(row['prompt'])}"


_HEAD = 'def count_vowels(text: str) -> int:\n    """Number of vowels in a lower-case text.\n    >>> count_vowels("tree")\n    2\n    """'  # noqa: E501

TASK = Task(
    name="humaneval",
    question=question,
    check=check_row,
    gold=lambda row: fenced(row["prompt"] + row["canonical_solution"]),
    rewards=CODE_REWARDS,
    accuracy=ACCURACY,
    max_tokens=1024,
    examples=(
        coded(
            question({"prompt": _HEAD}),
            "Every letter that is one of aeiou counts once.",
            f'{_HEAD}\n    return sum(letter in "aeiou" for letter in text)',
        ),
    ),
    default_data="openai/openai_humaneval@test",
)
PLUS = replace(
    TASK,
    name="humaneval+",
    check=lambda row: check_row(row) or check_tests(row),
    prepare=prepare_tests,
    rewards=PLUS_REWARDS,
    default_data="evalplus/humanevalplus@test",
)
COMPLETE = replace(
    TASK,
    name="humaneval-complete",
    question=lambda row: row["prompt"],
    gold=lambda row: row["canonical_solution"],
    template="none",
    rewards=('code_reward(style="completion")',),
    examples=(),
)
