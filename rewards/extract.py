r"""Finding the final answer in a completion: named extractors, tried in order, each in linear time on any text.

This file does not compare answers (math_answer.py does), nor choose the part of a completion to read
(`Sample.answer_part` does).

Usage: `extract_answer(r"so \boxed{42}")` gives `Extraction(answer="42", method="boxed")`.

| method      | finds                                                                    | closed |
|-------------|--------------------------------------------------------------------------|--------|
| answer_tag  | the last `<answer>..</answer>`; if it holds a box, what is in the box    | yes    |
| boxed       | the last balanced `\boxed{..}` or `\fbox{..}`, the inner one if nested   | yes    |
| hash        | what follows the last `####` on its line (GSM8K)                         | no     |
| answer_line | what follows the last "answer:" or "answer is" to the end of its sentence| no     |
| last_number | the last word that is a plain number; the most guessing of the five      | no     |

Closed methods know where the answer ends, so a truncated completion cannot cut it short. Where they find answers side
by side, as in `\boxed{3} or \boxed{4}`, the answer is the list "3, 4": hedging is not read as the last guess.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """A final answer and how it was found."""

    answer: str | None
    """The answer, stripped and not empty; None where no method found one."""
    method: str
    """The method that found it, "none" where none did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """One marked answer in a text."""

    start: int
    """Where its opening mark begins."""
    end: int
    """Where its closing mark ends."""
    content: str
    """What lies between the marks, stripped."""


_TAG = re.compile(r"</?answer>")
_BRACE = re.compile(r"\\\\?(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]")  # a box's opening, an escaped character, a brace
_BETWEEN_LIST_ITEMS = re.compile(r"(?:[\s$,;&{}]|\\text|or|and)*")
_ANSWER_MARK = re.compile(r"\banswer(?:\*\*)?(?::| is\b)[\s:*]*", re.IGNORECASE)
_PLAIN_NUMBER = re.compile(
    r"[-+]?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+|[eE][-+]?[0-9]+)?%?"
)
_MAX_NUMBER_CHARS = 64
_WRAPPERS = "()[]{}*_`'\"\\$,;:"


def _answer_tag(text: str) -> str | None:
    spans: list[_Span] = []
    opening: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        if tag.group() == "<answer>":
            opening = tag
        elif opening is not None:
            content = text[opening.end() : tag.start()].strip()
            spans.append(_Span(start=opening.start(), end=tag.end(), content=content))
            opening = None
    tagged = _last_side_by_side(text, spans)
    return tagged and (_boxed(tagged) or tagged)


def _boxed(text: str) -> str | None:
    spans: list[_Span] = []
    stack: list[re.Match[str]] = []
    for token in _BRACE.finditer(text):
        if token.group().endswith("{") and token.group() != "\\{":
            stack.append(token)
        elif token.group() == "}" and stack:
            opening = stack.pop()
            holds_a_box = bool(spans) and spans[-1].start > opening.start()
            if opening.group() != "{" and not holds_a_box:
                content = text[opening.end() : token.start()].strip()
                spans.append(_Span(start=opening.start(), end=token.end(), content=content))
    return _last_side_by_side(text, spans)


def _last_side_by_side(text: str, spans: Sequence[_Span]) -> str | None:
    """Join the contents of the last span and of those before it with nothing but list punctuation in between."""
    if not spans:
        return None
    first = len(spans) - 1
    while first > 0:
        gap = text[spans[first - 1].end : spans[first].start]
        if not _BETWEEN_LIST_ITEMS.fullmatch(gap):
            break
        first -= 1
    distinct = dict.fromkeys(span.content for span in spans[first:])
    return ", ".join(distinct)


def _hash(text: str) -> str | None:
    _, mark, rest = text.rpartition("####")
    return rest.partition("\n")[0] if mark else None


def _answer_line(text: str) -> str | None:
    marks = list(_ANSWER_MARK.finditer(text))
    if not marks:
        return None
    line = text[marks[-1].end() :].partition("\n")[0]
    return re.split(r"\.\s", line, maxsplit=1)[0].strip(" \t*")


def _last_number(text: str) -> str | None:
    for word in reversed(re.split(r"[\s=]+", text)):
        bare = word.lstrip(_WRAPPERS).rstrip(_WRAPPERS + ".!?")
        if len(bare) <= _MAX_NUMBER_CHARS and _PLAIN_NUMBER.fullmatch(bare):
            return bare
    return None


EXTRACTORS: Mapping[str, Callable[[str], str | None]] = MappingProxyType(
    {
        "answer_tag": _answer_tag,
        "boxed": _boxed,
        "hash": _hash,
        "answer_line": _answer_line,
        "last_number": _last_number,
    }
)
CLOSED_METHODS = ("answer_tag", "boxed")
DEFAULT_METHODS = tuple(EXTRACTORS)


def extract_answer(text: str, methods: Sequence[str] = DEFAULT_METHODS) -> Extraction:
    """Try `methods` in order and return the first answer that is not empty."""
    unknown = [method for method in methods if method not in EXTRACTORS]
    if unknown:
        raise ValueError(f"unknown extraction method {unknown[0]!r}; known: {', '.join(EXTRACTORS)}")
    for method in methods:
        answer = (EXTRACTORS[method](text) or "").strip()
        if answer:
            return Extraction(answer=answer, method=method)
    return Extraction(answer=None, method="none")
