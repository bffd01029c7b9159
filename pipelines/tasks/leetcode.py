"""Problems whose tests call a function: LeetCodeDataset (arXiv:2504.14655), also as rLLM has it, SandboxFusion's."""

from pipelines.tasks.base import Row, Task
from pipelines.tasks.code_rows import ACCURACY, CODE_REWARDS, coded, fenced, problem_of, program_of, tests_of

PRELUDE = """\
import datetime, math, random
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from string import *
from typing import *
inf = float("inf")
"""
"""What LeetCode itself imports before a program; rows without a `prompt` or `prelude` of their own get it."""


def check_row(row: Row) -> str | None:
    """None for a row with a problem and tests of a function, else the reason."""
    if problem_of(row) is None:
        return "no text in 'problem', 'query', 'content' or 'question'"
    tests = tests_of(row)
    if isinstance(tests, str):
        return tests
    return None if tests.tests else "runs of a program, not tests of a function; the task codeforces takes them"


def prepare(row: Row) -> Row:
    return row if "prompt" in row or "prelude" in row else row | {"prelude": PRELUDE}


def question(row: Row) -> str:
    return f"{problem_of(row)}\n\nAnswer with the Python code in a code block."


TASK = Task(
    name="leetcode",
    question=question,
    check=check_row,
    prepare=prepare,
    gold=lambda row: fenced(program_of(row)) if program_of(row) else "",
    rewards=CODE_REWARDS,
    accuracy=ACCURACY,
    max_tokens=4096,
    examples=(
        coded(
            question({"problem": "Complete `class Solution` with `def double(self, n: int) -> int`, which doubles n."}),
            "Twice n is n + n.",
            "class Solution:\n    def double(self, n: int) -> int:\n        return n + n",
        ),
    ),
    default_data="newfacade/LeetCodeDataset",
)
