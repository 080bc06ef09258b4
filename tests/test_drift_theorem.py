"""The theorem that makes the swap exact (docs/numerics.md), tried on all pairs of numbers of small binary formats.

Numbers are integers here, multiples of the smallest subnormal one. Sums are rounded to `precision` bits with ties to
even; there is no largest exponent, so nothing overflows.
"""

import pytest


def rounded(number: int, precision: int) -> int:
    unit = 1 << max(abs(number).bit_length() - precision, 0)
    quotient, rest = divmod(number, unit)
    return (quotient + (2 * rest > unit or (2 * rest == unit and quotient % 2 == 1))) * unit


def spacing(number: int, precision: int) -> int:
    return 1 << max(abs(number).bit_length() - precision, 0)


@pytest.mark.parametrize("precision, bits", [(2, 9), (3, 9), (4, 9), (5, 9)])
def test_one_round_trip_settles_every_pair(precision, bits):
    numbers = [number for number in range(-(1 << bits), (1 << bits) + 1) if rounded(number, precision) == number]
    changed = 0
    for x in numbers:
        for d in numbers:
            there = rounded(x - d, precision)
            theta = rounded(there + d, precision)
            theta_hat = rounded(theta - d, precision)
            assert rounded(theta_hat + d, precision) == theta
            assert abs(theta - x) <= spacing(there, precision)
            changed += theta != x
    assert changed > len(numbers)  # a plain round trip is not exact
