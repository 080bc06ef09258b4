"""Floating-point instructions as numpy functions of arrays, each rounded once."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy

from ptxsim.rounding import (
    DECODE,
    ENCODE,
    add_to_odd,
    flush_subnormals,
    fma64,
    rectify,
    round_to,
    saturate,
)
from ptxsim.scalar_types import F32, F64, U16, U64, UINT, is_float

Function = Callable[..., Any]

UNARY = {
    "rcp": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / numpy.sqrt(x),
    "sqrt": numpy.sqrt,
    "ex2": numpy.exp2,
    "lg2": numpy.log2,
    "sin": numpy.sin,
    "cos": numpy.cos,
    "tanh": numpy.tanh,
}
"""In float64, and rounded by who calls them: the accurate value, also where hardware approximates."""

_MODIFIERS = ("rn", "rz", "rm", "rp", "ftz", "sat", "relu", "NaN", "approx", "full")
_TO_64 = 2.0**-14
"""The smallest normal number of float16."""


def minimum(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """NaN gives way to a number, and -0 is below +0."""
    return _extreme(a, b, numpy.bitwise_or, numpy.fmin)


def maximum(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    return _extreme(a, b, numpy.bitwise_and, numpy.fmax)


def _extreme(a: numpy.ndarray, b: numpy.ndarray, of_equal: Function, choose: Function) -> numpy.ndarray:
    kind = UINT[a.dtype.itemsize * 8]
    a, b = numpy.ascontiguousarray(a), numpy.ascontiguousarray(b)
    return numpy.where(a == b, of_equal(a.view(kind), b.view(kind)).view(a.dtype), choose(a, b))


def minimum_nan(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """.NaN: NaN where either is."""
    return numpy.where(numpy.isnan(a) | numpy.isnan(b), a.dtype.type(numpy.nan), minimum(a, b))


def maximum_nan(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    return numpy.where(numpy.isnan(a) | numpy.isnan(b), a.dtype.type(numpy.nan), maximum(a, b))


_EXTREMES = {
    ("min", False): minimum,
    ("max", False): maximum,
    ("min", True): minimum_nan,
    ("max", True): maximum_nan,
}


def float_function(op: str, kind: str, modifiers: Sequence[str]) -> Function | None:
    """The function of arrays of this type (16-bit floats as their bits), or None where it is not implemented."""
    rounding = next((m for m in modifiers if m in ("rn", "rz", "rm", "rp")), "rn")
    if any(modifier not in _MODIFIERS for modifier in modifiers):
        return None
    op = "fma" if op == "mad" else op
    if kind in DECODE:
        return _half_function(op, kind, modifiers) if rounding == "rn" else None
    function: Function | None
    if op in ("neg", "abs"):
        function = numpy.negative if op == "neg" else numpy.abs
    elif op in ("min", "max"):
        function = _EXTREMES[op, "NaN" in modifiers]
    elif kind == "f32":
        function = _single_function(op, rounding)
    else:
        function = _double_function(op, rounding, "approx" in modifiers)
    if function is None or "relu" in modifiers:
        return None
    if "ftz" in modifiers:
        function = _flushed(function)
    return _saturated(function) if "sat" in modifiers else function


def _flushed(function: Function) -> Function:
    return lambda *xs: flush_subnormals(function(*map(flush_subnormals, xs)))


def _saturated(function: Function) -> Function:
    return lambda *xs: saturate(function(*xs))


def _half_function(op: str, kind: str, modifiers: Sequence[str]) -> Function | None:
    """Computed in float64, where products of 16-bit floats are exact and sums are rounded to odd."""
    if op == "neg":
        return lambda a: a ^ U16(0x8000)
    if op == "abs":
        return lambda a: a & U16(0x7FFF)
    wide: dict[str, Function] = {
        "add": add_to_odd,
        "sub": lambda a, b: add_to_odd(a, -b),
        "mul": numpy.multiply,
        "fma": lambda a, b, c: add_to_odd(a * b, c),
        "min": _EXTREMES["min", "NaN" in modifiers],
        "max": _EXTREMES["max", "NaN" in modifiers],
        **UNARY,
    }
    if op not in wide:
        return None
    function, decode, encode = wide[op], DECODE[kind], ENCODE[kind]
    flushes = "ftz" in modifiers and kind == "f16"

    def flush(x: numpy.ndarray) -> numpy.ndarray:
        return numpy.where(numpy.abs(x) < _TO_64, numpy.copysign(0.0, x), x)

    def run(*operands: numpy.ndarray) -> numpy.ndarray:
        xs = [decode(operand).astype(F64) for operand in operands]
        y = function(*map(flush, xs)) if flushes else function(*xs)
        y = saturate(y) if "sat" in modifiers else y
        y = rectify(y) if "relu" in modifiers else y
        return encode(flush(round_to(y, "f16")) if flushes else y)

    return run


def _single_function(op: str, rounding: str) -> Function | None:
    if rounding != "rn":
        return _directed_function(op, rounding)
    direct = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply, "div": numpy.divide, "sqrt": numpy.sqrt}
    if op in direct:
        return direct[op]
    if op == "fma":
        return lambda a, b, c: add_to_odd(_widen(a) * _widen(b), _widen(c)).astype(F32)
    if op == "rcp":
        return lambda a: F32(1) / a
    if op in UNARY:
        return lambda a: UNARY[op](_widen(a)).astype(F32)
    return None


def _directed_function(op: str, rounding: str) -> Function | None:
    def narrow(y: numpy.ndarray) -> numpy.ndarray:
        return round_to(y, "f32", rounding).astype(F32)

    def add(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
        x, y = _widen(a), _widen(b)
        total = narrow(add_to_odd(x, y))
        if rounding == "rm":  # where a sum of unlike signs is exactly 0, it is -0
            is_exact_zero = (x + y == 0) & ~((x == 0) & (numpy.signbit(x) == numpy.signbit(y)))
            total = numpy.where(is_exact_zero, F32(-0.0), total)
        return total

    functions: dict[str, Function] = {
        "add": add,
        "sub": lambda a, b: add(a, -b),
        "mul": lambda a, b: narrow(_widen(a) * _widen(b)),
        "fma": lambda a, b, c: narrow(add_to_odd(_widen(a) * _widen(b), _widen(c))),
    }
    return functions.get(op)


def _double_function(op: str, rounding: str, is_approximate: bool) -> Function | None:
    if rounding != "rn":
        return None
    if op in ("rcp", "rsqrt") and is_approximate:
        return lambda a: _high_word(UNARY[op](_high_word(a)))
    direct = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply, "div": numpy.divide, "fma": fma64}
    return direct.get(op, UNARY.get(op))


def _high_word(x: numpy.ndarray) -> numpy.ndarray:
    """rcp.approx.ftz.f64 and rsqrt's read and write the upper 32 bits alone."""
    return (numpy.ascontiguousarray(x).view(U64) & U64(0xFFFFFFFF << 32)).view(F64)


def _widen(x: numpy.ndarray) -> numpy.ndarray:
    return x.astype(F64)


# -- comparisons ---------------------------------------------------------------------------------------------------

COMPARISONS = {
    "eq": numpy.equal,
    "ne": numpy.not_equal,
    "lt": numpy.less,
    "le": numpy.less_equal,
    "gt": numpy.greater,
    "ge": numpy.greater_equal,
    "lo": numpy.less,
    "ls": numpy.less_equal,
    "hi": numpy.greater,
    "hs": numpy.greater_equal,
}
_UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu")


def comparison(name: str, kind: str) -> Function | None:
    """The comparison of arrays of this type, or None where there is no such one."""
    if not is_float(kind):
        return COMPARISONS.get(name)
    if name == "num":
        return lambda a, b: ~_either_nan(a, b)
    if name == "nan":
        return _either_nan
    if name == "ne":  # numpy's is true of NaN
        return lambda a, b: (a != b) & ~_either_nan(a, b)
    if name in _UNORDERED:
        ordered = COMPARISONS[name[:2]]
        return lambda a, b: ordered(a, b) | _either_nan(a, b)
    return COMPARISONS[name] if name in ("eq", "lt", "le", "gt", "ge") else None


def _either_nan(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    return numpy.isnan(a) | numpy.isnan(b)
