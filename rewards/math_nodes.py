"""The exact form of an answer: a small immutable tree, with the helpers that every later stage needs.

This file neither parses nor compares. Usage: `Node("add", (num(1), Node("const", (), "pi")))`.

| kind     | args                        | value                                                        |
|----------|-----------------------------|--------------------------------------------------------------|
| num      |                             | Fraction, written as an integer or as a repeating decimal    |
| dec      |                             | (Fraction, value of its last digit, significant digits)      |
| sym      |                             | name                                                         |
| sub      | index                       | name: `F_{n-1}`                                              |
| const    |                             | pi, e, i, inf; R, Z, N, Q, C (sets of numbers)               |
| add, mul | terms, factors              |                                                              |
| neg, div, pow, mod | operands          |                                                              |
| func     | arguments                   | name: sqrt, sin, log, abs, factorial, binom, ...             |
| call     | arguments                   | name of an unknown function: `f(x)`                          |
| big      | variable, from, to, body    | sum or prod                                                  |
| pm       | a, b                        | "+-" or "-+"                                                 |
| tuple    | items                       | its brackets, as "[)"                                        |
| set, list| items                       | a list is what stands without brackets                       |
| matrix   | entries, row by row         | (rows, columns)                                              |
| setof    | variable, condition         |                                                              |
| union, inter, minus, and, or | parts   |                                                              |
| rel      | members                     | the relations between them: ("<", "<=")                      |
| ratio    | parts                       |                                                              |
| base     |                             | (digits, base)                                               |
| percent  | number                      |                                                              |
| unit     | quantity                    | canonical name                                               |
| text     |                             | words, lower case                                            |
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any


class Refused(Exception):
    """The text is not an answer this package reads, or reading it would break one of its bounds; says which."""


class Exhausted(Refused):
    """The comparison has spent its budget; nothing that is left of it can be decided."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node of an answer; see the table above."""

    kind: str
    """What it is."""
    args: "tuple[Node, ...]" = ()
    """Its parts, in order."""
    value: Any = None
    """What is not a node: a number, a name, brackets."""


def num(value: int | Fraction) -> Node:
    """An exact number."""
    return Node("num", (), Fraction(value))


INFINITY = Node("const", (), "inf")


def walk(node: Node) -> "list[Node]":
    """All nodes of a tree, without recursion."""
    found, waiting = [], [node]
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting.extend(node.args)
    return found


def symbols(node: Node) -> frozenset[str]:
    """The names a tree depends on, without the variables its sums bind."""
    if node.kind in ("sym", "call", "sub"):
        return frozenset((str(node.value),)).union(*map(symbols, node.args))
    free = frozenset[str]().union(*map(symbols, node.args)) if node.args else frozenset[str]()
    return free - {node.args[0].value} if node.kind == "big" else free


def canonical(node: Node) -> str:
    """One text per tree, equal for trees that differ only in the order of terms, factors or elements of a set."""
    parts = [canonical(arg) for arg in node.args]
    if node.kind in ("add", "mul", "set", "union", "inter", "and", "or"):
        parts.sort()
    value = node.value[0] if node.kind == "dec" else node.value
    kind = "num" if node.kind == "dec" else node.kind
    return f"{kind}[{'' if value is None else value}]({','.join(parts)})"
