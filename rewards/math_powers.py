"""Powers and roots of fractions that are fractions again: 2^10, (4/9)^(1/2), 8^(-2/3).

Usage: `exact_power(Fraction(4, 9), Fraction(1, 2)) == Fraction(2, 3)`.
"""

import math
from fractions import Fraction

from rewards.math_nodes import Refused

MAX_BITS = 65_536


def exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """base ** exponent; None where it is no fraction or has more than `MAX_BITS` bits."""
    top, degree = exponent.numerator, exponent.denominator
    if base == 0:
        if exponent <= 0:
            raise Refused("zero to a power that is not positive")
        return base
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(top) > MAX_BITS and abs(base) != 1:
        return None
    if degree == 1:
        return base**top if abs(base) != 1 else (base if top % 2 else Fraction(1))
    if base < 0 or degree > 64:
        return None
    numerator, denominator = _integer_root(base.numerator, degree), _integer_root(base.denominator, degree)
    if numerator is None or denominator is None:
        return None
    return Fraction(numerator, denominator) ** top


def _integer_root(number: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(number)
    else:
        if number.bit_length() > 4096:
            return None
        root = 1 << -(-number.bit_length() // degree)
        while True:  # Newton's method, from above
            smaller = ((degree - 1) * root + number // root ** (degree - 1)) // degree
            if smaller >= root:
                break
            root = smaller
    return root if root**degree == number else None
