r"""Several ways of reading a GSM8K answer, side by side: how much of a score is the model and how much the reading.

| name     | reads                                                    | equal to the gold answer if                  |
|----------|----------------------------------------------------------|----------------------------------------------|
| strict   | the first `#### number`                                  | lm-evaluation-harness's `exact_match` says so|
| flexible | the last number anywhere                                 | the same                                     |
| boxed    | the last `\boxed{...}`                                   | `rewards.answers_equal`                      |
| answer   | the last `<answer>...</answer>`                          | the same                                     |
| default  | what the task's own reward reads, see rewards/extract.py | that reward is 1                             |

`strict` and `flexible` are the filters strict-match and flexible-extract of lm-evaluation-harness's task gsm8k 3.0,
which reads cut-off completions like any other.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from rewards import Sample, answers_equal, extract_answer
from rewards.math_answer import gold_answer

# From lm_eval/tasks/gsm8k/gsm8k.yaml.
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one extractor made of one completion."""

    answer: str | None
    """None if it found no answer."""
    right: bool


def _strict(text: str) -> str | None:
    found = _STRICT.search(text)
    return found[1] if found else None


def _flexible(text: str) -> str | None:
    found = _FLEXIBLE.findall(text)
    return next(group for group in found[-1] if group).strip() if found else None


def _exact_match(gold: str, answer: str) -> bool:
    """`exact_match` of lm-evaluation-harness with the settings of its gsm8k."""
    for pattern in _IGNORED:
        gold, answer = pattern.sub("", gold), pattern.sub("", answer)
    return gold.lower() == answer.lower()


def _equal(gold: str, answer: str) -> bool:
    return answers_equal(gold, answer)[0]


_READERS: dict[str, tuple[Callable[[str], str | None], Callable[[str, str], bool]]] = {
    "strict": (_strict, _exact_match),
    "flexible": (_flexible, _exact_match),
    "boxed": (lambda text: extract_answer(text, ("boxed",)).answer, _equal),
    "answer": (lambda text: extract_answer(text, ("answer_tag",)).answer, _equal),
}
EXTRACTORS = (*_READERS, "default")
DEFAULT = "default"


def read_answer(name: str, sample: Sample) -> Reading | None:
    """What the extractor reads; None for a row without a gold answer. `default` is not read here, but by its reward."""
    gold, _ = gold_answer(sample.row)
    if gold is None:
        return None
    read, equal = _READERS[name]
    answer = read(sample.completion)
    return Reading(answer=answer, right=answer is not None and equal(gold, answer))
