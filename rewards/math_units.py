"""Units of measurement behind a number: which words are units, and which of them are the same.

This file converts nothing: 1 m is not 100 cm here. Usage: `unit_name("centimeters") == "cm"`.
"""

import re
from functools import lru_cache

_SAME = """
cm centimeter centimeters centimetre centimetres
m meter meters metre metres
mm millimeter millimeters millimetre millimetres
km kilometer kilometers kilometre kilometres
in inch inches
ft foot feet
yd yard yards
mi mile miles
s sec secs second seconds
min mins minute minutes
h hr hrs hour hours
day days
week weeks
month months
yr year years
g gram grams
kg kilogram kilograms kilo kilos
mg milligram milligrams
lb lbs pound pounds
oz ounce ounces
ton tons tonne tonnes
l L liter liters litre litres
ml mL milliliter milliliters
deg degree degrees
rad radian radians
percent pct percentage %
dollar dollars usd USD bucks
cent cents
euro euros
yuan rmb
unit units
mph
N newton newtons
J joule joules
W watt watts
V volt volts
A ampere amperes amp amps
K kelvin
Hz hertz
mol moles
Pa pascal pascals
eV
kW
kJ
MHz
gallon gallons
person people
point points
degC
degF
square sq squared
cubic cu cubed
"""
_NAMES = {word: line.split()[0] for line in _SAME.strip().splitlines() for word in line.split()}
_WORDS_OF_DOUBT = """
or and not no is are isn't never impossible wrong incorrect but if then than to only none false true invalid
undefined unknown at least most more less plus minus times over except without maybe possibly either when for
infinite infinitely divided mod nor where such that with any all every answer solution solutions
"""
_NOT_UNITS = frozenset(_WORDS_OF_DOUBT.split())
IGNORED = frozenset(("unit",))


UNIT_LETTERS = frozenset("msgNJWVKLhl")
"""Letters that are units where they stand in `\\text{}` behind a quantity."""


def is_unit(word: str) -> bool:
    """True for a known name of a unit of two or more letters, `percent` included."""
    return len(word) > 1 and (word in _NAMES or word.lower() in _NAMES) and word.lower() not in ("in", "a")


@lru_cache(maxsize=512)
def unit_name(words: str) -> str | None:
    """One name for a unit or a counted noun, for example "cm^2" for "square centimeters"; None if it is neither."""
    pieces = re.findall(r"[A-Za-z%']+|[0-9]+|[/^*-]", words)
    if not pieces or len(pieces) > 7 or not pieces[0].isalpha() or _NOT_UNITS.intersection(map(str.lower, pieces)):
        return None
    if re.search(r"[^A-Za-z0-9%'/^* .{}()-]", words):
        return None
    names = [_name(piece) for piece in pieces]
    power = {"square": "^2", "cubic": "^3"}
    if names[0] in power:
        names = [*names[1:], power[names[0]]] if len(names) > 1 else ["unit", power[names[0]]]
    elif names[-1] in power:
        names[-1] = power[names[-1]]
    name = "percent" if "percent" in names else "".join(names)
    return name


def _name(piece: str) -> str:
    return "/" if piece == "per" else _NAMES.get(piece) or _NAMES.get(piece.lower()) or piece.lower()


def is_known_unit(name: str) -> bool:
    """True for a unit from the table above, perhaps with an exponent; False for counted nouns such as apples."""
    return all(part in _NAMES.values() or not part.isalpha() for part in re.findall(r"[A-Za-z]+|[^A-Za-z]+", name))
