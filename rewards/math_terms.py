r"""Reading expressions: sums, products, powers, functions, in LaTeX and in plain text.

This file reads one expression at a time; math_parser.py adds relations, lists, sets and the rest around it.
The grammar is our own and bounded: at most 100 levels deep, every token read once.

Ambiguities, as decided here: `1/2x` is (1/2)x; `\sin 2x` takes the product behind it up to `+`, `-` or another
function; `\sqrt17` is sqrt(1) followed by 7, as LaTeX sets it, but plain `sqrt17` is sqrt(17); `7\frac{3}{4}` and
`7 3/4` are mixed numbers, refused where the fraction is improper; `\log` is the natural logarithm.
"""

from fractions import Fraction

from rewards.math_commands import read_command, read_function
from rewards.math_cursor import Cursor
from rewards.math_nodes import Node, Refused, num
from rewards.math_tokens import Token
from rewards.math_units import UNIT_LETTERS, unit_name

_CLOSERS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "<(": ")>"}


class TermParser(Cursor):
    """One method per level of the grammar, loosest first."""

    def bracketed(self) -> Node:
        """What stands in brackets; math_parser.py reads it."""
        raise NotImplementedError

    def sum(self) -> Node:
        """Terms joined by +, - and \\pm."""
        self.deeper()
        node = self.term()
        while self.is_op("+", "-", "+-", "-+"):
            operator = self.advance().text
            right = self.term()
            if operator in ("+", "-"):
                node = Node("add", (node, right if operator == "+" else Node("neg", (right,))))
            else:
                node = Node("pm", (node, right), operator)
        self.depth -= 1
        return node

    def term(self) -> Node:
        """Factors joined by an operator or by standing side by side, with any signs in front."""
        signs: list[str] = []
        while self.is_op("+", "-", "+-", "-+"):
            signs.append(self.advance().text)
        if len(signs) > 8:
            self.refuse("too many signs")
        node = self.product()
        for sign in reversed(signs):
            if sign == "-":
                node = Node("neg", (node,))
            elif sign != "+":
                node = Node("pm", (num(0), node), sign)
        return node

    def product(self) -> Node:
        node = self.mixed(self.power())
        while True:
            if self.accept("*"):
                node = Node("mul", (node, self.signed_power()))
            elif self.accept("/"):
                node = Node("div", (node, self.signed_power()))
            elif self.token.kind == "command" and self.token.text in ("bmod", "mod"):
                self.advance()
                node = Node("mod", (node, self.signed_power()))
            elif self.starts_factor():
                node = Node("mul", (node, self.power()))
            else:
                return self.measured(node)

    def signed_power(self) -> Node:
        if self.accept("-"):
            return Node("neg", (self.signed_power_limited(),))
        return self.power()

    def signed_power_limited(self) -> Node:
        self.deeper()
        node = self.signed_power()
        self.depth -= 1
        return node

    def mixed(self, whole: Node) -> Node:
        """Add a proper fraction that stands right behind an integer."""
        if whole.kind != "num" or whole.value.denominator != 1 or self.peek(-1).kind != "num":
            return whole
        fraction: Fraction | None = None
        if self.token.kind == "command" and self.token.text == "frac":
            node = self.fraction()
            if not all(part.kind == "num" and part.value.denominator == 1 for part in node.args):
                return Node("mul", (whole, node))
            fraction = _ratio(*node.args)
        elif self.token.kind == "num" and self.peek(1).text == "/":
            top, bottom = self.token.node, self.peek(2).node
            if top is not None and bottom is not None and top.kind == bottom.kind == "num":
                self.position += 3
                fraction = _ratio(top, bottom)
        if fraction is None:
            return whole
        if not 0 < fraction < 1 or self.is_op("^"):
            self.refuse("a mixed number needs a proper fraction")
        return self.postfixed(num(whole.value + fraction))

    def starts_factor(self) -> bool:
        token = self.token
        if token.kind == "num":
            previous = self.peek(-1)
            if previous.kind == "num":
                self.refuse("two numbers side by side")
            return True
        if token.kind == "name" and token.plain and token.text in UNIT_LETTERS:
            return False
        if token.kind in ("name", "func", "begin"):
            return True
        if token.kind == "command":
            return token.text not in ("bmod", "mod", "pmod", "circ", "choose", "over", "degree", "infty")
        if token.kind == "op" and token.text == "|":
            return not self.bars_closed and self.peek(1).kind not in ("num", "end")
        return token.kind == "op" and token.text in ("(", "[", "{", "lfloor", "lceil")

    def measured(self, node: Node) -> Node:
        """Attach the unit or counted noun behind a quantity."""
        pieces: list[str] = []
        while True:
            if self.token.kind == "word" or (self.token.plain and self.token.text in UNIT_LETTERS):
                pieces.append(self.advance().text)
            elif pieces and self.is_op("/") and self.peek(1).kind in ("word", "name"):
                self.advance()
                pieces.append("/" + self.advance().text)
            elif pieces and self.is_op("^"):
                self.advance()
                pieces.append("^" + self.small_integer())
            elif pieces and self.token.kind == "name":
                pieces.append(self.advance().text)
            else:
                break
        if not pieces:
            return self.congruent(node)
        name = unit_name(" ".join(pieces))
        if name is None:
            self.refuse(f"{' '.join(pieces)!r} is not a unit,")
        return Node("percent", (node,)) if name == "percent" else Node("unit", (node,), name)

    def congruent(self, node: Node) -> Node:
        if self.token.kind == "command" and self.token.text == "pmod":
            self.advance()
            modulus = self.group_or_token()
            return Node("unit", (node,), f"mod {modulus.value}")
        return node

    def power(self) -> Node:
        """A factor with everything that follows it: exponents, !, %, degrees, primes."""
        return self.postfixed(self.atom())

    def postfixed(self, base: Node) -> Node:
        while True:
            if self.accept("^"):
                base = self.raised(base)
            elif self.is_op("_") and base.kind == "num" and base.value.denominator == 1:
                base = self.based(str(base.value))
            elif self.accept("!"):
                base = Node("func", (base,), "factorial")
            elif self.accept("%"):
                base = Node("percent", (base,))
            elif self.accept("'"):
                base = self.primed(base)
            elif self.token.kind == "command" and self.token.text in ("circ", "degree"):
                self.advance()
                base = self.degrees(base)
            else:
                return base

    def degrees(self, base: Node) -> Node:
        """An angle, or a temperature where C or F follows."""
        scale = self.advance().text if self.token.kind == "name" and self.token.text in ("C", "F") else ""
        return Node("unit", (base,), f"deg{scale}")

    def raised(self, base: Node) -> Node:
        if self.token.kind == "command" and self.token.text == "circ":
            self.advance()
            return self.degrees(base)
        if self.is_op("{"):
            after = self.peek(1)
            if after.text in ("circ", "'") and self.peek(2).text == "}":
                self.position += 3
                return self.degrees(base) if after.text == "circ" else self.primed(base)
        if self.accept("'"):
            return self.primed(base)
        if self.accept("-"):
            return Node("pow", (base, Node("neg", (self.exponent(),))))
        return Node("pow", (base, self.exponent()))

    def exponent(self) -> Node:
        """A group, or one token as in LaTeX; in a tower without braces the exponent binds to the right."""
        self.deeper()
        node = self.group_or_token(whole_number=True)
        if self.accept("^"):
            node = self.raised(node)
        self.depth -= 1
        return node

    def primed(self, base: Node) -> Node:
        if base.kind not in ("sym", "unit"):
            self.refuse("a prime needs a name")
        return Node("sym", (), f"{base.value}'")

    def group_or_token(self, whole_number: bool = False) -> Node:
        r"""The argument of a command: `{...}`, or one token, of a number only its first digit (`\frac12`)."""
        if self.is_op("{", "("):
            return self.bracketed()
        token = self.token
        if token.kind == "num" and not whole_number and len(token.text) > 1 and token.text.isdigit():
            first, rest = token.text[0], token.text[1:]
            self.tokens[self.position] = Token("num", rest, False, num(int(rest)))
            return num(int(first))
        return self.atom()

    def fraction(self) -> Node:
        self.advance()
        top = self.group_or_token()
        return Node("div", (top, self.group_or_token()))

    def atom(self) -> Node:
        """A number, a symbol, a command with its arguments, or anything in brackets."""
        self.deeper()
        node = self.unguarded_atom(self.token)
        self.depth -= 1
        return node

    def unguarded_atom(self, token: Token) -> Node:
        if token.kind == "num":
            return self.number()
        if token.kind == "name":
            return self.symbol(self.advance().text)
        if token.kind == "func":
            return read_function(self, self.advance().text)
        if token.kind == "command":
            return read_command(self, token.text)
        if token.kind == "field" or token.kind == "begin" or self.is_op(*_CLOSERS):
            return self.bracketed()
        if self.is_op("|", "||") and not self.bars_closed:
            return self.bars(self.advance().text)
        if self.accept("lfloor", "lceil"):
            name = "floor" if self.peek(-1).text == "lfloor" else "ceil"
            inner = self.sum()
            self.expect("r" + name)
            return Node("func", (inner,), name)
        self.refuse("an expression expected")

    def symbol(self, name: str) -> Node:
        if name in ("e", "i") and name not in self.bound:
            return Node("const", (), name)
        if self.accept("_"):
            return self.subscripted(name)
        if name in self.calls and self.is_op("("):
            inner = self.bracketed()
            return Node("call", inner.args if inner.kind == "tuple" else (inner,), name)
        return Node("sym", (), name)

    def subscripted(self, name: str) -> Node:
        start = self.position
        if self.is_op("{"):
            end = next((i for i in range(start, len(self.tokens)) if self.tokens[i].text == "}"), start)
            inside = self.tokens[start + 1 : end]
            if any(token.kind in ("word", "func") for token in inside):
                self.position = end + 1
                return Node("sym", (), f"{name}_{' '.join(token.text for token in inside)}")
        elif self.token.kind in ("word", "func"):
            return Node("sym", (), f"{name}_{self.advance().text}")
        return Node("sub", (self.group_or_token(whole_number=True),), name)

    def bars(self, kind: str) -> Node:
        self.bars_closed, before = True, self.bars_closed
        inner = self.sum()
        self.bars_closed = before
        self.expect(kind)
        return Node("func", (inner,), "abs")


def _ratio(top: Node, bottom: Node) -> Fraction:
    if bottom.value == 0:
        raise Refused("division by zero")
    return Fraction(top.value, bottom.value)
