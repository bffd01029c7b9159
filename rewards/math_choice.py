"""Answers that are labels rather than values: multiple choice letters, and times of day.

Usage: `compare_labels("C", "(C) 12") == (True, "choice")`.
"""

import re

from rewards.math_text import clean

_CHOICE = re.compile(r"(?:(?:option|choice|answer)\s*:?\s*)?[(\[]?\s*([A-J])\s*[)\].:]?(?:\s*[:.)-])?", re.IGNORECASE)
_CHOICE_WITH_TEXT = re.compile(r"\(([A-J])\)\s*\S.*|([A-J])[).:]\s+\S.*")
_TIME = re.compile(r"([0-9]{1,2}):([0-5][0-9])\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)


def is_time(text: str) -> bool:
    """Whether a text is a time of day, such as 6:15 p.m."""
    return _TIME.fullmatch(_plain(text)) is not None


def compare_labels(gold: str, predicted: str) -> tuple[bool, str] | None:
    """Decide where the gold is a choice or a time of day and the prediction one too: the verdict and the reason."""
    plain_gold, plain = _plain(gold), _plain(predicted)
    choice = re.fullmatch(r"\(?([A-J])\)?", plain_gold)
    if choice is not None:
        match = _CHOICE.fullmatch(plain) or _CHOICE_WITH_TEXT.fullmatch(plain)
        letter = match and next(group for group in match.groups() if group)
        if letter and (letter.isupper() or len(plain) > 1):
            equal = letter.upper() == choice[1]
            return equal, "choice" if equal else "different"
    a, b = _TIME.fullmatch(plain_gold), _TIME.fullmatch(plain)
    if a and b and (a[3] or b[3] or a[2].startswith("0") or b[2].startswith("0")):
        same_half = not (a[3] and b[3]) or a[3].lower() == b[3].lower()
        equal = (int(a[1]), a[2]) == (int(b[1]), b[2]) and same_half
        return equal, "time" if equal else "different"
    return None


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\\(?:text[a-z]*|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", clean(text)).split())
