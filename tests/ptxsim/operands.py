"""What an instruction's operands can be."""

import struct
from dataclasses import dataclass
from typing import Any

import numpy

from ptxsim.scalar_types import BITS, F32, F64, U32


@dataclass(frozen=True, slots=True)
class Register:
    key: str
    """Unique in the kernel: the same name may be declared anew in an inner scope."""


@dataclass(frozen=True, slots=True)
class Integer:
    value: int


@dataclass(frozen=True, slots=True)
class Float:
    value: float
    width: int | None = None
    bits: int | None = None
    """Given where the literal spells its bits, of that width."""


@dataclass(frozen=True, slots=True)
class Special:
    """%tid.x and the like."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, a parameter or a label."""

    name: str


@dataclass(frozen=True, slots=True)
class Offset:
    """A symbol's address and some bytes."""

    base: Any
    offset: int


@dataclass(frozen=True, slots=True)
class Address:
    """[base + offset]; the base is None for forms that only other hardware units use, as [map, {x, y}]."""

    base: Any
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Vector:
    items: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Parenthesis:
    items: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """p|q, two destinations."""

    first: Any
    second: Any


@dataclass(frozen=True, slots=True)
class Not:
    operand: Any


@dataclass(frozen=True, slots=True)
class Sink:
    """_, a destination that nobody reads."""


def literal_bits(literal: Integer | Float, name: str) -> int:
    """The bits of a literal that is used as this type."""
    width = BITS[name]
    if isinstance(literal, Integer):
        if name == "f32":
            return int.from_bytes(struct.pack("<f", float(literal.value)), "little")
        if name == "f64":
            return int.from_bytes(struct.pack("<d", float(literal.value)), "little")
        return literal.value & ((1 << width) - 1)
    if literal.width == width:
        assert literal.bits is not None
        return literal.bits
    if width == 32:
        with numpy.errstate(all="ignore"):
            return int(numpy.array([literal.value], F64).astype(F32).view(U32)[0])
    if width == 64:
        return int.from_bytes(struct.pack("<d", literal.value), "little")
    raise NotImplementedError(f"floating-point literal {literal.value} used as .{name}")
