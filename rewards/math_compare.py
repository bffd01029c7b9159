"""Whether a prediction is the gold answer, decided by what kind of thing the gold is.

The stages, cheapest first: equal text, plain numbers, multiple choice and times of day, then both sides parsed and
compared as trees: lists, sets, intervals, matrices and relations are taken apart here, down to scalars, which
math_scalars.py compares exactly or numerically. Nothing is evaluated as code, and nothing needs a timeout: see the
bounds in math_text.py, math_tokens.py, math_terms.py and math_numeric.py.

Usage: `compare("1/2", "0.5").equal`.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from rewards.math_choice import compare_labels
from rewards.math_forms import canonical_items, expanded, matrix_value, unit_conflict
from rewards.math_nodes import Exhausted, Node, Refused, canonical, symbols
from rewards.math_number import read_number
from rewards.math_numeric import Budget
from rewards.math_parser import called_names, has_thousands, parse
from rewards.math_readings import other_readings
from rewards.math_relations import is_label, label_key, named_value, renamed, same_equation, same_inequalities
from rewards.math_scalars import STRICT, MathPolicy, same_value
from rewards.math_sets import is_set_like, real_set, same_sets
from rewards.math_text import MAX_CHARS, clean, has_control_characters, normalise_answer, words

MAX_ITEMS = 64
_CONTAINERS = ("list", "set", "tuple")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The outcome of one comparison."""

    equal: bool
    """Whether the prediction counts as the gold answer."""
    reason: str
    """The stage that decided, or why the prediction could not be read."""


def compare(gold: str, predicted: str, policy: MathPolicy = STRICT) -> Verdict:
    """Decide whether `predicted` is the answer `gold`; any two strings will do, in bounded time."""
    if len(predicted) > MAX_CHARS or len(gold) > MAX_CHARS or has_control_characters(predicted):
        same = gold.strip() == predicted.strip()
        return Verdict(equal=same, reason="string" if same else "too long, or control characters")
    if not predicted.strip():
        return Verdict(equal=False, reason="empty")
    if normalise_answer(gold) == normalise_answer(predicted):
        return Verdict(equal=True, reason="string")
    if (quick := _plain_numbers(gold, predicted)) is not None:
        return quick
    if (labels := compare_labels(gold, predicted)) is not None:
        return Verdict(equal=labels[0], reason=labels[1])
    if policy.repairs_backslash:
        predicted = re.sub(r"(?<![A-Za-z\\])(frac|dfrac|sqrt|pi)(?=\{)", r"\\\1", predicted)
    verdict = _trees(gold, predicted, policy)
    if verdict.equal:
        return verdict
    for other_gold, other in other_readings(gold, predicted):
        if (again := _trees(other_gold, other, policy)).equal:
            return again
    return verdict


def _plain_numbers(gold: str, predicted: str) -> Verdict | None:
    """Decide where both sides are plain numbers; a percent sign on one side only may be dropped."""
    a, b = read_number(gold), read_number(predicted)
    if a is None or b is None or (a.is_decimal != b.is_decimal and a.value != b.value):
        return None
    if a.value == b.value:
        return Verdict(equal=True, reason="number")
    if a.is_percent != b.is_percent and a.shown == b.shown:
        return Verdict(equal=True, reason="percent_sign")
    return None if "," in gold and "," in predicted else Verdict(equal=False, reason="different")


def _trees(gold: str, predicted: str, policy: MathPolicy) -> Verdict:
    """Parse both sides, with thousands separators first and without them next, and compare."""
    calls = called_names(gold) & called_names(predicted)
    budget = Budget()
    reason = "different"
    for thousands in (True, False) if has_thousands(gold + predicted) else (True,):
        a, b = parse(gold, thousands, calls), parse(predicted, thousands, calls)
        if isinstance(a, Refused) or isinstance(b, Refused):
            reason = f"not read: {b}" if isinstance(b, Refused) else f"gold not read: {a}"
            continue
        try:
            if Comparison(policy, budget).equal(a, b):
                return Verdict(equal=True, reason="value")
        except (Refused, RecursionError) as why:
            reason = f"refused: {why}"
    if _is_words(gold) and _is_words(predicted) and words(gold) == words(predicted):
        return Verdict(equal=True, reason="words")
    return Verdict(equal=False, reason=reason)


@lru_cache(maxsize=1024)
def _is_words(text: str) -> bool:
    """Whether an answer is prose, without brackets: only then are letter case and punctuation ignored."""
    if re.search(r"[\\()\[\]|]", re.sub(r"\\text[a-z]*|\\mathrm|\\mbox", "", clean(text))):
        return False
    plain = words(text)
    return re.search("[a-z]{2}", plain) is not None and not re.search(r"[=<>^+*]", plain)


class Comparison:
    """One comparison of two trees under a policy and a budget."""

    def __init__(self, policy: MathPolicy, budget: Budget) -> None:
        self.policy, self.budget = policy, budget

    def equal(self, gold: Node, predicted: Node) -> bool:
        """Whether `predicted` says the same as `gold`; False also where it cannot be computed."""
        self.budget.charge(64)
        if canonical(gold) == canonical(predicted):
            return True
        try:
            return self._typed(gold, predicted)
        except Refused as reason:
            if isinstance(reason, Exhausted):
                raise
            return False

    def _typed(self, gold: Node, predicted: Node) -> bool:
        if gold.kind == "rel" or predicted.kind == "rel":
            verdict = self._relations(gold, predicted)
            if verdict is not None:
                return verdict
        if is_set_like(gold) or is_set_like(predicted):
            return self._sets(gold, predicted)
        gold, predicted = expanded(gold), expanded(predicted)
        if gold.kind in _CONTAINERS or predicted.kind in _CONTAINERS:
            return self._containers(gold, predicted)
        if "text" in (gold.kind, predicted.kind):
            return gold.kind == predicted.kind and gold.value == predicted.value
        if "base" in (gold.kind, predicted.kind):
            return self._bases(gold, predicted)
        if "ratio" in (gold.kind, predicted.kind):
            return self._ratios(gold, predicted)
        a, b = matrix_value(gold), matrix_value(predicted)
        if a is not None or b is not None:
            return a is not None and b is not None and a.value == b.value and self._items(a.args, b.args)
        return self._scalars(gold, predicted)

    def _scalars(self, gold: Node, predicted: Node) -> bool:
        if unit_conflict(gold, predicted):
            return False
        if same_value(gold, predicted, self.policy, self.budget):
            return True
        if (gold.kind == "percent") == (predicted.kind == "percent"):
            return False
        bare = (gold.args[0], predicted) if gold.kind == "percent" else (gold, predicted.args[0])
        return same_value(*bare, self.policy, self.budget)

    def _relations(self, gold: Node, predicted: Node) -> bool | None:
        """Compare where one side is a relation; None where both may still be sets of numbers."""
        a, b = named_value(gold), named_value(predicted)
        if gold.kind != "rel":
            if b is not None and b[0] is None:  # 2 + 3 = 5 says 5, but 41 = 42 says nothing
                members = predicted.args if "~" not in predicted.value else predicted.args[:1]
                return all(self.equal(gold, member) for member in members)
            return self.equal(gold, b[1]) if b else (None if is_set_like(predicted) else False)
        if predicted.kind != "rel":
            if a is not None and a[0] is None:
                return False  # a gold without a name, such as 2 + 3 = 5, is no value
            return self.equal(a[1], predicted) if a else (None if is_set_like(gold) else False)
        if a and b and a[0] is None and b[0] is None:
            return gold.value == predicted.value and self._items(gold.args[:-1], predicted.args[:-1])
        if a and b and self._same_label(a[0], b[0]) and self.equal(a[1], renamed(a[0], b[0], b[1])):
            return True
        if set(gold.value) == set(predicted.value) == {"="}:
            return len(gold.args) == len(predicted.args) == 2 and same_equation(gold, predicted, self.budget)
        if is_set_like(gold) and is_set_like(predicted) and same_inequalities(gold, predicted, self.budget):
            return True
        return None if self._same_variable(gold, predicted) else False

    def _same_label(self, gold: Node | None, predicted: Node | None) -> bool:
        if gold is None or predicted is None:
            return True
        return label_key(gold) == label_key(predicted) or "text" in (gold.kind, predicted.kind)

    def _same_variable(self, gold: Node, predicted: Node) -> bool:
        names = [next((arg for arg in node.args if is_label(arg)), None) for node in (gold, predicted)]
        return symbols(gold) == symbols(predicted) or None in names or self._same_label(*names)

    def _sets(self, gold: Node, predicted: Node) -> bool:
        if gold.kind == "list" and any(item.kind == "tuple" for item in gold.args):
            return False  # points are no intervals
        try:
            return same_sets(real_set(gold, self.budget), real_set(predicted, self.budget))
        except Refused:
            pass
        if gold.kind == "setof" and predicted.kind == "setof":
            return self.equal(gold.args[1], predicted.args[1])
        if gold.kind != predicted.kind or gold.value != predicted.value or gold.kind == "rel":
            return False
        if gold.kind in ("union", "inter", "and", "or"):
            return self._matched(canonical_items(gold), canonical_items(predicted))
        return self._items(gold.args, predicted.args)

    def _containers(self, gold: Node, predicted: Node) -> bool:
        gold, predicted = _unnamed_point(gold, predicted), _unnamed_point(predicted, gold)
        if gold.kind not in _CONTAINERS or predicted.kind not in _CONTAINERS:
            return self._one_item(gold, predicted)
        a, b = gold.args, predicted.args
        if gold.kind == predicted.kind == "tuple":
            return (gold.value == predicted.value or len(a) > 2) and self._items(a, b)
        if gold.kind == "tuple" or predicted.kind == "tuple":
            return gold.kind != "set" and self._items(a, b)
        if "set" in (gold.kind, predicted.kind):
            return self._covers(a, b) and self._covers(b, a)
        if _distinct_labels(a) != _distinct_labels(b):
            return self._items(a, b)
        return self._matched(a, b) or (len(b) > len(a) and self._matched(a, self._without_repeats(b)))

    def _one_item(self, gold: Node, predicted: Node) -> bool:
        """A set or tuple of one element is that element; a column of a matrix is the tuple of its entries."""
        container, other = (gold, predicted) if gold.kind in _CONTAINERS else (predicted, gold)
        matrix = matrix_value(other)
        if matrix is not None:
            return container.kind == "tuple" and 1 in matrix.value and self._items(gold.args, predicted.args)
        if len(container.args) != 1 or container.value in ("[)", "(]"):
            return False
        pair = (container.args[0], other) if container is gold else (other, container.args[0])
        return self.equal(*pair)

    def _items(self, gold: tuple[Node, ...], predicted: tuple[Node, ...]) -> bool:
        return len(gold) == len(predicted) and all(map(self.equal, gold, predicted))

    def _covers(self, left: tuple[Node, ...], right: tuple[Node, ...]) -> bool:
        if len(left) > MAX_ITEMS or len(right) > MAX_ITEMS:
            raise Refused("too many items")
        return all(any(self.equal(a, b) for b in right) for a in left)

    def _matched(self, gold: tuple[Node, ...], predicted: tuple[Node, ...]) -> bool:
        """Whether the items correspond one to one in any order."""
        if len(gold) != len(predicted) or len(gold) > MAX_ITEMS:
            return False
        left = list(predicted)
        for item in gold:
            match = next((other for other in left if self.equal(item, other)), None)
            if match is None:
                return False
            left.remove(match)
        return True

    def _without_repeats(self, items: tuple[Node, ...]) -> tuple[Node, ...]:
        distinct: list[Node] = []
        for item in items[: 2 * MAX_ITEMS]:
            if not any(self.equal(other, item) for other in distinct):
                distinct.append(item)
        return tuple(distinct)

    def _bases(self, gold: Node, predicted: Node) -> bool:
        """Same digits and base; digits without a base count in the base of the other side."""
        if gold.kind == predicted.kind:
            same = gold.value[0].lstrip("0").lower() == predicted.value[0].lstrip("0").lower()
            return same and gold.value[1] == predicted.value[1]
        based, plain = (gold, predicted) if gold.kind == "base" else (predicted, gold)
        digits = str(plain.value) if plain.kind == "num" else ""
        return digits == based.value[0].lstrip("0")

    def _ratios(self, gold: Node, predicted: Node) -> bool:
        """Proportional parts; a ratio of two is also their quotient."""
        a, b = (node.args if node.kind == "ratio" else _quotient(node) for node in (gold, predicted))
        if len(a) != len(b):
            return False
        return all(
            same_value(Node("mul", (a[0], y)), Node("mul", (b[0], x)), self.policy, self.budget)
            for x, y in zip(a[1:], b[1:], strict=True)
        )


def _unnamed_point(node: Node, other: Node) -> Node:
    """(1, 2) for the point A(1, 2), where the other side is a tuple."""
    is_point = node.kind == "mul" and node.args[0].kind == "sym" and node.args[1].kind == "tuple"
    return node.args[1] if is_point and other.kind == "tuple" else node


def _quotient(node: Node) -> tuple[Node, ...]:
    return node.args if node.kind == "div" else (node, Node("num", (), 1))


def _distinct_labels(items: tuple[Node, ...]) -> bool:
    """Whether a list gives values to different names, so that their order tells which is which."""
    keys = set()
    for item in items:
        named = named_value(item)
        if named is not None and named[0] is not None:
            keys.add(str(named[0].value) if named[0].kind == "sub" else label_key(named[0]))
    return len(keys) > 1
