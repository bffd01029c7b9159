r"""Functions and commands inside an expression: `\sin^2 x`, `\log_2 8`, `\sqrt[3]{x}`, `\binom{5}{2}`, sums.

This file reads their arguments; math_terms.py calls it for the names it meets.
"""

from typing import NoReturn, Protocol

from rewards.math_nodes import INFINITY, Node, num
from rewards.math_tokens import Token

_GREEK_NAMES = """
alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon
phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell hbar
"""
_GREEK = frozenset(_GREEK_NAMES.split())
_UNREAD = frozenset(("int", "iint", "oint", "lim", "limsup", "partial", "nabla", "over", "choose", "not", "hline"))
_GEOMETRY = frozenset(("angle", "triangle", "measuredangle", "square", "odot", "arc"))
_INVERTIBLE = ("sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh")
_MANY_ARGUMENTS = ("gcd", "lcm", "max", "min")
_BIG = {"sum": "sum", "prod": "prod"}


class Reader(Protocol):
    """What these functions need of a parser; `math_terms.TermParser` has it."""

    bound: set[str]
    position: int

    def peek(self, distance: int) -> Token: ...

    @property
    def token(self) -> Token: ...
    def is_op(self, *texts: str) -> bool: ...
    def accept(self, *texts: str) -> bool: ...
    def expect(self, text: str) -> None: ...
    def refuse(self, why: str) -> NoReturn: ...
    def starts_factor(self) -> bool: ...
    def sum(self) -> Node: ...
    def product(self) -> Node: ...
    def power(self) -> Node: ...
    def raised(self, base: Node) -> Node: ...
    def bracketed(self) -> Node: ...
    def group_or_token(self, whole_number: bool = False) -> Node: ...
    def symbol(self, name: str) -> Node: ...


def read_function(parser: Reader, name: str) -> Node:
    """The function whose name was just read, with its exponent, index and argument."""
    if name in ("sqrt", "cbrt"):
        return _root(parser, name)
    index, exponent = None, None
    for _ in range(2):
        if index is None and parser.accept("_"):
            index = parser.group_or_token(whole_number=True)
        elif exponent is None and parser.accept("^"):
            raised = parser.raised(num(1))
            if raised.kind != "pow":
                parser.refuse(f"an exponent of {name}")
            exponent = raised.args[1]
    if name in _INVERTIBLE and exponent == Node("neg", (num(1),)):
        name, exponent = f"a{name}", None
    arguments = _arguments(parser, name)
    if name == "lg":
        name, index = "log", num(10)
    if name == "log" and index is not None:
        arguments = (*arguments, index)
    elif index is not None:
        parser.refuse(f"an index of {name}")
    node = Node("pow", (Node("const", (), "e"), *arguments)) if name == "exp" else Node("func", arguments, name)
    return node if exponent is None else Node("pow", (node, exponent))


def _root(parser: Reader, name: str) -> Node:
    degree = num(3) if name == "cbrt" else None
    previous = parser.peek(-1)
    if parser.is_op("[") and previous.text == "sqrt":
        parser.expect("[")
        degree = parser.sum()
        parser.expect("]")
    # LaTeX takes one digit of a bare number, plain text and the root sign take all: math_text.clean writes the latter
    # with a space behind.
    radicand = parser.group_or_token(whole_number=parser.token.spaced or previous.plain)
    return Node("func", (radicand,), "sqrt") if degree is None else Node("func", (radicand, degree), "root")


def _arguments(parser: Reader, name: str) -> tuple[Node, ...]:
    if parser.is_op("(", "{", "["):
        inner = parser.bracketed()
        if name in _MANY_ARGUMENTS:
            return inner.args if inner.kind in ("tuple", "set") else (inner,)
        if inner.kind in ("tuple", "set"):
            parser.refuse(f"one argument of {name} expected")
        return (inner,)
    factors = [parser.power()]
    while parser.starts_factor() and parser.token.kind != "func" and not parser.is_op("(", "["):
        factors.append(parser.power())
    node = factors[0]
    for factor in factors[1:]:
        node = Node("mul", (node, factor))
    if parser.is_op("/") and factors[0].kind in ("const", "num") and name in _INVERTIBLE:
        parser.accept("/")  # `sin pi/6` is sin(pi/6)
        node = Node("div", (node, parser.power()))
    return (node,)


def read_command(parser: Reader, name: str) -> Node:
    """The command at the cursor, with its arguments; an unknown one without arguments is a name."""
    parser.position += 1
    if name == "pi":
        return Node("const", (), "pi")
    if name in ("infty", "infin"):
        return INFINITY
    if name in ("emptyset", "varnothing"):
        return Node("set", ())
    if name in ("R", "Z", "N", "Q", "C", "reals"):
        return Node("const", (), name[0].upper())
    if name in ("imath", "jmath"):
        return Node("const", (), "i")
    if name in _GREEK:
        return parser.symbol(name.removeprefix("var"))
    if name == "frac":
        top = parser.group_or_token()
        return Node("div", (top, parser.group_or_token()))
    if name in ("binom", "dbinom", "tbinom"):
        top = parser.group_or_token()
        return Node("func", (top, parser.group_or_token()), "binom")
    if name in _BIG:
        return _big(parser, _BIG[name])
    if name in _GEOMETRY:
        inner = parser.product()
        return Node("sym", (), f"{name} {''.join(_letters(inner))}")
    if name in ("overset", "underset", "stackrel"):
        parser.group_or_token()
        return parser.group_or_token()
    if name in _UNREAD or parser.is_op("{", "(", "_", "^"):
        parser.refuse(f"the command \\{name} is not read,")
    return Node("sym", (), name)


def _letters(node: Node) -> list[str]:
    if node.kind == "mul":
        return [letter for part in node.args for letter in _letters(part)]
    return [str(node.value)] if node.kind in ("sym", "const") else [repr(node)]


def _big(parser: Reader, kind: str) -> Node:
    parser.expect("_")
    parser.expect("{")
    name = parser.token.text
    if parser.token.kind != "name" or parser.peek(1).text != "=":
        parser.refuse(f"the bounds of a {kind}")
    parser.position += 2
    start = parser.sum()
    parser.expect("}")
    parser.expect("^")
    stop = parser.group_or_token(whole_number=True)
    outer, parser.bound = parser.bound, parser.bound | {name}
    body = parser.product()
    parser.bound = outer
    return Node("big", (Node("sym", (), name), start, stop, body), kind)
