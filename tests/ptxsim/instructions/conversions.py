"""cvt: between integers and floats of all widths, rounded once."""

from collections.abc import Callable, Sequence

import numpy

from ptxsim.machine import Machine
from ptxsim.program import Instruction
from ptxsim.rounding import DECODE, ENCODE, decode_bf16, encode_bf16, flush_subnormals, rectify, round_to, saturate
from ptxsim.scalar_types import BITS, DTYPES, F32, F64, U32, U64, is_float
from ptxsim.steps import Step, builds

_TO_INTEGER = {"rni": numpy.rint, "rzi": numpy.trunc, "rmi": numpy.floor, "rpi": numpy.ceil}
_TO_FLOAT = ("rn", "rz", "rm", "rp", "rna")

Function = Callable[[numpy.ndarray], numpy.ndarray]


@builds("cvt")
def convert(machine: Machine, instruction: Instruction) -> Step:
    _, *modifiers, result, kind = instruction.parts
    flags = [modifier for modifier in modifiers if modifier not in (*_TO_INTEGER, *_TO_FLOAT)]
    rounding = next((modifier for modifier in modifiers if modifier not in flags), None)
    if not {"ftz", "sat", "relu"}.issuperset(flags) or kind.endswith("x2"):
        raise machine.unsupported()
    to, *args = instruction.args
    if not result.endswith("x2"):
        function = conversion(machine, result, kind, rounding, flags)
        return machine.assign(machine.destination(to, result), function, machine.source(args[0], kind))
    element = result.removesuffix("x2")
    if kind != "f32" or len(args) != 2 or "sat" in flags or element not in ENCODE:
        raise machine.unsupported()
    one = conversion(machine, element, "f32", rounding, flags)
    sources = [machine.source(arg, "f32") for arg in args]
    return machine.assign(
        machine.destination(to, result), lambda high, low: (one(high).astype(U32) << U32(16)) | one(low), *sources
    )


def conversion(machine: Machine, result: str, kind: str, rounding: str | None, flags: Sequence[str]) -> Function:
    if is_float(kind) and is_float(result):
        return _float_to_float(result, kind, rounding, flags)
    if "relu" in flags:
        raise machine.unsupported()
    if is_float(kind):
        if rounding not in _TO_INTEGER:
            raise machine.unsupported()
        return _float_to_integer(result, kind, _TO_INTEGER[rounding], flags)
    if is_float(result):
        is_exact = result == "f64" and BITS[kind] < 64
        if rounding not in ("rn", "rz", "rm", "rp") or (result == "f64" and rounding != "rn" and not is_exact):
            raise machine.unsupported()
        return _integer_to_float(result, kind, rounding, "sat" in flags)
    return _integer_to_integer(result, kind, "sat" in flags)


def _integer_to_integer(result: str, kind: str, is_clamped: bool) -> Function:
    dtype = DTYPES[result]
    if not is_clamped:
        return lambda a: a.astype(dtype)
    source, target = numpy.iinfo(DTYPES[kind]), numpy.iinfo(dtype)
    low, high = max(int(source.min), int(target.min)), min(int(source.max), int(target.max))
    return lambda a: numpy.clip(a, a.dtype.type(low), a.dtype.type(high)).astype(dtype)


def _float_to_integer(result: str, kind: str, to_integer: Function, flags: Sequence[str]) -> Function:
    """Clamped always; NaN becomes 0."""
    dtype, info = DTYPES[result], numpy.iinfo(DTYPES[result])
    low, high = float(info.min), float(int(info.max) + 1)
    decode = DECODE.get(kind, lambda a: a)

    def function(a: numpy.ndarray) -> numpy.ndarray:
        x = flush_subnormals(decode(a)) if "ftz" in flags else decode(a)
        x = to_integer(x.astype(F64))
        is_above, is_below = x >= high, x < low
        values = numpy.where(numpy.isnan(x) | is_above | is_below, 0.0, x).astype(dtype)
        return numpy.where(is_above, dtype(info.max), numpy.where(is_below, dtype(info.min), values))

    return function


def _integer_to_float(result: str, kind: str, rounding: str, is_saturated: bool) -> Function:
    if result == "f64":
        return lambda a: a.astype(F64)
    if result == "f32" and rounding == "rn":
        return lambda a: saturate(a.astype(F32)) if is_saturated else a.astype(F32)
    is_wide = BITS[kind] == 64

    def function(a: numpy.ndarray) -> numpy.ndarray:
        x = _to_odd(a) if is_wide else a.astype(F64)
        return _narrow(saturate(x) if is_saturated else x, result, rounding)

    return function


def _to_odd(a: numpy.ndarray) -> numpy.ndarray:
    """64-bit integers as float64, rounded to odd where they have more than 53 bits."""
    is_negative = a < 0
    size = numpy.where(is_negative, numpy.negative(a), a).astype(U64)
    top = (size >> U64(11)) | ((size & U64(0x7FF)) != 0)
    x = numpy.where(size < U64(1 << 53), size.astype(F64), top.astype(F64) * 2048.0)
    return numpy.where(is_negative, -x, x)


def _float_to_float(result: str, kind: str, rounding: str | None, flags: Sequence[str]) -> Function:
    to_integer = _TO_INTEGER.get(rounding or "")
    mode = rounding if rounding in _TO_FLOAT else "rn"
    if not flags and to_integer is None:
        if (kind, result, mode) == ("f32", "bf16", "rn"):
            return encode_bf16
        if (kind, result) == ("bf16", "f32"):
            return decode_bf16
        if kind == result:
            return lambda a: a
    decode = DECODE.get(kind, lambda a: a)

    def function(a: numpy.ndarray) -> numpy.ndarray:
        x = decode(a)
        flushes = "ftz" in flags and x.dtype == F32
        x = (flush_subnormals(x) if flushes else x).astype(F64)
        x = x if to_integer is None else to_integer(x)
        x = saturate(x) if "sat" in flags else x
        x = rectify(x) if "relu" in flags else x
        y = _narrow(x, result, mode)
        return flush_subnormals(y) if "ftz" in flags and result == "f32" else y

    return function


def _narrow(x: numpy.ndarray, result: str, mode: str) -> numpy.ndarray:
    """float64 numbers, exact or rounded to odd, as this type."""
    if result == "f64":
        return x
    if result == "f32" and mode == "rn":
        return x.astype(F32)
    if result in ("f32", "tf32"):
        return round_to(x, result, mode).astype(F32)
    return ENCODE[result](x, mode)
