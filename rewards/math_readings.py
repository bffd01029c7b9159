"""Second readings of an answer that can be read in two ways, tried where the first reading is not the gold answer.

Usage: `other_readings("1.5", "1,5") == [("1.5", "1.5")]`.
"""

import re

from rewards.math_parser import has_thousands
from rewards.math_text import clean

_DECIMAL_COMMA = re.compile(r"-?[0-9]+,[0-9]+")
_LEAD = re.compile(r"(?:\\text\{)?\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s*\}?\s*:?(?=.)", re.IGNORECASE)
_SPACED_UNIT = re.compile(r"(?<=[0-9}])\s+(?:km|cm|mm|m|s|g|N|J|W|V|A|K|L|h)(?:\^\{?[23]\}?|/[smh](?:\^2)?)?$")


def other_readings(gold: str, predicted: str) -> list[tuple[str, str]]:
    """Other readings of an ambiguous prediction, tried where the first one is not equal: a decimal comma, and a letter
    behind a space as a unit."""
    found = []
    plain_gold, plain = clean(gold), clean(predicted)
    for a, b in ((plain_gold, plain), (plain, plain_gold)):
        if _DECIMAL_COMMA.fullmatch(a) and not has_thousands(a) and re.fullmatch(r"-?[0-9]*\.[0-9]+", b):
            found.append((plain_gold.replace(",", "."), plain.replace(",", ".")))
            break
    if lead := _LEAD.match(plain):
        found.append((plain_gold, plain[lead.end() :]))
    if (unit := _SPACED_UNIT.search(plain)) and unit.start() > 0:
        found.append((plain_gold, f"{plain[: unit.start()]} \\text{{{unit.group()}}}"))
    return found
