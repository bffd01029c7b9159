r"""Cutting a cleaned answer into tokens, at most 800 of them, numbers of at most 300 digits.

This file knows the spelling of answers (`\sqrt`, `sqrt`, `<=`, `\text{or}`), not their grammar.

Usage: `tokenize(r"\frac{1}{2}")` gives `\frac`, `{`, `1`, `}`, `{`, `2`, `}`.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.math_nodes import Node, Refused, num
from rewards.math_units import is_unit

MAX_TOKENS, MAX_DIGITS, MAX_EXPONENT = 800, 300, 1000


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer."""

    kind: str
    """num, name (a symbol), func, command, op, rel, word (text), join (and, or), end."""
    text: str
    """Its spelling in one form: `<=` for `\\le`."""
    spaced: bool = False
    """Whether a space stands before it."""
    node: Node | None = None
    """The value of a number."""
    plain: bool = False
    """Whether a function stands without a backslash (`sqrt17` is the root of 17), or a letter in `\\text{}`."""


_TOKEN = re.compile(
    r"""
      (?P<space>\s+)
    | (?P<repeat>[0-9]*\.[0-9]*
        (?:\\(?:overline|bar)\s*(?:\{[0-9]+\}|[0-9])|(?:\\dot\s*(?:\{[0-9]\}|[0-9])[0-9]*){1,2}|\([0-9]+\)))
    | (?P<hexadecimal>[0-9A-Fa-f]{1,32}(?=_\{?(?:16|1[1-5])(?![0-9])))
    | (?P<num>(?:[0-9]+\.[0-9]*|\.?[0-9]+)(?:[eE][-+]?[0-9]+(?![0-9A-Za-z.]))?)
    | (?P<text>\\(?:text[a-z]*|mathrm|mathsf|mathtt|mbox|hbox|operatorname\*?|rm)\s*\{(?P<content>[^{}]*)\})
    | (?P<styled>
        \\(?:mathbb|mathcal|mathbf|mathit|boldsymbol|bm|vec|hat|overline|bar|widehat|overrightarrow|tilde|mathfrak)
        (?:\s*\{\s*(?P<letters>[A-Za-z]{1,4}|\\[a-z]+)\s*\}|\s+(?P<letter>[A-Za-z])(?![A-Za-z])))
    | (?P<environment>\\(?P<side>begin|end)\s*\{(?P<matrix>[a-z]*)\*?\}(?:\{[clr| ]*\})?)
    | (?P<command>\\(?:[A-Za-z]+|[{}|%#&_]))
    | (?P<rowend>\\\\(?:\[[^\]]{0,9}\])?)
    | (?P<letters_run>[A-Za-z]+)
    | (?P<rel><=|>=|!=|=<|=>|[<>=](?!=))
    | (?P<op>\*\*|\.\.+|[-+*/^_(){}\[\]|,;:!%'&])
    """,
    re.VERBOSE,
)
_FUNCTION_NAMES = """
sqrt cbrt sin cos tan sec csc cot arcsin arccos arctan asin acos atan sinh cosh tanh coth log ln lg exp abs floor
ceil gcd lcm max min det
"""
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_ALIASES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log", "mathrm": "", "cosec": "csc"}
_RELATIONS = {
    **{"<": "<", ">": ">", "<=": "<=", "=<": "<=", ">=": ">=", "=>": ">=", "=": "=", "!=": "!="},
    **{"lt": "<", "le": "<=", "leq": "<=", "leqslant": "<=", "gt": ">", "ge": ">=", "geq": ">=", "geqslant": ">="},
    **{"ne": "!=", "neq": "!=", "approx": "~", "equiv": "=", "in": "in", "sim": "~", "simeq": "~", "doteq": "~"},
}
_OPERATORS = {
    **{"cdot": "*", "times": "*", "ast": "*", "div": "/", "cup": "union", "cap": "inter", "setminus": "minus"},
    **{"backslash": "minus", "pm": "+-", "mp": "-+", "mid": "|", "vert": "|", "lvert": "|", "rvert": "|", "|": "||"},
    **{"langle": "<(", "rangle": ")>", "lfloor": "lfloor", "rfloor": "rfloor", "lceil": "lceil", "rceil": "rceil"},
    **{"{": "\\{", "}": "\\}", "%": "%", "colon": ":", "to": "to", "lbrace": "\\{", "rbrace": "\\}", "&": "&"},
    **{"lbrack": "[", "rbrack": "]", "vee": "union", "prime": "'", "ldots": "...", "dots": "...", "cdots": "..."},
}
_GREEK_WORDS = frozenset(["alpha", "beta", "gamma", "theta", "lambda", "sigma", "omega", "delta", "phi"])
_JOINS = {"and": "and", "or": "or", "&": "and"}
_NUMBER_WORDS = frozenset(["approximately", "about", "exactly", "roughly"])


def tokenize(text: str) -> list[Token]:
    """Cut `text` into tokens, ended by one of kind "end"; Refused for what no answer holds and beyond the bounds."""
    tokens: list[Token] = []
    index, spaced = 0, False
    while index < len(text):
        match = _TOKEN.match(text, index)
        if match is None:
            raise Refused(f"unexpected character {text[index]!r}")
        index = match.end()
        if match.lastgroup == "space":
            spaced = True
            continue
        for token in _read(match, spaced):
            tokens.append(token)
            spaced = False
        if len(tokens) > MAX_TOKENS:
            raise Refused(f"more than {MAX_TOKENS} tokens")
    tokens.append(Token("end", ""))
    return tokens


def _read(match: re.Match[str], spaced: bool) -> list[Token]:
    text = match.group()
    if match["repeat"] is not None:
        return [Token("num", text, spaced, _repeating(text))]
    if match["num"] is not None:
        return [Token("num", text, spaced, _number(text))]
    if match["hexadecimal"] is not None:
        return [Token("word", text, spaced)]
    if match["text"] is not None:
        return _text(match["content"].strip(), spaced, is_operator="operator" in text or "mathrm" in text)
    if match["styled"] is not None:
        return [_styled(text, match["letters"] or match["letter"], spaced)]
    if match["environment"] is not None:
        return [Token(match["side"], match["matrix"], spaced)]
    if match["command"] is not None:
        return _command(text[1:], spaced)
    if match["letters_run"] is not None:
        if text == "min" and match.string[match.end() : match.end() + 1] not in ("(", "{", "\\"):
            return [Token("word", text, spaced)]
        return _run(text, spaced)
    if match["rel"] is not None:
        return [Token("rel", _RELATIONS[text], spaced)]
    if text.startswith("\\\\"):
        return [Token("op", "\\\\", spaced)]
    return [Token("op", {"**": "^"}.get(text, "..." if text.startswith("..") else text), spaced)]


def _number(text: str) -> Node:
    if text.isdigit() and len(text) <= MAX_DIGITS:
        return num(int(text))
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or "0")) > MAX_EXPONENT:
        raise Refused(f"a number of more than {MAX_DIGITS} digits or an exponent beyond {MAX_EXPONENT}")
    whole, _, places = mantissa.partition(".")
    value = Fraction(int(whole + places or "0"), 10 ** len(places)) * Fraction(10) ** int(exponent or "0")
    if not places and not exponent:
        return num(value)
    ulp = Fraction(1, 10 ** len(places)) * Fraction(10) ** int(exponent or "0")
    return Node("dec", (), (value, ulp, len((whole + places).lstrip("0"))))


def _repeating(text: str) -> Node:
    r"""Read `0.1\overline{6}`, `0.\dot{1}4285\dot{7}` and `0.1(6)` exactly."""
    whole, _, rest = text.partition(".")
    fixed, block, *more = re.findall(r"[0-9]+", rest if rest[0].isdigit() else f"0{rest}")
    fixed = fixed if rest[0].isdigit() else ""
    if more and len(block + more[-1]) > 1 and not rest.rstrip("}").endswith(more[-1]):
        raise Refused(f"the repeating decimal {text!r}")
    if "dot" in rest and not more and len(block) > 1:
        raise Refused(f"the repeating decimal {text!r}")
    return repeating(whole, fixed, block + "".join(more))


def repeating(whole: str, fixed: str, block: str) -> Node:
    """The exact value of whole.fixed(block)."""
    if len(whole + fixed + block) > MAX_DIGITS:
        raise Refused(f"a number of more than {MAX_DIGITS} digits")
    scale = 10 ** len(fixed)
    tail = Fraction(int(block), (10 ** len(block) - 1) * scale)
    return num(Fraction(int(whole or "0")) + Fraction(int(fixed or "0"), scale) + tail)


def _text(content: str, spaced: bool, is_operator: bool) -> list[Token]:
    r"""What stands in `\text{...}`: a symbol, a function, connectors, or words."""
    lower = content.lower().strip(" .,:")
    if lower in _JOINS:
        return [Token("join", _JOINS[lower], spaced)]
    if (content in FUNCTIONS or content in _ALIASES) and (is_operator or content != "min"):
        return [Token("func", _ALIASES.get(content, content), spaced)]
    if len(content) == 1 and content.isalpha():
        return [Token("name", content, spaced, plain=True)]
    if lower in ("", *_NUMBER_WORDS):
        return []
    if content == ",":
        return [Token("op", ",", spaced)]
    pieces = re.split(r"\b(and|or)\b", content)
    if len(pieces) > 1:
        kinds = [("join" if piece in _JOINS else "word", piece.strip()) for piece in pieces if piece.strip()]
        return [Token(kind, piece, spaced) for kind, piece in kinds]
    return [Token("word", content, True)]


def _styled(text: str, letters: str, spaced: bool) -> Token:
    if text.startswith("\\mathbb"):
        return Token("field", letters, spaced)
    plain = letters.lstrip("\\")
    vector = text.startswith(("\\mathbf", "\\vec", "\\hat", "\\boldsymbol", "\\bm")) and plain in "ijk"
    if text.startswith(("\\overline", "\\bar")) and len(plain) == 1:
        return Token("name", f"{plain} bar", spaced)
    return Token("name", f"unit vector {plain}" if vector else plain, spaced)


def _command(name: str, spaced: bool) -> list[Token]:
    if name in FUNCTIONS or name in _ALIASES:
        return [Token("func", _ALIASES.get(name, name), spaced)]
    if name in _RELATIONS:
        return [Token("rel", _RELATIONS[name], spaced)]
    if name in _OPERATORS:
        return [Token("op", _OPERATORS[name], spaced)]
    if name in ("land", "wedge", "lor"):
        return [Token("join", "or" if name == "lor" else "and", spaced)]
    return [Token("command", name, spaced)]


def _run(text: str, spaced: bool) -> list[Token]:
    """A run of letters without a command: a function, a constant, connectors, a unit or word, else single symbols."""
    lower = text.lower()
    if lower in _JOINS:
        return [Token("join", lower, spaced)]
    if text in FUNCTIONS or text in _ALIASES:
        return [Token("func", _ALIASES.get(text, text), spaced, plain=True)]
    if lower in ("pi", "infty", "infinity", "inf", "oo"):
        return [Token("command", "pi" if lower == "pi" else "infty", spaced)]
    if text in _GREEK_WORDS:
        return [Token("name", text, spaced)]
    if lower in _NUMBER_WORDS:
        return []
    if text.startswith("sqrt"):
        return [Token("func", "sqrt", spaced, plain=True), *_run(text[4:], False)]
    if len(text) == 1:
        return [Token("name", text, spaced)]
    if len(text) >= 4 or is_unit(text):
        return [Token("word", text, spaced)]
    return [Token("name", letter, spaced and place == 0) for place, letter in enumerate(text)]
