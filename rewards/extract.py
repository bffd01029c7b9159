r"""Finding the final answer in a completion: named extractors, tried in order, each in linear time on any text.

This file does not compare answers (math_compare.py does), nor choose the part of a completion to read
(`Sample.answer_part` does).

Usage: `extract_answer(r"so \boxed{42}")` gives `Extraction(answer="42", method="boxed", boxes=("42",))`.

| method      | finds                                                                    | closed |
|-------------|--------------------------------------------------------------------------|--------|
| answer_tag  | the last `<answer>..</answer>`; if it holds a box, what is in the box    | yes    |
| boxed       | the last balanced `\boxed{..}` or `\fbox{..}`, the inner one if nested   | yes    |
| hash        | what follows the last `####` on its line (GSM8K)                         | no     |
| answer_line | what follows the last "answer:" or "answer is" to the end of its sentence| no     |
| last_math   | the last `$..$` or `\[..\]`, if no number follows it                     | no     |
| whole       | the whole text, if it is one short line without prose                    | no     |
| last_number | the last word that is a plain number; the most guessing of all           | no     |

Closed methods know where the answer ends, so a truncated completion cannot cut it short. Where they find answers side
by side, as in `\boxed{3} or \boxed{4}`, the answer is the list "3, 4": hedging is not read as the last guess.
A sentence that says there is none ("x = 10 is impossible") holds no number for `last_number`.
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
    boxes: tuple[str, ...] = ()
    """What each box of the text holds, in order, for the methods "boxed" and "answer_tag"; strict mode asks for one."""


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
_MAX_GAP_CHARS = 60
_BETWEEN_LIST_ITEMS = re.compile(r"(?:[\s$,;&{}+]|\\[()\[\]]|\\(?:text|quad|qquad|mbox)(?![a-z])|or\b|and\b)*")
_NAMED_ITEM = re.compile(
    r"[^.!?]*(?<![A-Za-z])(?:and|or)(?![A-Za-z])[^.!?]*|[\s$,;{}]*\\?[()]?[\s$,;]*[A-Za-z](?:_\{?\w\}?)?\s*=\s*"
)
_TURNS_BACK = re.compile(r"(?<![A-Za-z])(?:no|not|but|so|then|wait|actually|instead|now|hence|thus)(?![A-Za-z])", re.I)
_ANSWER_MARK = re.compile(
    r"\b(?:answer|option|choice)(?:\*\*)?(?:\s*:|\s+is\b(?!\s+(?:correct|wrong|right))|\s*=)[\s:*]*", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\.(?=\s|$)(?:\s*\$)?")
_INNER_STATEMENT = re.compile(r".*(?:\b(?:is|are|equals|be)|:)\s+(?=\S)", re.DOTALL)
_MATH = re.compile(
    r"(?<!\\)\$\$(?P<double>[^$]+?)(?<!\\)\$\$|(?<![\\$])\$(?P<inline>(?:[^$\n\\]|\\.)+)\$|\\\[(?P<display>.{1,1000}?)\\\]"
    r"|\\\((?P<paren>[^\n]{1,1000}?)\\\)",
    re.DOTALL,
)
_MAX_MATH_TAIL = 4000
_NO_ANSWER = re.compile(r"\b(?:impossible|no solutions?|contradiction|does not exist|invalid|incorrect)\b", re.I)
_PLAIN_NUMBER = re.compile(
    r"[-+]?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|[0-9]+,[0-9]{1,2}|\.[0-9]+)(?:/[0-9]+|[eE][-+]?[0-9]+)?%?"
)
_UNIT_BEHIND = re.compile("[^0-9.,%/eE+-][^0-9]{0,3}$")
_MAX_NUMBER_CHARS = 64
_MAX_WHOLE_CHARS = 200
_PROSE = re.compile(
    r"[A-Za-z']{2,}\s+[A-Za-z']{2,}|[A-Za-z]{3,}\s*:|^[A-Z][a-z]+,\s|(?:^|\s)[A-Za-z]{3,}\s|\s[A-Za-z]{4,}"
)
_WRAPPERS = "()[]{}*_`'\"\\$,;:"
_BROKEN_MATH = re.compile(r"\s*\n\s*(?:\$|\\\)|\\\])")
_TURN = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text|end|eom_id)\|>|</s>|<\uff5cend\u2581of\u2581sentence\uff5c>"
)
_OWN_TURN = re.compile(r"\s*<\|im_start\|>assistant\s*")


def own_turn(text: str) -> str:
    """The text up to the first token that ends a turn: what a model writes after it is not its answer."""
    opening = _OWN_TURN.match(text)
    text = text[opening.end() :] if opening else text
    end = _TURN.search(text)
    return text[: end.start()] if end and text[: end.start()].strip() else text


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
    return _last_side_by_side(text, _boxes(text))


def _boxes(text: str) -> list[_Span]:
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
    return spans


def _last_side_by_side(text: str, spans: Sequence[_Span]) -> str | None:
    """Join the contents of the last span and of those before it with nothing but list punctuation in between."""
    if not spans:
        return None
    first = len(spans) - 1
    while first > 0 and _is_list_gap(text[spans[first - 1].end : spans[first].start]):
        first -= 1
    distinct = dict.fromkeys(span.content for span in spans[first:])
    return ", ".join(distinct)


def _is_list_gap(gap: str) -> bool:
    """Whether two answers with `gap` between them are items of one list: punctuation, "and", or the next name."""
    if _BETWEEN_LIST_ITEMS.fullmatch(gap):
        return True
    return len(gap) <= _MAX_GAP_CHARS and bool(_NAMED_ITEM.fullmatch(gap)) and not _TURNS_BACK.search(gap)


def _hash(text: str) -> str | None:
    _, mark, rest = text.rpartition("####")
    return rest.partition("\n")[0] if mark else None


def _answer_line(text: str) -> str | None:
    marks = list(_ANSWER_MARK.finditer(text))
    if not marks:
        return None
    line = text[marks[-1].end() :].partition("\n")[0]
    sentence = _SENTENCE_END.split(line, maxsplit=1)[0].strip(" \t*") if line else ""
    if len(sentence) < len(line) and line[len(sentence) :].startswith(".") and not line[len(sentence) + 1 :].strip():
        sentence = line.strip(" \t*")
    return _statement(sentence)


def _statement(sentence: str) -> str:
    """What a sentence such as "The largest $n$ is 34" states: what follows its last "is", else its last number."""
    if len(sentence) > _MAX_MATH_TAIL or not re.search(r"[A-Za-z]{3,} +\S*[A-Za-z$]", sentence):
        return sentence
    match = _INNER_STATEMENT.match(sentence)
    if match:
        return sentence[match.end() :]
    if re.search(r"\b(?:not|or|and)\b", sentence):
        return sentence
    words = [word.strip(_WRAPPERS + ".") for word in sentence.split()]
    numbers = [word for word in words if len(word) <= _MAX_NUMBER_CHARS and _PLAIN_NUMBER.fullmatch(word)]
    return numbers[0] if len(numbers) == 1 else sentence


def _last_math(text: str) -> str | None:
    tail = text[-_MAX_MATH_TAIL:]
    environments = list(_MATH.finditer(tail))
    if not environments or _last_number(tail[environments[-1].end() :]):
        return None
    last = environments[-1]
    return next(content for content in last.groups() if content is not None)


def _whole(text: str) -> str | None:
    bare = text.strip()
    is_short = 0 < len(bare) <= _MAX_WHOLE_CHARS and "\n" not in bare and "boxed" not in bare
    return bare if is_short and any(map(str.isalnum, bare)) and not _PROSE.search(bare) else None


def _last_number(text: str) -> str | None:
    end = len(text)
    for word in reversed(re.split(r"[\s=]+", text)):
        end = text.rfind(word, 0, end)
        bare = word.lstrip(_WRAPPERS).rstrip(_WRAPPERS + ".!?")
        if len(bare) > _MAX_NUMBER_CHARS:
            continue
        if not bare.isascii():
            bare = _UNIT_BEHIND.sub("", bare)
        if _PLAIN_NUMBER.fullmatch(bare):
            return None if _is_denied(text, end, end + len(word)) else bare
    return None


def _is_denied(text: str, start: int, end: int) -> bool:
    """Whether the sentence around a number says that there is no answer, or broken math surrounds it."""
    opening = max(text.rfind(mark, 0, start) for mark in (". ", "\n", "! ", "? "))
    closing = [place for mark in (". ", "\n", "! ", "? ") if (place := text.find(mark, end)) >= 0]
    sentence = text[opening + 1 : min(closing, default=len(text))]
    return bool(_BROKEN_MATH.match(text, end)) or bool(_NO_ANSWER.search(sentence))


EXTRACTORS: Mapping[str, Callable[[str], str | None]] = MappingProxyType(
    {
        "answer_tag": _answer_tag,
        "boxed": _boxed,
        "hash": _hash,
        "answer_line": _answer_line,
        "last_math": _last_math,
        "whole": _whole,
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
            boxes = tuple(span.content for span in _boxes(text)) if method in CLOSED_METHODS else ()
            return Extraction(answer=answer, method=method, boxes=boxes)
    return Extraction(answer=None, method="none")
