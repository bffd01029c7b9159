r"""Rewriting trees before they are compared: `\pm` to two values, matrix arithmetic, units.

This file changes the form of an answer, not its meaning. Usage: `expanded(parse(r"1 \pm \sqrt{2}"))` is a list of two.
"""

from rewards.math_nodes import Node, Refused, walk
from rewards.math_units import IGNORED, is_known_unit

MAX_ENTRIES = 400


def expanded(node: Node) -> Node:
    """The same answer without `\\pm`: two values where it stands, and lists and sets flattened."""
    if node.kind in ("list", "set"):
        parts = [part for arg in node.args for part in _alternatives(arg)]
        parts = [inner for part in parts for inner in (part.args if part.kind == "list" else (part,))]
        return Node(node.kind, tuple(part for part in parts if not _is_domain(part)), node.value)
    alternatives = _alternatives(node)
    return alternatives[0] if len(alternatives) == 1 else Node("list", tuple(alternatives))


def _alternatives(node: Node) -> list[Node]:
    if not any(part.kind == "pm" for part in walk(node)):
        return [node]
    return [_signed(node, "+-"), _signed(node, "-+")]


def _signed(node: Node, plus: str) -> Node:
    args = tuple(_signed(arg, plus) for arg in node.args)
    if node.kind != "pm":
        return Node(node.kind, args, node.value)
    return Node("add", (args[0], args[1] if node.value == plus else Node("neg", (args[1],))))


def _is_domain(node: Node) -> bool:
    """True for the "k in Z" that follows a family of solutions."""
    if node.kind != "rel" or node.value != ("in",):
        return False
    return node.args[0].kind == "sym" and node.args[1].kind == "const"


def canonical_items(node: Node) -> tuple[Node, ...]:
    """The parts of nested unions (or intersections, ...) on one level."""
    parts: list[Node] = []
    for arg in node.args:
        parts.extend(canonical_items(arg) if arg.kind == node.kind else (arg,))
    return tuple(parts)


def matrix_value(node: Node) -> Node | None:
    """The matrix that an expression with matrices gives; None where there is no matrix in it."""
    if not any(part.kind == "matrix" for part in walk(node)):
        return None
    return _matrix(node)


def _matrix(node: Node) -> Node:
    if node.kind == "matrix":
        return node
    if node.kind == "neg":
        return _scaled(Node("num", (), -1), _matrix(node.args[0]))
    if node.kind == "add":
        a, b = (_matrix(arg) for arg in node.args)
        if a.value != b.value:
            raise Refused("a sum of matrices of different shapes")
        return Node("matrix", tuple(Node("add", pair) for pair in zip(a.args, b.args, strict=True)), a.value)
    if node.kind in ("mul", "div"):
        left, right = node.args
        has_matrix = [any(part.kind == "matrix" for part in walk(arg)) for arg in (left, right)]
        if all(has_matrix) and node.kind == "mul":
            return _product(_matrix(left), _matrix(right))
        if node.kind == "div" and not has_matrix[1]:
            return _scaled(Node("div", (Node("num", (), 1), right)), _matrix(left))
        if node.kind == "mul":
            return _scaled(right, _matrix(left)) if has_matrix[0] else _scaled(left, _matrix(right))
    raise Refused(f"a {node.kind} of matrices")


def _scaled(factor: Node, matrix: Node) -> Node:
    return Node("matrix", tuple(Node("mul", (factor, entry)) for entry in matrix.args), matrix.value)


def _product(a: Node, b: Node) -> Node:
    (rows, inner), (other, columns) = a.value, b.value
    if inner != other or rows * columns * inner > MAX_ENTRIES:
        raise Refused("a product of matrices that do not fit, or too large")
    entries = []
    for row in range(rows):
        for column in range(columns):
            total = Node("mul", (a.args[row * inner], b.args[column]))
            for k in range(1, inner):
                total = Node("add", (total, Node("mul", (a.args[row * inner + k], b.args[k * columns + column]))))
            entries.append(total)
    return Node("matrix", tuple(entries), (rows, columns))


def unit_conflict(gold: Node, predicted: Node) -> bool:
    """Whether both sides name known units, and different ones."""
    names = [_unit(gold), _unit(predicted)]
    if None in names or names[0] == names[1]:
        return False
    if all(str(name).startswith("mod ") for name in names):
        return True
    known = [name for name in names if name is not None and is_known_unit(name)]
    return len(known) == 2 and not IGNORED.intersection(known)


def _unit(node: Node) -> str | None:
    while node.kind in ("neg", "percent"):
        node = node.args[0]
    return str(node.value) if node.kind == "unit" else None
