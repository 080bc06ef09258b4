"""Comparisons and selections."""

from collections.abc import Callable
from typing import Any

import numpy

from ptxsim.float_functions import COMPARISONS, comparison
from ptxsim.instructions.arithmetic import assign_packed, packed_source
from ptxsim.machine import Machine, put
from ptxsim.operands import Pair
from ptxsim.program import Instruction
from ptxsim.rounding import DECODE, flush_subnormals
from ptxsim.scalar_types import F32, U16, is_float, unpacked
from ptxsim.steps import Compute, Mask, Step, builds

_COMBINE = {"and": numpy.logical_and, "or": numpy.logical_or, "xor": numpy.logical_xor}
_ONES = {"f32": F32(1), "f16": U16(0x3C00), "bf16": U16(0x3F80)}
"""1.0, which set.f32 and the like write for true."""

Compare = Callable[[], numpy.ndarray]


def _compare(machine: Machine, name: str, kind: str, flushes: bool, a: Any, b: Any) -> Compare:
    """A function that compares the operands' present values."""
    function = comparison(name, kind)
    if function is None:
        raise machine.unsupported()
    x, y = machine.source(a, kind), machine.source(b, kind)
    if kind in DECODE:
        decode = DECODE[kind]
        return lambda: function(decode(x), decode(y))
    if flushes and kind == "f32":
        return lambda: function(flush_subnormals(x), flush_subnormals(y))
    return lambda: function(x, y)


def _combined(machine: Machine, compare: Compare, combine: list[str], args: list[Any]) -> Compare:
    """The comparison combined with a predicate, where there is one."""
    if not combine:
        return compare
    function, predicate = _COMBINE[combine[0]], machine.predicate(args[3])
    return lambda: function(compare(), predicate())


@builds("setp")
def set_predicate(machine: Machine, instruction: Instruction) -> Step:
    _, name, *modifiers, kind = instruction.parts
    to, a, b = instruction.args[:3]
    combine = [modifier for modifier in modifiers if modifier != "ftz"]
    if kind in ("f16x2", "bf16x2"):
        return _set_packed_predicates(machine, instruction, combine)
    compare = _compare(machine, name, kind, "ftz" in modifiers, a, b)
    if not isinstance(to, Pair):
        destination = machine.destination(to, "pred")
        is_plain = not modifiers and kind not in DECODE and not (name == "ne" and is_float(kind))
        if is_plain and name in COMPARISONS:
            return machine.assign(destination, COMPARISONS[name], machine.source(a, kind), machine.source(b, kind))
        return machine.assign(destination, _combined(machine, compare, combine, instruction.args))
    first, second = machine.destination(to.first, "pred"), machine.destination(to.second, "pred")
    result = _combined(machine, compare, combine, instruction.args)
    opposite = _combined(machine, lambda: ~compare(), combine, instruction.args)

    def run(mask: Mask) -> None:
        values = result(), opposite()
        for destination, value in zip((first, second), values, strict=True):
            if destination is not None:
                put(destination, value, mask)

    return Compute(run)


def _set_packed_predicates(machine: Machine, instruction: Instruction, combine: list[str]) -> Step:
    _, name, *_, kind = instruction.parts
    element, _ = unpacked(kind)
    function, decode = comparison(name, element), DECODE[element]
    to, a, b, *others = instruction.args
    if function is None or combine or others or not isinstance(to, Pair):
        raise machine.unsupported()
    x, y = packed_source(machine, a, kind), packed_source(machine, b, kind)
    destinations = machine.destination(to.first, "pred"), machine.destination(to.second, "pred")

    def run(mask: Mask) -> None:
        values = function(decode(x), decode(y)).reshape(-1, 2)
        for index, destination in enumerate(destinations):
            if destination is not None:
                put(destination, values[:, index], mask)

    return Compute(run)


@builds("set")
def set_number(machine: Machine, instruction: Instruction) -> Step:
    _, name, *modifiers, result, kind = instruction.parts
    to, a, b = instruction.args[:3]
    combine = [modifier for modifier in modifiers if modifier != "ftz"]
    if kind.endswith("x2"):
        element, _ = unpacked(kind)
        function, decode, one = comparison(name, element), DECODE[element], _ONES[element]
        if function is None or result != kind or modifiers:
            raise machine.unsupported()
        sources = packed_source(machine, a, kind), packed_source(machine, b, kind)
        return assign_packed(
            machine, to, kind, lambda x, y: numpy.where(function(decode(x), decode(y)), one, U16(0)), *sources
        )
    compare = _compare(machine, name, kind, "ftz" in modifiers, a, b)
    compare = _combined(machine, compare, combine, instruction.args)
    destination = machine.destination(to, result)
    if destination is None:
        return machine.assign(None, None)
    zero = destination.dtype.type(0)
    true = _ONES.get(result, ~zero if destination.dtype.kind in "iu" else None)
    return machine.assign(destination, lambda: numpy.where(compare(), true, zero))


@builds("selp")
def select(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.parts[-1]
    if kind == "pred":
        raise machine.unsupported()
    to, a, b, condition = instruction.args
    x, y, predicate = machine.source(a, kind), machine.source(b, kind), machine.predicate(condition)
    return machine.assign(machine.destination(to, kind), lambda: numpy.where(predicate(), x, y))


@builds("slct")
def select_by_sign(machine: Machine, instruction: Instruction) -> Step:
    *_, kind, sign_kind = instruction.parts
    to, a, b, sign = instruction.args
    sources = machine.source(a, kind), machine.source(b, kind), machine.source(sign, sign_kind)
    return machine.assign(machine.destination(to, kind), lambda x, y, z: numpy.where(z >= 0, x, y), *sources)


@builds("testp")
def classify(machine: Machine, instruction: Instruction) -> Step:
    _, what, kind = instruction.parts
    values = machine.source(instruction.args[1], kind)
    smallest = numpy.finfo(values.dtype).tiny
    function: Any = {
        "finite": numpy.isfinite,
        "infinite": numpy.isinf,
        "number": lambda a: ~numpy.isnan(a),
        "notanumber": numpy.isnan,
        "normal": lambda a: numpy.isfinite(a) & (numpy.abs(a) >= smallest),
        "subnormal": lambda a: (numpy.abs(a) < smallest) & (a != 0),
    }[what]
    return machine.assign(machine.destination(instruction.args[0], "pred"), function, values)
