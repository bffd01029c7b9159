"""Which training texts share a passage with an evaluation set: n-grams of words, as GPT-3 compared its corpus.

Words are runs of letters and digits, lower case; a Chinese character or kana is a word. A text is contaminated by an
evaluation text if they share `ngram` words in a row, 13 in GPT-3 (arXiv:2005.14165, appendix C), or if one of its
questions consists of the same words. Passages of more than `max_shared` evaluation texts are form, not content, and do
not count (GPT-3: 10); a text that stands there several times, as problems repeated for avg@k do, is one.

    overlap = Overlap(evaluation_texts(["gsm8k/test.jsonl"], split="test"), ngram=13)
    match = overlap.find(["Janet's ducks lay 16 eggs ..."], questions=["Janet's ..."])
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.data import Row, iter_rows

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_QUESTIONS = ("question", "problem", "prompt", "text", "query", "content", "description")
_OTHERS = ("completion", "solution", "answer", "response", "code", "canonical_solution", "teacher_full_output")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's place is lost modulo 2^64


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """One text of an evaluation set."""

    where: str
    """File and line."""
    text: str
    is_question: bool = True
    """Whether a question of the same words counts, however short; else only long passages do."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """Why a text is contaminated."""

    where: str
    """File and line of the evaluation text."""
    evaluation_text: str
    passage: str
    """The words that both have."""


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def row_texts(row: Row) -> tuple[list[str], list[str]]:
    """The questions of a row, and its other texts; of messages, the user's and the others'."""
    questions = [row[name] for name in _QUESTIONS if isinstance(row.get(name), str)]
    others = [row[name] for name in _OTHERS if isinstance(row.get(name), str)]
    for name in ("prompt", "messages"):
        turns: Any = row.get(name)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and isinstance(turn.get("content"), str):
                (questions if turn.get("role") == "user" else others).append(turn["content"])
    return questions, others


def evaluation_texts(sources: Sequence[str], split: str) -> Iterator[EvaluationText]:
    """The texts of evaluation sets. Raises ValueError for a row that is none or has no text that is known."""
    for source in sources:
        for _, where, row in iter_rows(source, split):
            questions, others = ([], []) if isinstance(row, str) else row_texts(row)
            if not questions:
                problem = row if isinstance(row, str) else f"no text in any of {', '.join(_QUESTIONS)}, messages"
                raise ValueError(f"{where}: {problem}; an evaluation set must be read whole")
            yield from (EvaluationText(where=where, text=text) for text in questions)
            yield from (EvaluationText(where=where, text=text, is_question=False) for text in others)


class Overlap:
    """An index of evaluation texts. Looking up 1,000 characters takes about 0.2 ms."""

    def __init__(self, texts: Iterable[EvaluationText], *, ngram: int = 13, max_shared: int = 10) -> None:
        if ngram < 2 or max_shared < 1:
            raise ValueError(f"ngram must be >= 2 and max_shared >= 1, got {ngram} and {max_shared}")
        self.ngram = ngram
        self._texts = list(texts)
        self._numbers: dict[str, int] = {}
        self._whole: dict[tuple[str, ...], int] = {}
        rows_of_hash: dict[int, list[int]] = defaultdict(list)
        self._words = [words_of(one.text) for one in self._texts]
        rows: dict[str, int] = {}
        seen: set[tuple[str, ...]] = set()
        for index, (one, words) in enumerate(zip(self._texts, self._words, strict=True)):
            row = rows.setdefault(one.where, len(rows))
            for word in words:
                self._numbers.setdefault(word, len(self._numbers) + 1)
            text = tuple(words)
            if one.is_question and words:
                self._whole.setdefault(text, index)
            if text in seen:
                continue
            seen.add(text)
            for value in set(self._hashes(words)[1].tolist()):
                rows_of_hash[value].append(row << 32 | index)
        kept = {h: [i & 0xFFFFFFFF for i in found] for h, found in rows_of_hash.items()
                if len({i >> 32 for i in found}) <= max_shared}  # fmt: skip
        self._index_of = {value: found[0] for value, found in kept.items()}
        self._sorted = np.array(sorted(kept), dtype=np.uint64)

    def _hashes(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Where n-grams of known words begin, and their hashes. Words that no evaluation text has are 0."""
        ids = np.fromiter((self._numbers.get(word, 0) for word in words), dtype=np.uint64, count=len(words))
        count = len(words) - self.ngram + 1
        if count < 1:
            return np.empty(0, np.int64), np.empty(0, np.uint64)
        known = np.concatenate(([0], np.cumsum(ids > 0)))
        starts = np.flatnonzero(known[self.ngram :] - known[: -self.ngram] == self.ngram)
        values = np.zeros(len(starts), np.uint64)
        for place in range(self.ngram if len(starts) else 0):
            values = values * _FACTOR + ids[starts + place]
        return starts, values ^ (values >> np.uint64(29))

    def find(self, texts: Iterable[str], questions: Iterable[str] = ()) -> Match | None:
        """The first evaluation text that one of `texts` shares a passage with, or that one of `questions` repeats."""
        for question in questions:
            words = tuple(words_of(question))
            if (index := self._whole.get(words)) is not None:
                return self._match(index, words)
        for text in texts:
            words = words_of(text)
            starts, values = self._hashes(words)
            if not len(values) or not len(self._sorted):
                continue
            places = np.minimum(np.searchsorted(self._sorted, values), len(self._sorted) - 1)
            for start, value in zip(starts[hits := self._sorted[places] == values], values[hits], strict=True):
                passage = words[start : start + self.ngram]
                index = self._index_of[int(value)]
                if f" {' '.join(passage)} " in f" {' '.join(self._words[index])} ":  # no chance hit of a hash
                    return self._match(index, passage)
        return None

    def _match(self, index: int, passage: Sequence[str]) -> Match:
        one = self._texts[index]
        return Match(where=one.where, evaluation_text=one.text, passage=" ".join(passage))
