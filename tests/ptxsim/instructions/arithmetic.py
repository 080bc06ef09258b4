"""Arithmetic of integers and floats, carries, logic."""

from functools import reduce
from typing import Any

import numpy

from ptxsim.float_functions import UNARY, float_function
from ptxsim.integer_functions import divide, multiply_high, remainder
from ptxsim.machine import Machine, put
from ptxsim.operands import Float
from ptxsim.program import Instruction
from ptxsim.rounding import DECODE
from ptxsim.scalar_types import BITS, DTYPES, S8, S32, S64, U8, U32, UINT, is_float, unpacked
from ptxsim.steps import Compute, Mask, Step, builds

_INTEGER = {
    "add": numpy.add,
    "sub": numpy.subtract,
    "mul": numpy.multiply,
    "div": divide,
    "rem": remainder,
    "min": numpy.minimum,
    "max": numpy.maximum,
    "neg": numpy.negative,
    "abs": numpy.abs,
    "and": numpy.bitwise_and,
    "or": numpy.bitwise_or,
    "xor": numpy.bitwise_xor,
    "not": numpy.bitwise_not,
    "mad": lambda a, b, c: a * b + c,
    "sad": lambda a, b, c: c + numpy.where(a < b, b - a, a - b).astype(c.dtype),
    "cnot": lambda a: (a == 0).astype(a.dtype),
}
_N_OPERANDS = {"fma": 3, "mad": 3, "sad": 3, "neg": 1, "abs": 1, "not": 1, "cnot": 1, **dict.fromkeys(UNARY, 1)}


@builds("div", "rem", "min", "max", "neg", "abs", "fma", "sad", "cnot", *UNARY)
def compute(machine: Machine, instruction: Instruction) -> Step:
    """d = op(a, ...), all of one type, packed perhaps."""
    op, *modifiers, kind = instruction.parts
    if kind in DECODE and modifiers[-1:] == ["f32"]:
        return _mixed(machine, instruction)
    element, _ = unpacked(kind)
    function: Any
    if is_float(element):
        function = float_function(op, element, modifiers)
    else:
        function = _INTEGER.get(op) if modifiers in ([], ["lo"]) else None
    to, *args = instruction.args
    if function is not None and op in ("min", "max") and kind == "f32" and len(args) == 3:  # of sm_100
        sources = [machine.source(arg, kind) for arg in args]
        return machine.assign(machine.destination(to, kind), lambda *xs: reduce(function, xs), *sources)
    if function is None or len(args) != _N_OPERANDS.get(op, 2):
        raise machine.unsupported()
    return assign_packed(machine, to, kind, function, *(packed_source(machine, arg, kind) for arg in args))


def _mixed(machine: Machine, instruction: Instruction) -> Step:
    """add.f32.bf16 and the like, of sm_100: 16-bit operands are widened, which is exact; the last one is float32."""
    op, *modifiers, _, kind = instruction.parts
    decode = DECODE[kind]
    function = float_function(op, "f32", modifiers) if op in ("add", "sub", "fma") else None
    to, *narrow, last = instruction.args
    if function is None or "ftz" in modifiers or len(narrow) != _N_OPERANDS.get(op, 2) - 1:
        raise machine.unsupported()
    sources = [*(machine.source(arg, kind) for arg in narrow), machine.source(last, "f32")]
    return machine.assign(machine.destination(to, "f32"), lambda *xs: function(*map(decode, xs[:-1]), xs[-1]), *sources)


def packed_source(machine: Machine, operand: Any, kind: str) -> numpy.ndarray:
    """An operand of a possibly packed type, as an array of its elements."""
    element, count = unpacked(kind)
    if count == 1:
        return machine.source(operand, kind)
    if isinstance(operand, Float):
        raise machine.unsupported("packed literal")
    values = machine.source(operand, f"b{BITS[kind]}")
    if not values.flags.c_contiguous:
        raise machine.unsupported("packed operand in a wider register")
    return values.view(DTYPES[element])


def assign_packed(machine: Machine, to: Any, kind: str, function: Any, *sources: numpy.ndarray) -> Compute:
    destination = machine.destination(to, kind)
    if unpacked(kind)[1] == 1:
        return machine.assign(destination, function, *sources)
    whole = UINT[BITS[kind]]
    return machine.assign(destination, lambda *xs: numpy.ascontiguousarray(function(*xs)).view(whole), *sources)


@builds("add", "sub", "addc", "subc")
def add(machine: Machine, instruction: Instruction) -> Step:
    op, *modifiers, kind = instruction.parts
    if "cc" in modifiers or op in ("addc", "subc"):
        return _carry(machine, instruction)
    if kind == "s32" and modifiers == ["sat"]:
        to, *args = instruction.args
        function = _INTEGER[op]

        def saturated(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
            return numpy.clip(function(a.astype(S64), b.astype(S64)), -(2**31), 2**31 - 1)

        return machine.assign(machine.destination(to, "s32"), saturated, *(machine.source(a, "s32") for a in args))
    return compute(machine, instruction)


@builds("mul", "mad", "madc")
def multiply(machine: Machine, instruction: Instruction) -> Step:
    op, *modifiers, kind = instruction.parts
    if is_float(unpacked(kind)[0]):
        return compute(machine, instruction)
    if "cc" in modifiers or op == "madc":
        return _carry(machine, instruction)
    if modifiers in ([], ["lo"]):
        return compute(machine, instruction)
    if modifiers not in (["wide"], ["hi"]):
        raise machine.unsupported()
    to, a, b, *addend = instruction.args
    result = f"{kind[0]}{2 * BITS[kind]}" if modifiers == ["wide"] else kind
    wide = DTYPES[result]

    def product(x: numpy.ndarray, y: numpy.ndarray) -> numpy.ndarray:
        return x.astype(wide) * y.astype(wide) if modifiers == ["wide"] else multiply_high(x, y)

    sources = [machine.source(a, kind), machine.source(b, kind), *(machine.source(c, result) for c in addend)]
    function: Any = (lambda x, y, z: product(x, y) + z) if addend else product
    return machine.assign(machine.destination(to, result), function, *sources)


def _carry(machine: Machine, instruction: Instruction) -> Step:
    """Sums of more than one register: the condition code is read, written, or both."""
    op, *modifiers, kind = instruction.parts
    unsigned = UINT[BITS[kind]]
    to, *args = instruction.args
    sources = [machine.source(arg, f"u{BITS[kind]}") for arg in args]
    destination, carry = machine.destination(to, f"u{BITS[kind]}"), machine.carry
    takes, gives = op in ("addc", "subc", "madc"), "cc" in modifiers

    def run(mask: Mask) -> None:
        carried = carry.astype(unsigned) if takes else unsigned(0)
        a, b = sources[0], sources[-1]
        if op in ("mad", "madc"):
            x, y = (source.view(DTYPES[kind]) for source in sources[:2])
            a = (multiply_high(x, y) if "hi" in modifiers else x * y).view(unsigned)
        if op in ("sub", "subc"):
            part = a - b
            result = part - carried
            overflows = (a < b) | (part < carried)
        else:
            part = a + b
            result = part + carried
            overflows = (part < a) | (result < part)
        overflows = numpy.broadcast_to(overflows, carry.shape).copy()
        if destination is not None:
            put(destination, result, mask)
        if gives:
            put(carry, overflows, mask)

    return Compute(run)


@builds("mul24", "mad24")
def multiply_24(machine: Machine, instruction: Instruction) -> Step:
    _, *modifiers, kind = instruction.parts
    if modifiers != ["lo"]:
        raise machine.unsupported()
    to, *args = instruction.args

    def low(x: numpy.ndarray) -> numpy.ndarray:
        return (x << S32(8)) >> S32(8) if kind == "s32" else x & U32(0xFFFFFF)

    def function(a: numpy.ndarray, b: numpy.ndarray, *c: numpy.ndarray) -> numpy.ndarray:
        return low(a) * low(b) + c[0] if c else low(a) * low(b)

    return machine.assign(machine.destination(to, kind), function, *(machine.source(arg, kind) for arg in args))


@builds("and", "or", "xor", "not")
def logic(machine: Machine, instruction: Instruction) -> Step:
    op, *_, kind = instruction.parts
    if kind != "pred":
        return compute(machine, instruction)
    to, *args = instruction.args
    function, predicates = _INTEGER[op], [machine.predicate(arg) for arg in args]
    return machine.assign(machine.destination(to, "pred"), lambda: function(*(read() for read in predicates)))


@builds("dp4a")
def dot_product_4(machine: Machine, instruction: Instruction) -> Step:
    _, a_kind, b_kind = instruction.parts
    kind = "s32" if "s32" in (a_kind, b_kind) else "u32"
    to, a, b, c = instruction.args

    def function(x: numpy.ndarray, y: numpy.ndarray, z: numpy.ndarray) -> numpy.ndarray:
        rows = [
            v.view(S8 if which == "s32" else U8).reshape(-1, 4).astype(S64) for v, which in ((x, a_kind), (y, b_kind))
        ]
        return z + (rows[0] * rows[1]).sum(axis=1)

    sources = [machine.source(a, "u32"), machine.source(b, "u32"), machine.source(c, kind)]
    return machine.assign(machine.destination(to, kind), function, *sources)


@builds("copysign")
def copy_sign(machine: Machine, instruction: Instruction) -> Step:
    """d = the magnitude of b with the sign of a."""
    kind = instruction.parts[-1]
    to, a, b = instruction.args
    sources = machine.source(a, kind), machine.source(b, kind)
    return machine.assign(machine.destination(to, kind), lambda sign, size: numpy.copysign(size, sign), *sources)
