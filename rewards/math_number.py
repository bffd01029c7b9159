"""Reading one plain number with a single expression: the fast path before any parsing.

Covered: integers, decimals, thousands separators (`1,234`, `1{,}234`, `1\\,234`), `a/b`, `\\frac{a}{b}`, `\\frac12`,
`1.5e3`; a sign, a dollar sign before or behind, and one of these behind: `%`, percent, dollars, degrees, `^\\circ`.
Everything else is left to math_parser.py. Usage: `parse_number("1,234.50") == Fraction(2469, 2)`.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rewards.math_text import clean, has_control_characters

_MAX_NUMBER_CHARS = 64
_MAX_EXPONENT = 300
_DIGITS = r"(?:[1-9][0-9]{0,2}(?:(?:,|\{,\}|,\\!|\\,)[0-9]{3})+|[0-9]+)"
_SIMPLE = r"[-+]?[0-9]+(?:\.[0-9]+)?"
_NUMBER = re.compile(
    rf"""
    (?:\\?\$\s*)? (?P<sign>[-+]?) \s* (?:\\?\$\s*)?
    (?: (?P<decimal>{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+) (?:[eE](?P<exponent>[-+]?[0-9]+))?
      | (?P<over>{_DIGITS}) \s*/\s* (?P<under>{_DIGITS})
      | \\[dt]?frac \s* (?:\{{\s*(?P<top>{_SIMPLE})\s*\}}|(?P<top_digit>[0-9]))
                    \s* (?:\{{\s*(?P<bottom>{_SIMPLE})\s*\}}|(?P<bottom_digit>[0-9]))
    )
    \s* (?: (?P<percent>\\?%|percent|pct) | \\?\$ | dollars? | degrees? | \^\\circ | \^\{{\\circ\}} )?
    """,
    re.VERBOSE,
)
_TEXT = re.compile(r"^\\(?:text|mathrm|mathbf)\{([^{}]*)\}$")


@dataclass(frozen=True, slots=True)
class PlainNumber:
    """A number as it was written."""

    shown: Fraction
    """The value without the percent sign."""
    is_percent: bool
    """Whether a percent sign divides it by 100."""
    is_decimal: bool
    """Whether it has a decimal point or an exponent."""

    @property
    def value(self) -> Fraction:
        """The exact value, 1/2 for 50%."""
        return self.shown / 100 if self.is_percent else self.shown


def parse_number(text: str) -> Fraction | None:
    """Read `text` as one number, 50% as 1/2; None where it is not one of the forms this module covers."""
    number = read_number(text)
    return None if number is None else number.value


def read_number(text: str) -> PlainNumber | None:
    """Read `text` as one number; None where it is not one."""
    return _read_short(text) if len(text) <= _MAX_NUMBER_CHARS else None


@lru_cache(maxsize=4096)
def _read_short(text: str) -> PlainNumber | None:
    if has_control_characters(text):
        return None
    match = _NUMBER.fullmatch(text.strip()) or _NUMBER.fullmatch(_TEXT.sub(r"\1", clean(text)))
    value = match and _fraction(match)
    if match is None or value is None:
        return None
    is_decimal = "." in match.group() or match["exponent"] is not None
    shown = -value if match["sign"] == "-" else value
    return PlainNumber(shown, match["percent"] is not None, is_decimal)


def _fraction(match: re.Match[str]) -> Fraction | None:
    """Turn a match of `_NUMBER` into its unsigned value; None for a zero denominator or a huge exponent."""
    if match["decimal"]:
        exponent = int(match["exponent"] or "0")
        if abs(exponent) > _MAX_EXPONENT:
            return None
        return _exact(match["decimal"]) * Fraction(10) ** exponent
    top = _exact(match["over"] or match["top"] or match["top_digit"])
    bottom = _exact(match["under"] or match["bottom"] or match["bottom_digit"])
    return None if bottom == 0 else top / bottom


def _exact(digits: str) -> Fraction:
    return Fraction(re.sub(r"[^-0-9.]", "", digits))
