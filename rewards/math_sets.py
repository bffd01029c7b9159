r"""Sets of real numbers as sorted, disjoint intervals: `x<3`, `(-\infty,3)`, `\{x \mid x<3\}` are the same set.

This file solves only what is linear in one variable; other relations are compared by math_relations.py.

Usage: `real_set(parse("x < 3"), Budget()) == real_set(parse("3 > x"), Budget())`.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rewards.math_nodes import Node, Refused, symbols
from rewards.math_numeric import Budget, Env, context, evaluate, to_float


@dataclass(frozen=True, slots=True)
class Piece:
    """One interval; a point is closed on both sides."""

    low: Any
    """Left end, minus infinity included."""
    low_closed: bool
    """Whether the left end belongs to it."""
    high: Any
    """Right end."""
    high_closed: bool
    """Whether the right end belongs to it."""


Pieces = tuple[Piece, ...]
SET_KINDS = frozenset(("union", "inter", "minus", "setof", "and", "or"))
INEQUALITIES = ("<", ">", "<=", ">=", "!=")
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}


def is_set_like(node: Node) -> bool:
    """True for what can only be a set of numbers or a condition on one."""
    if node.kind in SET_KINDS or (node.kind == "const" and node.value == "R"):
        return True
    if node.kind == "rel":
        return any(operator in INEQUALITIES for operator in node.value)
    if node.kind == "add":
        return is_set_like(node.args[0])
    return node.kind == "tuple" and (node.value in ("[)", "(]") or any(_is_infinite(arg) for arg in node.args))


def _is_infinite(node: Node) -> bool:
    return (node.args[0] if node.kind == "neg" else node) == Node("const", (), "inf")


def real_set(node: Node, budget: Budget) -> Pieces:
    """The set of real numbers that `node` describes; Refused if it describes none that can be computed."""
    infinity = context(50).inf
    if node.kind == "const" and node.value == "R":
        return (Piece(-infinity, False, infinity, False),)
    if node.kind == "tuple" and len(node.args) == 2:
        return _interval(node, budget)
    if node.kind == "list":
        return listed_set(node, budget)
    if node.kind == "set":
        points = [_end(arg, budget) for arg in node.args]
        return merged([Piece(point, True, point, True) for point in points])
    if node.kind == "setof":
        return real_set(node.args[1], budget)
    if node.kind == "rel":
        return _relation(node, budget)
    if node.kind in ("union", "or"):
        return merged([piece for arg in node.args for piece in real_set(arg, budget)])
    if node.kind in ("inter", "and"):
        result = (Piece(-infinity, False, infinity, False),)
        for arg in node.args:
            result = _intersection(result, real_set(arg, budget))
        return result
    if node.kind == "add" and node.args[1].kind == "neg" and node.args[1].args[0].kind == "set":  # R - {1}
        node = Node("minus", (node.args[0], node.args[1].args[0]))
    if node.kind == "minus":
        left, right = (real_set(arg, budget) for arg in node.args)
        return _intersection(left, _complement(right))
    raise Refused(f"a {node.kind} is no set of real numbers")


def listed_set(node: Node, budget: Budget) -> Pieces:
    """The set that a bare list means beside a set: all of its conditions, or its intervals together."""
    if all(map(_is_condition, node.args)):
        both = real_set(Node("and", node.args), budget)
        return both or real_set(Node("or", node.args), budget)
    if all(arg.kind == "tuple" and len(arg.args) == 2 for arg in node.args):
        return real_set(Node("union", node.args), budget)
    raise Refused("a list that is no set of real numbers")


def _is_condition(node: Node) -> bool:
    return node.kind == "rel" and any(operator in INEQUALITIES for operator in node.value)


def _end(node: Node, budget: Budget) -> Any:
    ctx = context(50)
    if _is_infinite(node):
        return -ctx.inf if node.kind == "neg" else ctx.inf
    if symbols(node):
        raise Refused("an end with a variable")
    value = to_float(evaluate(node, Env(budget=budget)), Env())
    if getattr(value, "imag", 0):
        raise Refused("a complex end")
    return ctx.mpf(value.real)


def _interval(node: Node, budget: Budget) -> Pieces:
    low, high = (_end(arg, budget) for arg in node.args)
    infinity = context(50).inf
    closed = (node.value[0] == "[" and low != -infinity, node.value[1] == "]" and high != infinity)
    if low > high or (low == high and not all(closed)):
        raise Refused("an empty interval")
    return (Piece(low, closed[0], high, closed[1]),)


def merged(pieces: list[Piece]) -> Pieces:
    """Sorted, with what touches or overlaps joined."""
    result: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (piece.low, not piece.low_closed)):
        last = result[-1] if result else None
        if last and (
            piece.low < last.high or (same_end(piece.low, last.high) and (piece.low_closed or last.high_closed))
        ):
            high, closed = max((last.high, last.high_closed), (piece.high, piece.high_closed))
            result[-1] = Piece(last.low, last.low_closed, high, closed)
        else:
            result.append(piece)
    return tuple(result)


def _complement(pieces: Pieces) -> Pieces:
    infinity = context(50).inf
    result: list[Piece] = []
    low, closed = -infinity, False
    for piece in pieces:
        if low < piece.low or (low == piece.low and closed and not piece.low_closed):
            result.append(Piece(low, closed, piece.low, not piece.low_closed))
        low, closed = piece.high, not piece.high_closed
    if low < infinity:
        result.append(Piece(low, closed, infinity, False))
    return tuple(result)


def _intersection(left: Pieces, right: Pieces) -> Pieces:
    result = []
    for a in left:
        for b in right:
            low, low_open = max((a.low, not a.low_closed), (b.low, not b.low_closed))
            high, high_closed = min((a.high, a.high_closed), (b.high, b.high_closed))
            if low < high or (low == high and high_closed and not low_open):
                result.append(Piece(low, not low_open, high, high_closed))
    return merged(result)


def _relation(node: Node, budget: Budget) -> Pieces:
    """A chain of relations, each linear in one variable, or between it and a constant, or in its absolute value."""
    if node.value == ("in",):
        return real_set(node.args[1], budget)
    infinity = context(50).inf
    result = (Piece(-infinity, False, infinity, False),)
    for left, operator, right in zip(node.args, node.value, node.args[1:], strict=False):
        result = _intersection(result, _half_line(left, operator, right, budget))
    absolute = [arg for arg in node.args if arg.kind == "func" and arg.value == "abs" and symbols(arg)]
    if absolute:
        return _without_bars(result, absolute, [arg for arg in node.args if symbols(arg)], budget)
    return result


def _without_bars(values: Pieces, absolute: list[Node], variable: list[Node], budget: Budget) -> Pieces:
    """The x for which |a x + b|, the only member with a variable, lies in `values`."""
    ctx = context(50)
    if len(variable) != 1 or variable != absolute:
        raise Refused("absolute values mixed with variables")
    positive = _intersection(values, (Piece(ctx.mpf(0), True, ctx.inf, False),))
    mirrored = [Piece(-piece.high, piece.high_closed, -piece.low, piece.low_closed) for piece in positive]
    inner = absolute[0].args[0]
    if is_name(inner):
        return merged([*positive, *mirrored])
    slope, constant = (to_float(value, Env()) for value in _linear(inner, budget))
    moved = [
        Piece((piece.low - constant) / slope, piece.low_closed, (piece.high - constant) / slope, piece.high_closed)
        for piece in (*positive, *mirrored)
    ]
    if slope < 0:
        moved = [Piece(piece.high, piece.high_closed, piece.low, piece.low_closed) for piece in moved]
    return merged(moved)


def _half_line(left: Node, operator: str, right: Node, budget: Budget) -> Pieces:
    if operator not in _FLIPPED:
        raise Refused(f"the relation {operator}")
    if not symbols(left):
        left, operator, right = right, _FLIPPED[operator], left
    is_bars = left.kind == "func" and left.value == "abs"
    if not symbols(right) and (_is_infinite(right) or is_name(left) or is_bars):
        return _compared(operator, _end(right, budget))
    slope, constant = _linear(Node("add", (left, Node("neg", (right,)))), budget)
    return _compared(operator if slope > 0 else _FLIPPED[operator], to_float(-constant / slope, Env()))


def _linear(node: Node, budget: Budget) -> tuple[Fraction, Fraction]:
    """The coefficients a and b of a x + b, a not zero; Refused for anything else."""
    names = symbols(node)
    if len(names) != 1:
        raise Refused("a relation between several variables")
    values = [_at(node, next(iter(names)), x, budget) for x in (0, 1, 2, 7)]
    slope = values[1] - values[0]
    if not slope or values[2] - values[1] != slope or values[3] - values[0] != 7 * slope:
        raise Refused("a relation that is not linear")
    return slope, values[0]


def _at(node: Node, name: str, x: int, budget: Budget) -> Fraction:
    value = evaluate(node, Env(budget=budget, bound={name: Fraction(x)}))
    if not isinstance(value, Fraction):
        raise Refused("a relation with coefficients that are not rational")
    return value


def _compared(operator: str, end: Any) -> Pieces:
    infinity = context(50).inf
    if operator in ("<", "<="):
        return (Piece(-infinity, False, end, operator == "<=" and end != infinity),)
    if operator in (">", ">="):
        return (Piece(end, operator == ">=" and end != -infinity, infinity, False),)
    if operator == "=":
        return (Piece(end, True, end, True),)
    return (Piece(-infinity, False, end, False), Piece(end, False, infinity, False))


def is_name(node: Node) -> bool:
    """True for what a variable looks like: x, x_1, |z|, f(x), but not -x or 2x."""
    if node.kind in ("sym", "sub", "call"):
        return True
    if node.kind == "func":
        return node.value == "abs" and is_name(node.args[0])
    if node.kind == "mul":  # f(x), read as a product
        return node.args[0].kind == "sym" and node.args[1].kind in ("sym", "num", "sub")
    return False


def same_end(a: Any, b: Any) -> bool:
    """Equal to 45 digits."""
    ctx = context(50)
    if a == b or not (ctx.isfinite(a) and ctx.isfinite(b)):
        return bool(a == b)
    return bool(abs(a - b) <= ctx.mpf(10) ** -45 * max(abs(a), abs(b)))


def same_sets(left: Pieces, right: Pieces) -> bool:
    """Whether two sets of real numbers are equal."""
    return len(left) == len(right) and all(
        same_end(a.low, b.low)
        and same_end(a.high, b.high)
        and (a.low_closed, a.high_closed) == (b.low_closed, b.high_closed)
        for a, b in zip(left, right, strict=True)
    )
