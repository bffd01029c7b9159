"""Rows of mathematical problems, in the forms in which the data sets have them; what the math tasks share.

The question stands in `question`, `problem` or `prompt`, the gold answer in `answer`, `ground_truth` or, as the last
box, in `solution`. verl's form is read, too: `prompt` is a list of messages, the gold answer in
`reward_model.ground_truth`. Instructions that such prompts carry about the answer's form are taken off: the template
brings its own.
"""

import json
import re
from functools import partial
from typing import Any

from pipelines.tasks.base import Row, Task
from pipelines.templates import Example
from rewards import extract_answer
from rewards.math_answer import read_gold

MATH_REWARDS = ("math_answer", "0.1*r1_format", "0*thinking_length")

_WHOLE = re.compile(r"^(-?\d+)\.0$")
"""AMC's files keep whole numbers as 27.0."""
_OPENINGS = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.",
)
_CLOSINGS = (
    'Remember to put your answer on its own line after "Answer:".',
    "Let's think step by step and output the final answer within \\boxed{}.",
    'Let\'s think step by step and output the final answer after "####".',
    "Please reason step by step, and put your final answer within \\boxed{}.",
)
"""Instructions of DAPO-Math-17k, Skywork-OR1, verl's GSM8K and Qwen2.5-Math."""


def question_of(row: Row) -> str | None:
    """The problem's text, None where there is none."""
    text: Any = next((row[name] for name in ("question", "problem", "prompt") if row.get(name)), None)
    if isinstance(text, list):
        users = [turn.get("content") for turn in text if isinstance(turn, dict) and turn.get("role") == "user"]
        text = users[-1] if users else None
    if not isinstance(text, str):
        return None
    for opening in _OPENINGS:
        text = text.strip().removeprefix(opening)
    for closing in _CLOSINGS:
        text = text.strip().removesuffix(closing)
    return text.strip() or None


def answer_of(row: Row) -> str | None:
    """The bare gold answer as a text, None where there is none."""
    nested = row.get("reward_model")
    found: Any = nested.get("ground_truth") if isinstance(nested, dict) else None
    for name in ("answer", "ground_truth"):
        found = row[name] if found is None and row.get(name) is not None else found
    if found is None and isinstance(row.get("solution"), str):
        found = extract_answer(row["solution"], ("boxed",)).answer
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        return None
    text = str(found).strip()
    if text.startswith('["'):  # Skywork-OR1: a JSON list of one
        values = json.loads(text)
        text = str(values[0]) if len(values) == 1 else text
    return _WHOLE.sub(r"\1", text) or None


def check_row(row: Row) -> str | None:
    """None for a row with a question and a gold answer that can be judged, else the reason."""
    if question_of(row) is None:
        return "no text in 'question', 'problem' or 'prompt'"
    try:
        answer = answer_of(row)
    except ValueError:
        return "the gold answer begins like a JSON list and is none"
    if answer is None:
        return "no gold answer in 'answer', 'ground_truth', 'reward_model.ground_truth' or a box of 'solution'"
    return read_gold(answer)[1] or None


def prepare_row(row: Row) -> Row:
    """The row with its `question` and `answer` as texts."""
    return row | {"question": question_of(row), "answer": answer_of(row)}


def _question(row: Row) -> str:
    return row["question"]


def gold_answer(row: Row) -> str:
    return read_gold(row["answer"])[0] or ""


def worked(question: str, thinking: str, answer: str) -> Example:
    """An example in the form of the R1 template."""
    return Example(question, f" <think> {thinking} </think> <answer> {answer} </answer>")


math_task = partial(
    Task, question=_question, check=check_row, prepare=prepare_row, gold=gold_answer, rewards=MATH_REWARDS,
    accuracy="math_answer",
)  # fmt: skip
"""A task on such rows; takes the remaining fields."""
