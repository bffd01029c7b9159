"""The value of an expression: an exact fraction where that is possible, else a number of 50 and one of 100 digits.

Nothing here can run away: before each operation the size of its result is bounded (exact numbers 65,536 bits, others
a magnitude of 2^1,000,000), and all operations of one evaluation draw on a `Budget`. Beyond a bound: `Refused`.
The values of variables come with the call; see `POINTS`.

Covered: arithmetic, roots (real ones where they exist), powers, trigonometric functions and their inverses, logarithms,
factorials up to 5,000!, binomials, floor, ceiling, gcd, lcm, max, min, sums and products of at most 2,000 terms.
Not covered: integrals, limits, infinite sums.
Usage: `evaluate(parse("1/2 + sqrt(16)"), Env()) == Fraction(9, 2)`.
"""

import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from rewards.math_functions import Calculator, is_trigonometric
from rewards.math_nodes import Exhausted, Node, Refused, walk
from rewards.math_powers import MAX_BITS, exact_power

MAX_MAGNITUDE, MAX_TERMS = 1_000_000, 2_000
DIGITS = (50, 100)
NUM_POINTS = 12
INTEGER_POINTS = range(8, 12)
Number = Any
"""A Fraction, or an mpf or mpc of the context in use."""

_contexts = threading.local()  # mpmath's own context is shared by all threads, and its functions change its precision


def context(digits: int) -> Any:
    """This thread's mpmath context of so many digits, made at first use."""
    made: dict[int, Any] = _contexts.__dict__.setdefault("made", {})
    if digits not in made:
        from mpmath import MPContext  # lazy: most answers never need it

        made[digits] = MPContext()
        made[digits].dps = digits
    return made[digits]


class Budget:
    """What is left to spend on one comparison; about a microsecond per unit."""

    def __init__(self, units: int = 20_000) -> None:
        self.units = units

    def charge(self, bits: int = 0) -> None:
        """Pay for one operation on numbers of `bits` bits."""
        self.units -= 1 + bits // 64 + (bits >> 9) ** 2
        if self.units < 0:
            raise Exhausted("too much work")


@dataclass(slots=True)
class Env:
    """Where an expression is evaluated."""

    point: int = 0
    """Chooses the values of the variables, see `variable_value`."""
    digits: int = DIGITS[0]
    """Precision of what is not exact."""
    budget: Budget = field(default_factory=Budget)
    """Shared by everything that belongs to one comparison."""
    bound: Mapping[str, Fraction] = field(default_factory=dict)
    """Values of the variables that sums bind."""


def variable_value(name: str, point: int) -> Fraction:
    """A value that depends on the name: about 1 at points 0-1, about +-10 at 2-3, 8 to 30 at 4-5, below 0.5 at 6-7, and
    integers at the others, for factorials and bounds of sums."""
    code = zlib.crc32(f"{name}|{point}".encode())
    if point in INTEGER_POINTS:
        return Fraction(2 + code % 7)
    if point in (4, 5):
        return Fraction(8 * 503 + code % 11_003, 503)
    if point in (6, 7):
        return Fraction(17 + code % 211, 503)
    value = Fraction(211 + code % 1009, 503)
    if point not in (2, 3):
        return value
    is_negative = (zlib.crc32(name.encode()) + point) % 2  # at one of the two points
    return -7 * value if is_negative else 7 * value


def evaluate(node: Node, env: Env) -> Number:
    """The value of `node`; Refused beyond a bound, at a pole, or where `node` is not an expression."""
    env.budget.charge()
    if node.kind == "num":
        return node.value
    if node.kind == "dec":
        return node.value[0]
    operation = _OPERATIONS.get(node.kind)
    if operation is None:
        raise Refused(f"a {node.kind} has no value")
    try:
        return _bounded(operation(node, env), env)
    except (ZeroDivisionError, OverflowError, ValueError, TypeError) as error:
        raise Refused(f"no value: {error}") from None


def _bounded(value: Number, env: Env) -> Number:
    if isinstance(value, Fraction):
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        if bits > MAX_BITS:
            value = to_float(value, env)
        else:
            env.budget.charge(bits if bits > 256 else 0)
            return value
    env.budget.charge(512)
    ctx = context(env.digits)
    if not ctx.isfinite(value) or (value and abs(ctx.mag(value)) > MAX_MAGNITUDE):
        raise Refused("infinite, or of a magnitude beyond 2^1000000")
    return value


def to_float(value: Number, env: Env) -> Any:
    """The same number with `env.digits` digits."""
    ctx = context(env.digits)
    if isinstance(value, Fraction):
        return ctx.mpf(value.numerator) / value.denominator
    return value


def _values(node: Node, env: Env) -> list[Number]:
    values = [evaluate(arg, env) for arg in node.args]
    if all(isinstance(value, Fraction) for value in values):
        return values
    return [to_float(value, env) for value in values]


def _symbol(node: Node, env: Env) -> Number:
    name = str(node.value)
    return env.bound[name] if name in env.bound else variable_value(name, env.point)


def _opaque(node: Node, env: Env) -> Number:
    """`F_{n-1}` or f(x): a value that depends on the name and on the values of the index or arguments."""
    values = [evaluate(arg, env) for arg in node.args]
    exact = [value if isinstance(value, Fraction) else context(15).nstr(value, 20) for value in values]
    return variable_value(f"{node.kind} {node.value}({exact})", env.point % 2)


def _constant(node: Node, env: Env) -> Number:
    ctx = context(env.digits)
    if node.value == "pi":
        return +ctx.pi
    if node.value == "e":
        return +ctx.e
    if node.value == "i":
        return ctx.mpc(0, 1)
    raise Refused(f"{node.value} is no number")


def _add(node: Node, env: Env) -> Number:
    a, b = _values(node, env)
    return a + b


def _mul(node: Node, env: Env) -> Number:
    a, b = _values(node, env)
    return a * b


def _div(node: Node, env: Env) -> Number:
    a, b = _values(node, env)
    if not b:
        raise Refused("division by zero")
    return a / b


def _mod(node: Node, env: Env) -> Number:
    a, b = _values(node, env)
    if not (isinstance(a, Fraction) and isinstance(b, Fraction) and b > 0):
        raise Refused("a remainder needs exact numbers")
    return a % b


def _pow(node: Node, env: Env) -> Number:
    base, exponent = evaluate(node.args[0], env), evaluate(node.args[1], env)
    return power(base, exponent, env)


def power(base: Number, exponent: Number, env: Env) -> Number:
    """base ** exponent, exact where possible; the real root where an odd root of a negative number is asked for."""
    if isinstance(exponent, Fraction):
        if isinstance(base, Fraction):
            exact = exact_power(base, exponent)
            if exact is not None:
                return exact
            if base < 0 and exponent.denominator % 2 == 1 and exponent.denominator > 1:
                root = power(-base, exponent, env)
                return -root if exponent.numerator % 2 else root
        elif exponent.denominator % 2 == 1 and exponent.denominator > 1 and _is_real(base) and base < 0:
            root = power(-base, exponent, env)
            return -root if exponent.numerator % 2 else root
    ctx = context(env.digits)
    base, exponent = to_float(base, env), to_float(exponent, env)
    if not base:
        if _is_real(exponent) and exponent > 0:
            return Fraction(0)
        raise Refused("zero to a power that is not positive")
    size = abs(exponent) * (abs(ctx.mag(base)) + 5)
    if ctx.mag(size) > 20:
        raise Refused("a power beyond 2^1000000")
    if isinstance(base, ctx.mpf) and base > 0 and isinstance(exponent, ctx.mpf):
        return ctx.exp(exponent * ctx.ln(base)) if exponent != int(exponent) else base ** int(exponent)
    return ctx.power(base, exponent)


def _is_real(value: Number) -> bool:
    return isinstance(value, Fraction) or not hasattr(value, "imag") or value.imag == 0


def _neg(node: Node, env: Env) -> Number:
    return -evaluate(node.args[0], env)


def _percent(node: Node, env: Env) -> Number:
    return evaluate(node.args[0], env) / 100


def _unit(node: Node, env: Env) -> Number:
    return evaluate(node.args[0], env)


def _base(node: Node, env: Env) -> Number:
    return Fraction(int(*node.value))


def _big(node: Node, env: Env) -> Number:
    variable, start, stop, body = node.args
    first, last = evaluate(start, env), evaluate(stop, env)
    if not (isinstance(first, Fraction) and isinstance(last, Fraction) and first.denominator == last.denominator == 1):
        raise Refused("a sum needs integer bounds")
    if last - first > MAX_TERMS:
        raise Refused(f"a sum of more than {MAX_TERMS} terms")
    total: Number = Fraction(0 if node.value == "sum" else 1)
    for index in range(int(first), int(last) + 1):
        env.budget.charge(512)
        bound = {**env.bound, str(variable.value): Fraction(index)}
        term = evaluate(body, Env(point=env.point, digits=env.digits, budget=env.budget, bound=bound))
        if isinstance(total, Fraction) != isinstance(term, Fraction):
            total, term = to_float(total, env), to_float(term, env)
        total = _bounded(total + term if node.value == "sum" else total * term, env)
    return total


def _function(node: Node, env: Env) -> Number:
    ctx, name = context(env.digits), str(node.value)
    values = [evaluate(arg, env) for arg in node.args]
    if is_trigonometric(name) and any(part.kind == "unit" and part.value == "deg" for part in walk(node.args[0])):
        values = [to_float(values[0], env) * ctx.pi / 180]
    calculator = Calculator(ctx, lambda value: to_float(value, env), lambda a, b: power(a, b, env))
    return calculator.apply(name, values)


_OPERATIONS: dict[str, Callable[[Node, Env], Number]] = {
    "sym": _symbol,
    "sub": _opaque,
    "call": _opaque,
    "const": _constant,
    "add": _add,
    "mul": _mul,
    "div": _div,
    "mod": _mod,
    "pow": _pow,
    "neg": _neg,
    "percent": _percent,
    "unit": _unit,
    "base": _base,
    "big": _big,
    "func": _function,
}
