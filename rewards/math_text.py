r"""Writing an answer plainly before it is read: Unicode, sizing and spacing commands, wrappers, thousands separators.

This file changes the writing, never the value; what it cannot map it leaves alone. Every step is linear in the text.

Usage: `clean(r"\left( 1{,}234 \right).") == "( 1234 )"`; `normalise_answer` goes further, for comparing as text.
"""

import re
from functools import lru_cache

from rewards.math_unicode import to_ascii

MAX_CHARS = 2000

_COMMAND_NAMES = """
frac dfrac tfrac cfrac sqrt left right text textbf textrm mathrm boxed fbox begin end times cdot infty pi cup cap pm
le leq ge geq ne neq circ quad sin cos tan log ln theta alpha beta in mathbb overline binom
"""
_COMMANDS = _COMMAND_NAMES.split()
_DOUBLE_BACKSLASH = re.compile(r"(?<!\\)\\\\(?=(?:" + "|".join(_COMMANDS) + r")(?![A-Za-z]))")
_SPACING = re.compile(
    r"(?<!\\)\\(?:q?quad|hfill|hspace\{[^{}]*\}|vspace\{[^{}]*\}|allowbreak|newline|,|;|:|>|\s)|~|&nbsp;"
)
_NOTHING = re.compile(
    r"\\!|\\(?:color|textcolor|h?phantom|label|tag\*?)\{[^{}]*\}|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle"
    r"|scriptstyle|limits|nolimits|tiny|small|normalsize|large|Large|LARGE|huge|Huge|bf|rm|it|sf|boldmath|unboldmath"
    r"|centering|phantom|checkmark|nonumber)(?![A-Za-z])(?:(?<=left)\.|(?<=right)\.)?"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_DELIMITERS = re.compile(r"(?<!\\)\$\$?|\\[()\[\]]|\\\$")
_ALIGN = re.compile(r"\\(?:begin|end)\{(?:align|equation|gather|displaymath|math|center)\*?\}")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_TIMES_TEN = re.compile(r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)")
_BASE = re.compile(
    r"\(?\b([0-9A-F]+)\)?_?\s*\{?\(?\s*(?:\\text\{)?\s*(?:in\s+)?base[ -]*\}?\s*([0-9]+|[a-z]+)\s*\}?\)?\}?"
)
_WRAPPED = re.compile(r"\\(?:boxed|fbox|underline|mathbf|boldsymbol|bm|mathit|mathnormal|mbox)\s*\{")
_MARKUP_ENDS = '*`"_ \t\r\n'
_THOUSANDS_GROUP = re.compile(
    r"(?<=[0-9])\s?(?:'|\{\s*,\s*\}|,?\\!,?|,\\[,; ]|,\{\}|\{\\,\}|\\,|\\;)\s?(?=[0-9]{3}(?![0-9]))"
)
_SPACED_THOUSANDS = re.compile(
    r"(?<![0-9.,A-Za-z] )(?<![0-9.,A-Za-z])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9A-Za-z./]| ?/)"
)
_FRENCH = re.compile(r"(?:^|cup)\s*\]|\[\s*(?:$|\\cup)")
_INTERVAL = re.compile(r"([\[\]])([^\[\]();,]+[,;][^\[\]();,]+)([\[\]])")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|rm|it|normal|tt|sf)?|mathrm|mathbf|mathsf|mbox|operatorname)\*?\s*\{([^{}]*)\}"
)


def has_control_characters(text: str) -> bool:
    """True for text no answer holds: NUL and other control characters besides tab and line ends."""
    return _CONTROL.search(text) is not None


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    """Remove what does not change the meaning of an answer: wrappers, sizing, spacing, delimiters, a final period."""
    text = to_ascii(text).strip().replace("+/-", "\\pm ")
    if "\\\\" in text:
        text = _DOUBLE_BACKSLASH.sub(lambda _: "\\", text)
    text = _unwrap(_drop_end(text))
    text = _THOUSANDS_GROUP.sub("", text)
    if "\\" in text or "$" in text or "~" in text:
        text = _ALIGN.sub(" ", text)
        text = _DELIMITERS.sub(" ", text)
        text = _NOTHING.sub("", _SPACING.sub(" ", text))
        text = _FRACTION.sub(r"\\frac", text)
        text = _BOX.sub("", text)
    if "base" in text:
        text = _BASE.sub(r"\1_{\2}", text)
    text = _balanced(_TIMES_TEN.sub("*", _unwrap(_drop_end(text))))
    if _FRENCH.search(text):
        text = _INTERVAL.sub(_half_open, text)
    return _SPACED_THOUSANDS.sub(lambda match: match.group().replace(" ", ""), text)


def _half_open(match: re.Match[str]) -> str:
    return f"{'[' if match[1] == '[' else '('}{match[2]}{']' if match[3] == ']' else ')'}"


def _balanced(text: str) -> str:
    """Drop closing braces at the end that nothing opens."""
    while text.endswith("}") and not text.endswith("\\}") and _num_open(text) < 0:
        text = text[:-1].rstrip()
    return text


def _num_open(text: str) -> int:
    plain = text.replace("\\{", "").replace("\\}", "")
    return plain.count("{") - plain.count("}")


def _drop_end(text: str) -> str:
    """Drop markup around the whole, and trailing punctuation, backslashes and line breaks."""
    while True:
        before = text
        text = text.strip(_MARKUP_ENDS)
        if text.endswith(("...", "\\ldots", "\\dots")):
            return text
        text = text.rstrip(".,;:\\ ") if not text.endswith(("\\%", "\\}", "\\)", "\\]")) else text
        if text == before:
            return text


def _unwrap(text: str) -> str:
    r"""Remove braces, dollars and `\boxed{}`-like commands that enclose the whole text."""
    for _ in range(12):
        before = text
        match = _WRAPPED.match(text)
        if match is not None:
            end = closing_brace(text, match.end())
            text = text[match.end() :] if end < 0 else text[match.end() : end] if end == len(text) - 1 else text
        elif text.startswith("{") and closing_brace(text, 1) == len(text) - 1 and "," not in text:
            text = text[1:-1]
        else:
            for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
                inner = text[len(left) : -len(right)]
                if len(text) > 2 * len(left) and text.startswith(left) and text.endswith(right) and left not in inner:
                    text = inner
                    break
        text = text.strip()
        if text == before:
            return text
        text = _drop_end(text)
    return text


def closing_brace(text: str, start: int) -> int:
    """The index of the brace that closes the group opened just before `start`, or -1."""
    depth, index = 1, start
    while index < len(text):
        char = text[index]
        if char == "\\":
            index += 1
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return index
        index += 1
    return -1


def normalise_answer(text: str) -> str:
    r"""Write equal texts equally: cleaned, without `\text{}`, and without spaces except between letters or digits."""
    text = _TEXT_COMMAND.sub(r"\1", clean(text)) if len(text) <= MAX_CHARS else text.strip()
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(text.split()))


def words(text: str) -> str:
    """The letters and digits of a text in lower case, without punctuation and leading articles."""
    plain = re.sub(r"[^a-z0-9+\-*/^=<>']+", " ", _TEXT_COMMAND.sub(r" \1 ", clean(text)).lower()).strip()
    return re.sub(r"^(?:the|an|a) (?=[a-z]{2})", "", plain)
