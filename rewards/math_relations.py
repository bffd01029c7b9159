"""Equations and inequalities: names in front of a value (`x = 5`, `f(x) = ...`), and which relations say the same.

This file does not know lists or sets; math_compare.py does.
"""

from fractions import Fraction

from rewards.math_nodes import Exhausted, Node, Refused, canonical, num, symbols
from rewards.math_numeric import Budget, Env, Number, context, evaluate, to_float

_SYMMETRIC = ("=", "!=")
_FUNCTION_NAMES = frozenset(("phi", "psi", "Phi", "Psi", *"fghFGHPQSTUVW"))


def named_value(node: Node) -> tuple[Node | None, Node] | None:
    """The name and the value of `x = 5`, `x = 2 + 3 = 5`, `x \\in S` or `x = 1/3 ~ 0.33`; None for other nodes.

    The name is None where only constants are chained: `2 + 3 = 5`; math_compare.py asks that they be equal.
    """
    if node.kind != "rel" or any(operator not in ("=", "~", "in") for operator in node.value):
        return None
    members = list(node.args)
    for place, operator in enumerate(node.value):
        if operator == "~" and (place > 0 or not symbols(members[0])):
            members = members[: place + 1]  # what follows is only an approximation
            break
    name = next((member for member in members[:-1] if is_label(member)), None)
    value = members[-1]
    if name is None and is_label(value) and not symbols(members[0]):
        name, value = value, members[0]  # 5 = x
    if name is None and any(map(symbols, members)):
        return None
    return name, value


def is_label(node: Node) -> bool:
    """True for what names a quantity: x, x_1, f(x), AB, |AB|, (p, q), V_1 : V_2, words; not for 2x or x + y."""
    if node.kind in ("sym", "sub", "call", "text"):
        return True
    if node.kind == "pow":  # an inverse function
        return node.args[0].kind == "sym" and node.args[1] == Node("neg", (num(1),))
    if node.kind in ("ratio", "div", "tuple"):
        return all(map(is_label, node.args))
    if node.kind == "func":
        return all(map(is_label, node.args))
    if node.kind == "mul":
        first, second = node.args
        return is_label(first) and (is_label(second) or (first.kind == "sym" and second.kind in ("num", "tuple")))
    return False


def label_key(node: Node) -> str:
    """One text for names that mean the same: W(n) and W(x) are both the function W."""
    if _is_function(node):
        return str(node.args[0].value)
    if node.kind == "call":
        return str(node.value)
    return canonical(node)


def _is_function(label: Node) -> bool:
    """True for W(n), which the parser reads as a product, but not for xy or AB."""
    if label.kind != "mul" or label.args[0].kind != "sym" or label.args[0].value not in _FUNCTION_NAMES:
        return False
    argument = label.args[1]
    return argument.kind == "tuple" or (argument.kind == "sym" and str(argument.value).islower())


def renamed(gold: Node | None, predicted: Node | None, value: Node) -> Node:
    """`value` with the argument of the predicted function named as in the gold: f(t) = t is f(x) = x."""
    if gold is None or predicted is None:
        return value
    old, new = _argument(predicted), _argument(gold)
    return value if old is None or new is None or old == new else _substitute(value, old, new)


def _argument(label: Node) -> Node | None:
    if _is_function(label) and label.args[1].kind == "sym":
        return label.args[1]
    return label.args[0] if label.kind == "call" and len(label.args) == 1 and label.args[0].kind == "sym" else None


def _substitute(node: Node, old: Node, new: Node) -> Node:
    return new if node == old else Node(node.kind, tuple(_substitute(arg, old, new) for arg in node.args), node.value)


def same_equation(gold: Node, predicted: Node, budget: Budget) -> bool:
    """Whether two equations with the same variables have the same solutions: one is a multiple of the other, or both
    can be solved for the same variable with the same result."""
    if symbols(gold) != symbols(predicted) or not symbols(gold):
        return False
    a, b = _difference(gold), _difference(predicted)
    if _factor(a, b, budget) is not None:
        return True
    return any(_same_solution(a, b, name, budget) and _same_solution(b, a, name, budget) for name in symbols(gold))


def _difference(node: Node) -> Node:
    if node.kind != "rel" or len(node.args) != 2:
        raise Refused("one equation expected")
    return Node("add", (node.args[0], Node("neg", (node.args[1],))))


def _factor(a: Node, b: Node, budget: Budget) -> Number | None:
    """The constant b / a if there is one, from its value at several points."""
    factors: list[Number] = []
    for point in range(8):
        try:
            x, y = (evaluate(node, Env(point=point, digits=100, budget=budget)) for node in (a, b))
        except Exhausted:
            raise
        except Refused:
            continue
        if isinstance(x, Fraction) != isinstance(y, Fraction):
            x, y = (to_float(value, Env(digits=100)) for value in (x, y))
        if not x or not y:
            return None
        factors.append(y / x)
        if len(factors) == 4:
            break
    if len(factors) < 3:
        return None
    ctx = context(100)
    first = factors[0]
    for factor in factors[1:]:
        if factor != first:
            if isinstance(factor, Fraction) and isinstance(first, Fraction):
                return None
            difference = to_float(factor, Env(digits=100)) - to_float(first, Env(digits=100))
            if abs(difference) > ctx.mpf(10) ** -60 * abs(to_float(first, Env(digits=100))):
                return None
    return first


def _same_solution(solved: Node, checked: Node, name: str, budget: Budget) -> bool:
    """Whether `solved` = 0, linear in `name`, has solutions that also make `checked` zero, at several points."""
    agreed = 0
    for point in range(6):
        try:
            values = [_substituted(solved, name, Fraction(x), point, budget) for x in (0, 1, 2)]
            slope = values[1] - values[0]
            if not slope or values[2] - values[1] != slope:
                return False
            if _substituted(checked, name, -values[0] / slope, point, budget) != 0:
                return False
            agreed += 1
        except Exhausted:
            raise
        except Refused:
            continue
    return agreed >= 3


def _substituted(node: Node, name: str, value: Fraction, point: int, budget: Budget) -> Fraction:
    result = evaluate(node, Env(point=point, budget=budget, bound={name: value}))
    if not isinstance(result, Fraction):
        raise Refused("not rational")
    return result


def same_inequalities(gold: Node, predicted: Node, budget: Budget) -> bool:
    """Whether two chains of relations say the same, link by link, in any order of the links."""
    if symbols(gold) != symbols(predicted):
        return False
    left, right = _links(gold), _links(predicted)
    if len(left) != len(right):
        return False
    for operator, difference in left:
        match = next((link for link in right if _same_link(operator, difference, *link, budget)), None)
        if match is None:
            return False
        right.remove(match)
    return True


def _links(node: Node) -> list[tuple[str, Node]]:
    links = []
    for a, operator, b in zip(node.args, node.value, node.args[1:], strict=False):
        if operator in ("<", "<="):
            a, b, operator = b, a, operator.replace("<", ">")
        links.append((operator, Node("add", (a, Node("neg", (b,))))))
    return links


def _same_link(operator: str, a: Node, other: str, b: Node, budget: Budget) -> bool:
    if operator != other:
        return False
    factor = _factor(a, b, budget)
    if factor is None or getattr(factor, "imag", 0):
        return factor is not None and operator in _SYMMETRIC
    return operator in _SYMMETRIC or factor > 0
