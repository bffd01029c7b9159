"""Whether two expressions have the same value: exactly, or to 70 digits at several points.

This file compares one expression with another; math_compare.py takes answers apart until only these are left.

- Without variables: fractions compare exactly. Otherwise both sides are computed with 50 and with 100 digits; a value
  counts only if the two agree, or if it vanishes as the precision grows (it is zero).
- With variables: the values at up to 12 points must agree wherever both sides are defined and real.
- A decimal stands for itself, but a decimal prediction of an exact gold (and the other way round) may be its rounding,
  see `MathPolicy`.
"""

from dataclasses import dataclass
from fractions import Fraction

from rewards.math_nodes import Exhausted, Node, Refused, symbols, walk
from rewards.math_numeric import DIGITS, INTEGER_POINTS, NUM_POINTS, Budget, Env, Number, context, evaluate, to_float


@dataclass(frozen=True, kw_only=True, slots=True)
class MathPolicy:
    """What counts as the same answer; docs/math_answers.md states every convention."""

    name: str
    """For logs."""
    decimal_digits: int
    """Significant digits from which a decimal may stand for an exact number, rounded or cut off."""
    repairs_backslash: bool = False
    """Whether `frac{1}{2}` is read as `\\frac{1}{2}`."""
    accepts_unevaluated: bool = False
    """Whether an unevaluated sum or product may stand for a number."""


STRICT = MathPolicy(name="strict", decimal_digits=7)
LENIENT = MathPolicy(name="lenient", decimal_digits=3, repairs_backslash=True, accepts_unevaluated=True)
ENOUGH_POINTS = 6
POLICIES = {policy.name: policy for policy in (STRICT, LENIENT)}


def same_value(gold: Node, predicted: Node, policy: MathPolicy, budget: Budget) -> bool:
    """Whether two expressions are equal; Refused where a side has no value within the bounds."""
    names = symbols(gold) | symbols(predicted)
    if not names:
        return _same_constant(gold, predicted, policy, budget)
    return _same_at_points(gold, predicted, budget)


def _same_constant(gold: Node, predicted: Node, policy: MathPolicy, budget: Budget) -> bool:
    is_unevaluated = any(node.kind == "big" for node in walk(predicted))
    if is_unevaluated and gold.kind in ("num", "dec", "neg") and not policy.accepts_unevaluated:
        raise Refused("an unevaluated sum is not a number")
    a, b = (evaluate(node, Env(budget=budget)) for node in (gold, predicted))
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b or _rounds(gold, predicted, a, b, policy)
    if close(gold, predicted, 0, budget):
        return True
    return _rounds(gold, predicted, a, b, policy)


def _rounds(gold: Node, predicted: Node, a: Number, b: Number, policy: MathPolicy) -> bool:
    """Whether one side is a decimal, long enough, and the other one rounded or cut off to its last place."""
    gold_shape, shape = decimal_shape(gold), decimal_shape(predicted)
    decimal = gold_shape or shape
    if decimal is None or (gold_shape and shape):
        return False
    ulp, digits = decimal
    if digits < policy.decimal_digits or getattr(a, "imag", 0) or getattr(b, "imag", 0):
        return False
    written, exact = (a, b) if gold_shape else (b, a)
    if not isinstance(exact, Fraction):
        env = Env()
        written, ulp = to_float(written, env), to_float(ulp, env)
    off = abs(exact) - abs(written)
    return bool(written * exact > 0 and -ulp / 2 <= off < ulp)


def decimal_shape(node: Node) -> tuple[Fraction, int] | None:
    """The value of the last digit and the number of significant digits of a decimal such as -1.50 or 1.5 * 10^3."""
    if node.kind == "dec":
        return node.value[1], node.value[2]
    if node.kind in ("neg", "unit"):
        return decimal_shape(node.args[0])
    if node.kind == "percent":
        shape = decimal_shape(node.args[0])
        return None if shape is None else (shape[0] / 100, shape[1])
    if node.kind == "mul" and node.args[1].kind == "pow" and node.args[1].args[0] == Node("num", (), Fraction(10)):
        shape = decimal_shape(node.args[0])
        try:
            scale = evaluate(node.args[1], Env())
        except Refused:
            return None
        return (shape[0] * scale, shape[1]) if shape and isinstance(scale, Fraction) else None
    return None


def close(gold: Node, predicted: Node, point: int, budget: Budget) -> bool:
    """Whether both sides have the same value at one point, by two precisions."""
    a, b = _settled(gold, point, budget), _settled(predicted, point, budget)
    ctx = context(DIGITS[1])
    return bool(abs(a - b) <= ctx.mpf(10) ** -70 * max(abs(a), abs(b)))


def _settled(node: Node, point: int, budget: Budget) -> Number:
    """The value with 100 digits; zero if it vanishes with growing precision; Refused if cancellation ruins it."""
    low = evaluate(node, Env(point=point, digits=DIGITS[0], budget=budget))
    if isinstance(low, Fraction):
        return to_float(low, Env(digits=DIGITS[1]))
    env = Env(point=point, digits=DIGITS[1], budget=budget)
    high = to_float(evaluate(node, env), env)
    ctx = context(DIGITS[1])
    low = ctx.convert(low)
    if abs(low - high) <= ctx.mpf(10) ** -30 * abs(high):
        return high
    if abs(high) <= ctx.mpf(10) ** -30 * abs(low):
        return ctx.mpf(0)
    is_real = abs(high.imag) <= ctx.mpf(10) ** -60 * abs(high.real)
    if is_real and abs(low.real - high.real) <= ctx.mpf(10) ** -30 * abs(high.real):
        return ctx.mpf(high.real)
    raise Refused("cancellation beyond the precision")


def _needs_integers(node: Node) -> bool:
    """True for (-1)^n, which means something only for integers n."""
    return (
        node.kind == "pow" and node.args[0].kind == "neg" and not symbols(node.args[0]) and bool(symbols(node.args[1]))
    )


def _same_at_points(gold: Node, predicted: Node, budget: Budget) -> bool:
    agreed_real = agreed_complex = 0
    integers_only = any(_needs_integers(node) for node in (*walk(gold), *walk(predicted)))
    for point in INTEGER_POINTS if integers_only else range(NUM_POINTS):
        if agreed_real == ENOUGH_POINTS or (point == INTEGER_POINTS.start and agreed_real):
            break  # the integer points are for what is defined nowhere else
        try:
            a = evaluate(gold, Env(point=point, budget=budget))
            b = evaluate(predicted, Env(point=point, budget=budget))
            if isinstance(a, Fraction) and isinstance(b, Fraction):
                same, is_complex = a == b, False
            else:
                same = close(gold, predicted, point, budget)
                is_complex = bool(getattr(a, "imag", 0) or getattr(b, "imag", 0))
        except Exhausted:
            raise
        except Refused:
            continue
        if is_complex:
            agreed_complex += same
            if not same and point < 2:
                return False
        elif not same:
            return False
        else:
            agreed_real += 1
    return agreed_real >= 2 or agreed_complex >= 3
