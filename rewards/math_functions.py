"""The functions an expression may call, on exact numbers where the result is exact, else on mpmath's.

This file holds no parser; `math_numeric.evaluate` calls it, and it bounds every argument before it works.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from rewards.math_nodes import Refused

MAX_FACTORIAL, MAX_ARGUMENT_BITS = 5_000, 2_000
_TRIGONOMETRIC = ("sin", "cos", "tan", "sec", "csc", "cot")


class Calculator:
    """The functions at one precision; `ctx` is an mpmath context and `power` the caller's."""

    def __init__(self, ctx: Any, to_float: Callable[[Any], Any], power: Callable[[Any, Any], Any]) -> None:
        self.ctx, self.to_float, self.power = ctx, to_float, power

    def apply(self, name: str, values: Sequence[Any]) -> Any:
        """`name` of `values`; Refused where it is unknown, undefined or out of bounds."""
        if name in _EXACT:
            return _EXACT[name](*[_exact(name, value) for value in values])
        if name in ("max", "min"):
            if not values or any(not isinstance(value, Fraction) for value in values):
                raise Refused(f"{name} needs exact numbers")
            return max(values) if name == "max" else min(values)
        if name == "sqrt":
            return self.power(values[0], Fraction(1, 2))
        if name in ("root", "cbrt"):
            degree = values[1] if name == "root" else Fraction(3)
            if not isinstance(degree, Fraction) or degree.denominator != 1 or degree < 1:
                raise Refused("a root needs a positive integer degree")
            return self.power(values[0], 1 / degree)
        if name == "abs":
            return abs(values[0])
        if name == "log":
            return self.logarithm(*values)
        (value,) = values
        value = self.to_float(value)
        if value and self.ctx.mag(value) > MAX_ARGUMENT_BITS:
            raise Refused(f"{name} of a number beyond 2^{MAX_ARGUMENT_BITS}")
        if name in ("floor", "ceil"):
            return self.rounded(name, value)
        return self.transcendental(name, value)

    def rounded(self, name: str, value: Any) -> Fraction:
        if not isinstance(value, self.ctx.mpf):
            raise Refused(f"{name} of a complex number")
        return Fraction(int(self.ctx.floor(value) if name == "floor" else self.ctx.ceil(value)))

    def logarithm(self, value: Any, base: Any = None) -> Any:
        ctx = self.ctx
        if isinstance(value, Fraction) and isinstance(base, Fraction):
            exact = _exact_logarithm(value, base)
            if exact is not None:
                return exact
        result = ctx.ln(self.to_float(value)) if value else None
        if result is None:
            raise Refused("the logarithm of zero")
        return result if base is None else result / ctx.ln(self.to_float(base))

    def transcendental(self, name: str, value: Any) -> Any:
        ctx = self.ctx
        if name in ("sinh", "cosh", "tanh", "coth") and value and ctx.mag(value) > 18:
            raise Refused(f"{name} of a large number")
        if name in ("sec", "csc", "cot", "coth"):
            below = {"sec": "cos", "csc": "sin", "cot": "tan", "coth": "tanh"}[name]
            return 1 / getattr(ctx, below)(value)
        if name in ("asec", "acsc", "acot"):
            return getattr(ctx, {"asec": "acos", "acsc": "asin", "acot": "atan"}[name])(1 / value)
        known = ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh")
        if name not in known:
            raise Refused(f"{name} is not evaluated")
        return getattr(ctx, name)(value)


def _exact(name: str, value: Any) -> Fraction:
    if not isinstance(value, Fraction):
        raise Refused(f"{name} needs exact numbers")
    return value


def _integer(value: Fraction) -> int:
    if value.denominator != 1:
        raise Refused("an integer expected")
    return value.numerator


def _factorial(value: Fraction) -> Fraction:
    number = _integer(value)
    if not 0 <= number <= MAX_FACTORIAL:
        raise Refused(f"the factorial of a number outside 0 to {MAX_FACTORIAL}")
    return Fraction(math.factorial(number))


def _binomial(top: Fraction, bottom: Fraction) -> Fraction:
    n, k = _integer(top), _integer(bottom)
    if not 0 <= n <= MAX_FACTORIAL or k < 0:
        raise Refused(f"a binomial outside 0 to {MAX_FACTORIAL}")
    return Fraction(math.comb(n, k))


def _exact_logarithm(value: Fraction, base: Fraction) -> Fraction | None:
    """The logarithm where it is a small integer."""
    if value <= 0 or base <= 1:
        return None
    power, count = Fraction(1), 0
    target = value if value >= 1 else 1 / value
    while power < target and count < 64:
        power, count = power * base, count + 1
    if power != target:
        return None
    return Fraction(count if value >= 1 else -count)


_EXACT: dict[str, Callable[..., Fraction]] = {
    "factorial": _factorial,
    "binom": _binomial,
    "gcd": lambda *values: Fraction(math.gcd(*map(_integer, values))),
    "lcm": lambda *values: Fraction(math.lcm(*map(_integer, values))),
}


def is_trigonometric(name: str) -> bool:
    """True for sin, cos, tan, sec, csc and cot."""
    return name in _TRIGONOMETRIC
