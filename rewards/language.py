r"""Language consistency: does the model think in the language it was asked in?

DeepSeek-R1 (section 2.3.2, arXiv:2501.12948): words of the target language / all words, in the chain of thought, added
to the accuracy reward. The paper does not say what a word is. Here it is a run of letters of one script; of Chinese
characters and kana, which have no spaces, every character.

Covered: languages that differ by script, as English and Chinese do. Digits, symbols, tags, LaTeX commands and single
Latin letters (`<think>`, `\frac`, `x`) are of no language.
Not covered: languages of one script (French thinking counts as English), word boundaries in Thai, Lao and
Indic scripts, romanised text.

Usage: `language_consistency(language="en").score(sample)`.
"""

import re
import unicodedata
from functools import lru_cache, partial
from itertools import groupby
from typing import Literal

from rewards.base import RewardFunction, Sample, Score, reward

Part = Literal["thinking", "completion"]

_SCRIPTS = {
    "ar": ("ARABIC",), "bg": ("CYRILLIC",), "de": ("LATIN",), "el": ("GREEK",), "en": ("LATIN",), "es": ("LATIN",),
    "fr": ("LATIN",), "he": ("HEBREW",), "hi": ("DEVANAGARI",), "it": ("LATIN",), "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",), "pt": ("LATIN",), "ru": ("CYRILLIC",), "th": ("THAI",), "uk": ("CYRILLIC",), "zh": ("CJK",),
}  # fmt: skip
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA")
_NO_WORDS = re.compile(r"\\[A-Za-z]+|</?[a-z]+>")  # LaTeX commands, tags
_LETTERS = re.compile(r"[^\W\d_]+")


def language_consistency(
    *, language: str = "en", part: Part = "thinking", weight: float = 1.0, name: str = "language_consistency"
) -> RewardFunction:
    """Make a reward that is the share of words of `language` (a two-letter code) in the thinking, or in the whole
    completion; 0 where there is no word, so that silence does not pay.
    """
    if language not in _SCRIPTS:
        raise ValueError(f"language must be one of {', '.join(_SCRIPTS)}, got {language!r}")
    if part not in ("thinking", "completion"):
        raise ValueError(f"part must be 'thinking' or 'completion', got {part!r}")
    return reward(name=name, weight=weight)(partial(_consistency, scripts=_SCRIPTS[language], part=part))


def _consistency(sample: Sample, scripts: tuple[str, ...], part: Part) -> Score:
    counts = count_words(sample.thinking if part == "thinking" else sample.completion)
    total = sum(counts.values())
    matching = sum(counts.get(script, 0) for script in scripts)
    return Score(value=matching / total if total else 0.0, info={"words": counts})


def count_words(text: str) -> dict[str, int]:
    """Script, as in Unicode's names of characters -> number of words."""
    counts: dict[str, int] = {}
    for run in _LETTERS.findall(_NO_WORDS.sub(" ", text)):
        for script, letters in groupby(run, key=_script):
            length = sum(1 for _ in letters)
            if script == "LATIN" and length == 1:
                continue
            counts[script] = counts.get(script, 0) + (length if script in _UNSPACED else 1)
    return counts


@lru_cache(8192)
def _script(letter: str) -> str:
    """The first word of the character's name, for example LATIN, CYRILLIC, CJK."""
    return unicodedata.name(letter, "UNKNOWN").split()[0]
