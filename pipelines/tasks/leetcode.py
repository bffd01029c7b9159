"""Problems whose tests call a function: LeetCodeDataset (arXiv:2504.14655), also as rLLM has it, SandboxFusion's."""

from functools import partial

from pipelines.tasks.base import Row, Task
from pipelines.tasks.code_rows import ACCURACY, CODE_REWARDS, check_problem, coded, gold_program, problem_of

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


def prepare(row: Row) -> Row:
    return row if "prompt" in row or "prelude" in row else row | {"prelude": PRELUDE}


def question(row: Row) -> str:
    return f"{problem_of(row)}\n\nAnswer with the Python code in a code block."


TASK = Task(
    name="leetcode",
    question=question,
    check=partial(check_problem, calls=True),
    prepare=prepare,
    gold=gold_program,
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
