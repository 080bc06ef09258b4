"""Floating-point numbers rounded once: formats narrower than float64, sums rounded to odd, fused multiply-add."""

import ctypes

import numpy

from ptxsim.scalar_types import F16, F32, F64, S64, U16, U32

# Precision in bits, exponent of the smallest subnormal, largest finite number.
FORMATS = {
    "f32": (24, -149, float(numpy.finfo(F32).max)),
    "f16": (11, -24, 65504.0),
    "bf16": (8, -133, 3.3895313892515355e38),
    "tf32": (11, -136, 3.4011621342146535e38),
}

ROUNDINGS = {
    "rn": numpy.rint,
    "rz": numpy.trunc,
    "rm": numpy.floor,
    "rp": numpy.ceil,
    "rna": lambda x: numpy.copysign(numpy.floor(numpy.abs(x) + 0.5), x),
}
"""To an integer, by rounding modifier."""


def add_to_odd(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """a + b in float64, rounded to odd: one more rounding, to fewer bits, is then that of the exact sum."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)  # exact (Knuth's two-sum)
    is_above, is_below = error > 0, error < 0
    is_even = (is_above | is_below) & ((total.view(S64) & 1) == 0) & numpy.isfinite(total)
    if is_even.any():
        neighbour = numpy.nextafter(total, numpy.where(is_above, numpy.inf, -numpy.inf))
        total = numpy.where(is_even, neighbour, total)
    return total


def round_to(x: numpy.ndarray, name: str, mode: str = "rn") -> numpy.ndarray:
    """float64 numbers, exact or rounded to odd, rounded to a format; the result stays float64."""
    precision, lowest, largest = FORMATS[name]
    _, exponent = numpy.frexp(x)
    unit = numpy.maximum(exponent - precision, lowest)
    rounded = numpy.ldexp(ROUNDINGS[mode](numpy.ldexp(x, -unit)), unit)
    overflows = (numpy.abs(rounded) > largest) & numpy.isfinite(x)
    if overflows.any():
        limit, infinity = numpy.copysign(largest, x), numpy.copysign(numpy.inf, x)
        to_infinity = {"rn": True, "rna": True, "rz": False, "rm": x < 0, "rp": x > 0}[mode]
        rounded = numpy.where(overflows, numpy.where(to_infinity, infinity, limit), rounded)
    return rounded


def _load_fma() -> ctypes._CFuncPtr:
    try:
        library = ctypes.CDLL("libm.so.6")
    except OSError:
        library = ctypes.CDLL(None)
    library.fma.restype = ctypes.c_double
    library.fma.argtypes = [ctypes.c_double] * 3
    return library.fma


_fma = _load_fma()


def fma64(a: numpy.ndarray, b: numpy.ndarray, c: numpy.ndarray) -> numpy.ndarray:
    """a * b + c rounded once, element by element: there is no format with room for the exact sum."""
    size = max(a.size, b.size, c.size)
    lists = (numpy.broadcast_to(x, size).tolist() for x in (a, b, c))
    return numpy.fromiter(map(_fma, *lists), F64, size)


def decode_bf16(bits: numpy.ndarray) -> numpy.ndarray:
    """As float32, which is exact."""
    return (bits.astype(U32) << U32(16)).view(F32)


def encode_bf16(x: numpy.ndarray, mode: str = "rn") -> numpy.ndarray:
    """Bits of float32 or float64 numbers, exact or rounded to odd."""
    if x.dtype == F32 and mode == "rn":
        bits = numpy.ascontiguousarray(x).view(U32)
        bits = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    else:
        rounded = round_to(x.astype(F64), "bf16", mode).astype(F32)
        bits = (rounded.view(U32) >> U32(16)).astype(U16)
    return _with_nan(x, bits)


def decode_f16(bits: numpy.ndarray) -> numpy.ndarray:
    """As float32, which is exact."""
    return numpy.ascontiguousarray(bits).view(F16).astype(F32)


def encode_f16(x: numpy.ndarray, mode: str = "rn") -> numpy.ndarray:
    """Bits of float32 or float64 numbers, exact or rounded to odd."""
    return _with_nan(x, round_to(x.astype(F64), "f16", mode).astype(F16).view(U16))


def _with_nan(x: numpy.ndarray, bits: numpy.ndarray) -> numpy.ndarray:
    is_nan = numpy.isnan(x)
    return numpy.where(is_nan, U16(0x7FFF), bits) if is_nan.any() else bits


DECODE = {"f16": decode_f16, "bf16": decode_bf16}
ENCODE = {"f16": encode_f16, "bf16": encode_bf16}


def flush_subnormals(x: numpy.ndarray) -> numpy.ndarray:
    """.ftz: they become zeros of their sign."""
    is_subnormal = (numpy.abs(x) < numpy.finfo(x.dtype).tiny) & (x != 0)
    return numpy.where(is_subnormal, numpy.copysign(x.dtype.type(0), x), x) if is_subnormal.any() else x


def saturate(x: numpy.ndarray) -> numpy.ndarray:
    """.sat: to [0, 1], NaN to +0."""
    one, zero = x.dtype.type(1), x.dtype.type(0)
    return numpy.where(numpy.isnan(x), zero, numpy.minimum(numpy.maximum(x, zero), one) + zero)


def rectify(x: numpy.ndarray) -> numpy.ndarray:
    """.relu; NaN stays."""
    return numpy.where(numpy.isnan(x), x, numpy.where(x > 0, x, 0.0))
