"""Mathematical characters of Unicode written as LaTeX or ASCII: one table, applied before anything else is read.

Characters without a mathematical meaning, such as digits of other scripts, stay as they are and are refused later.

Usage: `to_ascii("x\u00b2 \u2264 \u221e") == "x^{2} <= \\\\infty "`.
"""

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a\u207f", "0123456789-+n"
)
_SUBSCRIPTS = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089", "0123456789")
_SUPERSCRIPT_RUN = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b\u207f]+")
_SUBSCRIPT_RUN = re.compile("[\u2080-\u2089]+")
_VULGAR_FRACTION = re.compile("([0-9]?)([\u00bc-\u00be\u2150-\u215e])")
_GREEK = {
    name: chr(code)
    for name, code in {
        "alpha": 0x3B1,
        "beta": 0x3B2,
        "gamma": 0x3B3,
        "delta": 0x3B4,
        "epsilon": 0x3B5,
        "theta": 0x3B8,
        "lambda": 0x3BB,
        "mu": 0x3BC,
        "pi": 0x3C0,
        "rho": 0x3C1,
        "sigma": 0x3C3,
        "tau": 0x3C4,
        "phi": 0x3C6,
        "omega": 0x3C9,
        "Delta": 0x394,
        "Phi": 0x3A6,
        "Omega": 0x3A9,
    }.items()
}
_CHARACTERS = {
    **{char: f"\\{name} " for name, char in _GREEK.items()},
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-"),
    **dict.fromkeys("\u00d7\u2a2f\u00b7\u22c5\u2219\u2022", "*"),
    **dict.fromkeys("\u00f7\u2044\u2215", "/"),
    **dict.fromkeys("\u2018\u2019\u2032", "'"),
    **dict.fromkeys("\u201c\u201d", '"'),
    **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000\u2007", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u2061", ""),
    **dict.fromkeys("\u20ac\u00a3\u00a5", "$"),
    "\u2264": "<=",
    "\u2a7d": "<=",
    "\u2265": ">=",
    "\u2a7e": ">=",
    "\u2260": "!=",
    "\u2248": "\\approx ",
    "\u2261": "\\equiv ",
    "\u221a": "sqrt ",
    "\u221b": "cbrt ",
    "\u221e": "\\infty ",
    "\u00b0": "^\\circ ",
    "\u00ba": "^\\circ ",
    "\u00b1": "\\pm ",
    "\u2213": "\\mp ",
    "\u222a": "\\cup ",
    "\u2229": "\\cap ",
    "\u2208": "\\in ",
    "\u2205": "\\emptyset ",
    "\u00d8": "\\emptyset ",
    "\u2216": "\\setminus ",
    "\u2220": "\\angle ",
    "\u2211": "\\sum ",
    "\u220f": "\\prod ",
    "\u230a": "\\lfloor ",
    "\u230b": "\\rfloor ",
    "\u2308": "\\lceil ",
    "\u2309": "\\rceil ",
    "\u27e8": "\\langle ",
    "\u27e9": "\\rangle ",
    "\u2223": "|",
    "\u2026": "\\ldots ",
    "\u211d": "\\mathbb{R}",
    "\u2124": "\\mathbb{Z}",
    "\u2115": "\\mathbb{N}",
    "\u211a": "\\mathbb{Q}",
    "\u2102": "\\mathbb{C}",
    "\u3001": ",",
    "\u3002": ".",
    "\uff1a": ":",
    "\uff1b": ";",
}
_TRANSLATION = str.maketrans(_CHARACTERS)


def to_ascii(text: str) -> str:
    """Write the mathematical characters of Unicode as LaTeX, and full-width forms as ASCII."""
    if text.isascii():
        return text
    text = _VULGAR_FRACTION.sub(_mixed, text)
    text = _SUPERSCRIPT_RUN.sub(lambda match: "^{" + match.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda match: "_{" + match.group().translate(_SUBSCRIPTS) + "}", text)
    text = text.translate(_TRANSLATION)
    return "".join(unicodedata.normalize("NFKC", char) if "\uff01" <= char <= "\uff5e" else char for char in text)


def _mixed(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[2]).partition("\u2044")
    return f"{match[1]}\\frac{{{top}}}{{{bottom}}}"
