"""Integer instructions as numpy functions of arrays, exact and with wraparound."""

import numpy

from ptxsim.scalar_types import ALL_64, S64, SINT, U8, U32, U64, UINT


def divide(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Towards zero; by zero all bits are set, as the hardware's subroutines leave them."""
    kind = a.dtype.type
    is_zero = b == 0
    if a.dtype.kind == "u":
        return numpy.where(is_zero, ~kind(0), a // numpy.where(is_zero, kind(1), b))
    unsigned = UINT[a.dtype.itemsize * 8]
    dividend = numpy.where(a < 0, numpy.negative(a), a).astype(unsigned)
    divisor = numpy.where(is_zero, kind(1), numpy.where(b < 0, numpy.negative(b), b)).astype(unsigned)
    quotient = (dividend // divisor).astype(a.dtype)
    quotient = numpy.where((a < 0) != (b < 0), numpy.negative(quotient), quotient)
    return numpy.where(is_zero, kind(-1), quotient)


def remainder(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    return numpy.where(b == 0, a, a - divide(a, b) * b)


def multiply_high(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """The upper half of the product."""
    bits = a.dtype.itemsize * 8
    is_signed = a.dtype.kind == "i"
    if bits < 64:
        wide = (SINT if is_signed else UINT)[bits * 2]
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    x, y = a.astype(U64), b.astype(U64)
    low, half = U64(0xFFFFFFFF), U64(32)
    x_low, x_high, y_low, y_high = x & low, x >> half, y & low, y >> half
    middle = x_high * y_low + ((x_low * y_low) >> half)
    other = x_low * y_high + (middle & low)
    high = x_high * y_high + (middle >> half) + (other >> half)
    if is_signed:
        high = high - numpy.where(a < 0, y, U64(0)) - numpy.where(b < 0, x, U64(0))
    return high.astype(a.dtype)


def shift_left(a: numpy.ndarray, count: numpy.ndarray) -> numpy.ndarray:
    width = a.dtype.itemsize * 8
    return numpy.where(count < width, a << (count & U32(width - 1)).astype(a.dtype), a.dtype.type(0))


def shift_right(a: numpy.ndarray, count: numpy.ndarray) -> numpy.ndarray:
    width = a.dtype.itemsize * 8
    if a.dtype.kind == "i":
        return a >> numpy.minimum(count, U32(width - 1)).astype(a.dtype)
    return numpy.where(count < width, a >> (count & U32(width - 1)).astype(a.dtype), a.dtype.type(0))


def funnel_shift(
    a: numpy.ndarray, b: numpy.ndarray, count: numpy.ndarray, to_left: bool, clamps: bool
) -> numpy.ndarray:
    """shf: of b:a."""
    count = (numpy.minimum(count, U32(32)) if clamps else count & U32(31)).astype(U64)
    both = (b.astype(U64) << U64(32)) | a
    return (both << count) >> U64(32) if to_left else (both >> count) & U64(0xFFFFFFFF)


def count_ones(a: numpy.ndarray) -> numpy.ndarray:
    return numpy.bitwise_count(a).astype(U32)


def count_leading_zeros(a: numpy.ndarray) -> numpy.ndarray:
    width = a.dtype.itemsize * 8
    rest = a.astype(U64)
    top = numpy.zeros(a.shape, U32)
    for step in (32, 16, 8, 4, 2, 1):
        is_above = rest >= (U64(1) << U64(step))
        top = top + numpy.where(is_above, U32(step), U32(0))
        rest = numpy.where(is_above, rest >> U64(step), rest)
    return numpy.where(a == 0, U32(width), U32(width - 1) - top)


def find_top_bit(a: numpy.ndarray, as_shift: bool) -> numpy.ndarray:
    """bfind: the position of the top bit that differs from the sign, all bits set where there is none."""
    width = a.dtype.itemsize * 8
    if a.dtype.kind == "i":
        a = numpy.where(a < 0, ~a, a).view(UINT[width])
    zeros = count_leading_zeros(a)
    return numpy.where(a == 0, U32(0xFFFFFFFF), zeros if as_shift else U32(width - 1) - zeros)


def reverse_bits(a: numpy.ndarray) -> numpy.ndarray:
    rows = numpy.ascontiguousarray(a).view(U8).reshape(a.size, -1)
    bits = numpy.unpackbits(rows, axis=1, bitorder="little")[:, ::-1]
    return numpy.packbits(bits, axis=1, bitorder="little").reshape(-1).view(a.dtype)


def _ones(count: numpy.ndarray) -> numpy.ndarray:
    """64 bits with the lowest `count` set."""
    count = count.astype(U64)
    return numpy.where(count >= 64, U64(ALL_64), (U64(1) << (count & U64(63))) - U64(1))


def extract_bits(a: numpy.ndarray, position: numpy.ndarray, length: numpy.ndarray) -> numpy.ndarray:
    """bfe: a signed field is extended by its top bit."""
    position, length = position & U32(0xFF), length & U32(0xFF)
    if a.dtype.kind == "u":
        return (shift_right(a.astype(U64), position) & _ones(length)).astype(a.dtype)
    field = shift_right(a.astype(S64), position)
    above = numpy.minimum((U32(64) - numpy.minimum(length, U32(64))).astype(S64), 63)
    return numpy.where(length == 0, S64(0), (field << above) >> above).astype(a.dtype)


def insert_bits(a: numpy.ndarray, b: numpy.ndarray, position: numpy.ndarray, length: numpy.ndarray) -> numpy.ndarray:
    """bfi: a's lowest bits into b."""
    position, length = position & U32(0xFF), length & U32(0xFF)
    mask = shift_left(_ones(length), position)
    return ((b.astype(U64) & ~mask) | (shift_left(a.astype(U64), position) & mask)).astype(a.dtype)


def any_logic(a: numpy.ndarray, b: numpy.ndarray, c: numpy.ndarray, table: int) -> numpy.ndarray:
    """lop3: the truth table's bit a:b:c."""
    result = numpy.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    return result


def permute_bytes(a: numpy.ndarray, b: numpy.ndarray, selector: numpy.ndarray, mode: str | None) -> numpy.ndarray:
    """prmt: each byte of the result is one of the eight of b:a."""
    size = a.size
    rows = [numpy.ascontiguousarray(x).view(U8).reshape(size, 4) for x in (a, b)]
    source, result, lines = numpy.concatenate(rows, axis=1), numpy.empty((size, 4), U8), numpy.arange(size)
    start = (selector & U32(3)).astype(numpy.intp)
    for i in range(4):
        if mode is None:
            nibble = (selector >> U32(4 * i)) & U32(0xF)
            byte = source[lines, (nibble & U32(7)).astype(numpy.intp)]
            result[:, i] = numpy.where(nibble & U32(8), (byte >> U8(7)) * U8(255), byte)
            continue
        index = {
            "f4e": start + i,
            "b4e": (start - i) & 7,
            "rc8": start,
            "ecl": numpy.maximum(start, i),
            "ecr": numpy.minimum(start, i),
            "rc16": (start & 1) * 2 + (i & 1),
        }[mode]
        result[:, i] = source[lines, index]
    return result.reshape(-1).view(U32)
