"""Shifts, bit fields, bytes."""

from functools import partial
from typing import Any

import numpy

from ptxsim import integer_functions as functions
from ptxsim.machine import Machine
from ptxsim.operands import Integer
from ptxsim.program import Instruction
from ptxsim.scalar_types import U32
from ptxsim.steps import Step, builds


def _assign(machine: Machine, instruction: Instruction, function: Any, result: str, *kinds: str) -> Step:
    to, *args = instruction.args
    sources = [machine.source(arg, kind) for arg, kind in zip(args, kinds, strict=True)]
    return machine.assign(machine.destination(to, result), function, *sources)


@builds("shl", "shr")
def shift(machine: Machine, instruction: Instruction) -> Step:
    op, kind = instruction.parts
    function = functions.shift_left if op == "shl" else functions.shift_right
    return _assign(machine, instruction, function, kind, kind, "u32")


@builds("shf")
def funnel_shift(machine: Machine, instruction: Instruction) -> Step:
    _, direction, mode, _ = instruction.parts
    function = partial(functions.funnel_shift, to_left=direction == "l", clamps=mode == "clamp")
    return _assign(machine, instruction, function, "u32", "u32", "u32", "u32")


@builds("popc", "clz", "brev", "bfind")
def unary(machine: Machine, instruction: Instruction) -> Step:
    op, *modifiers, kind = instruction.parts
    function = {
        "popc": functions.count_ones,
        "clz": functions.count_leading_zeros,
        "brev": functions.reverse_bits,
        "bfind": partial(functions.find_top_bit, as_shift=modifiers == ["shiftamt"]),
    }[op]
    return _assign(machine, instruction, function, kind if op == "brev" else "u32", kind)


@builds("bfe")
def extract_bits(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.parts[-1]
    return _assign(machine, instruction, functions.extract_bits, kind, kind, "u32", "u32")


@builds("bfi")
def insert_bits(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.parts[-1]
    return _assign(machine, instruction, functions.insert_bits, kind, kind, kind, "u32", "u32")


@builds("szext")
def extend(machine: Machine, instruction: Instruction) -> Step:
    _, mode, kind = instruction.parts

    def function(a: numpy.ndarray, width: numpy.ndarray) -> numpy.ndarray:
        count = numpy.minimum(width, U32(32)) if mode == "clamp" else width & U32(31)
        return functions.extract_bits(a, numpy.zeros_like(count), count)

    return _assign(machine, instruction, function, kind, kind, "u32")


@builds("lop3")
def any_logic(machine: Machine, instruction: Instruction) -> Step:
    to, a, b, c, table = instruction.args
    if instruction.parts != ["lop3", "b32"] or not isinstance(table, Integer):
        raise machine.unsupported()
    sources = [machine.source(arg, "b32") for arg in (a, b, c)]
    function = partial(functions.any_logic, table=table.value)
    return machine.assign(machine.destination(to, "b32"), function, *sources)


@builds("prmt")
def permute_bytes(machine: Machine, instruction: Instruction) -> Step:
    mode = instruction.parts[2] if len(instruction.parts) > 2 else None
    function = partial(functions.permute_bytes, mode=mode)
    return _assign(machine, instruction, function, "b32", "b32", "b32", "b32")
