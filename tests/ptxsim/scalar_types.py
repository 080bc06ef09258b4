"""PTX's scalar types and the numpy dtypes that hold them."""

import numpy

U8, U16, U32, U64 = numpy.uint8, numpy.uint16, numpy.uint32, numpy.uint64
S8, S16, S32, S64 = numpy.int8, numpy.int16, numpy.int32, numpy.int64
F16, F32, F64 = numpy.float16, numpy.float32, numpy.float64
UINT = {8: U8, 16: U16, 32: U32, 64: U64}
SINT = {8: S8, 16: S16, 32: S32, 64: S64}

BITS = {"pred": 1, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "tf32": 32}
BITS |= {"f16x2": 32, "bf16x2": 32, "u16x2": 32, "s16x2": 32, "b16x2": 32, "f32x2": 64}
BITS |= {f"{kind}{width}": width for width in (8, 16, 32, 64, 128) for kind in "usb"}
"""Bits of a register of each type."""

DTYPES = {"pred": numpy.bool_, "f16": U16, "bf16": U16, "f32": F32, "f64": F64, "tf32": F32}
DTYPES |= {"f16x2": U32, "bf16x2": U32, "u16x2": U32, "s16x2": U32, "b16x2": U32, "f32x2": U64}
DTYPES |= {f"{kind}{width}": UINT[width] for width in UINT for kind in "ub"}
DTYPES |= {f"s{width}": SINT[width] for width in SINT}
"""16-bit floats are held as their bits: numpy has no bfloat16."""

ALL_64 = (1 << 64) - 1


def is_float(name: str) -> bool:
    return name in ("f16", "bf16", "f32", "f64", "tf32")


def unpacked(name: str) -> tuple[str, int]:
    """The element type of a possibly packed type, and how many of it there are."""
    return (name.removesuffix("x2"), 2) if name.endswith("x2") else (name, 1)
