"""A cursor over the tokens of an answer, and the numbers it reads by itself.

math_terms.py builds the grammar of expressions on it. Usage: `Cursor(tokenize("5"), frozenset()).number()`.
"""

import re
from typing import NoReturn

from rewards.math_nodes import Node, Refused
from rewards.math_tokens import Token, repeating

MAX_DEPTH = 100
"""Levels of the grammar, of which a pair of brackets takes three."""


class Cursor:
    """A place in a list of tokens, with what the grammar keeps in mind: depth, open bars, bound variables."""

    def __init__(self, tokens: list[Token], calls: frozenset[str]) -> None:
        self.tokens, self.position, self.depth = tokens, 0, 0
        self.calls = calls
        self.bars_closed = False
        self.bound: set[str] = set()

    @property
    def token(self) -> Token:
        return self.tokens[self.position]

    def is_op(self, *texts: str) -> bool:
        return self.token.kind == "op" and self.token.text in texts

    def advance(self) -> Token:
        token = self.token
        if self.position == len(self.tokens) - 1:
            self.refuse("more expected")
        self.position += 1
        return token

    def deeper(self) -> None:
        """Count one more level of nesting; whoever calls this takes it back."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.refuse(f"more than {MAX_DEPTH} levels of nesting")

    def peek(self, distance: int) -> Token:
        """The token so many places ahead of the cursor; the end where there is none."""
        return self.tokens[max(0, min(self.position + distance, len(self.tokens) - 1))]

    def accept(self, *texts: str) -> bool:
        if self.is_op(*texts):
            self.position += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            self.refuse(f"{text!r} expected")

    def refuse(self, why: str) -> NoReturn:
        raise Refused(f"{why} at {self.token.text or 'the end'!r}")

    def small_integer(self) -> str:
        braced = self.accept("{")
        sign = "-" if self.accept("-") else ""
        token = self.advance()
        if token.kind != "num":
            self.refuse("a number expected")
        if braced:
            self.expect("}")
        return sign + token.text

    def number(self) -> Node:
        token = self.advance()
        assert token.node is not None, token
        node = token.node
        if self.is_op("...") and node.kind == "dec":
            self.advance()
            node = _recurring(token.text) or node
        if self.is_op("_"):
            return self.based(token.text)
        if self.token.kind == "name" and not self.token.spaced and token.text.isdigit():
            ahead = self.peek(1)
            if ahead.text == "_" and self.token.text in "ABCDEF":
                return self.based(token.text + self.advance().text)
        return node

    def based(self, digits: str) -> Node:
        self.expect("_")
        words = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
        braced = self.accept("{", "(")
        while self.accept("("):
            pass
        token = self.advance()
        text = token.text.lower()
        base = words.get(text) or (int(text) if token.kind == "num" and text.isdigit() and len(text) < 3 else 0)
        while self.accept(")"):
            pass
        if braced and not self.accept("}") and self.peek(-1).text != ")":
            self.refuse("the end of a base expected")
        if not 2 <= base <= 36 or not _fits(digits, base):
            self.refuse(f"{digits!r} is no number in base {text!r},")
        return Node("base", (), (digits, base))


def _fits(digits: str, base: int) -> bool:
    """Whether these are digits in this base, perhaps with a point."""
    return re.fullmatch(r"[0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?", digits) is not None and all(
        int(digit, 36) < base for digit in digits.replace(".", "")
    )


def _recurring(text: str) -> Node | None:
    """Read 0.333... as 1/3 and 0.1666... as 1/6: one digit at least three times before the dots."""
    whole, _, places = text.partition(".")
    fixed = places.rstrip(places[-1:])
    if len(places) - len(fixed) < 3:
        return None
    return repeating(whole, fixed, places[-1])
