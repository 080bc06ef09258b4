"""Atomic operations: one thread after the other, in the order of their numbers."""

from collections.abc import Callable
from typing import Any

import numpy

from ptxsim.float_functions import float_function
from ptxsim.instructions.memory import IGNORED, addresses_of
from ptxsim.machine import Machine
from ptxsim.program import Instruction
from ptxsim.scalar_types import BITS, DTYPES, is_float
from ptxsim.steps import Compute, Mask, Step, builds

Update = Callable[[Any, Any, Any], Any]
"""What a cell holds afterwards, of what it held and the two operands."""


def _updates(add: Callable[[Any, Any], Any], one: Any, zero: Any) -> dict[str, Update]:
    return {
        "add": lambda old, x, _: add(old, x),
        "min": lambda old, x, _: min(old, x),
        "max": lambda old, x, _: max(old, x),
        "and": lambda old, x, _: old & x,
        "or": lambda old, x, _: old | x,
        "xor": lambda old, x, _: old ^ x,
        "exch": lambda old, x, _: x,
        "cas": lambda old, x, new: new if old == x else old,
        "inc": lambda old, x, _: zero if old >= x else old + one,
        "dec": lambda old, x, _: x if old == zero or old > x else old - one,
    }


def _adder(kind: str) -> Callable[[Any, Any], Any]:
    if kind not in ("f16", "bf16"):
        return lambda a, b: a + b
    function: Any = float_function("add", kind, [])
    return lambda a, b: function(numpy.array([a]), numpy.array([b]))[0]


@builds("atom", "red")
def atomic(machine: Machine, instruction: Instruction) -> Step:
    name, *modifiers, kind = instruction.parts
    dtype = DTYPES[kind]
    updates = _updates(_adder(kind), dtype(1), dtype(0))
    space, operation = "generic", ""
    for modifier in modifiers:
        if modifier.split("::")[0] in ("global", "shared"):
            space = modifier.split("::")[0]
        elif modifier in updates:
            operation = modifier
        elif not IGNORED.fullmatch(modifier):
            raise machine.unsupported(modifier)
    is_float_extreme = operation in ("min", "max") and is_float(kind)
    is_narrow = BITS[kind] < 32 and kind not in ("f16", "bf16", "b16")
    if not operation or kind.endswith("x2") or is_narrow or is_float_extreme:
        raise machine.unsupported()
    args = list(instruction.args)
    destination = machine.destination(args.pop(0), kind) if name == "atom" else None
    addresses, _ = addresses_of(machine, args[0], space)
    values = machine.source(args[1], kind)
    others = machine.source(args[2], kind) if operation == "cas" else values
    update, width = updates[operation], BITS[kind] // 8

    def run(mask: Mask) -> None:
        numbers = machine.thread if mask is None else numpy.flatnonzero(mask)
        some = addresses() if mask is None else addresses()[mask]
        old = numpy.empty(some.size, dtype)
        parts: list[Any] = [(space, some, None, mask)]
        for where, part, chosen, threads in machine.access.split(some, mask) if space == "generic" else parts:
            cells = _cells(machine, where, part, width, dtype, threads, instruction)
            indices = range(some.size) if chosen is None else numpy.flatnonzero(chosen)
            for index, (array, cell) in zip(indices, cells, strict=True):
                thread = numbers[index]
                old[index] = array[cell]
                array[cell] = update(array[cell], values[thread], others[thread])
        if destination is not None:
            same_width = destination.dtype.itemsize == width
            destination[numbers] = old.view(destination.dtype) if same_width else old

    return Compute(run)


def _cells(
    machine: Machine,
    space: str,
    addresses: numpy.ndarray,
    width: int,
    dtype: Any,
    mask: Mask,
    instruction: Instruction,
) -> list[tuple[numpy.ndarray, int]]:
    """The array and the index in it of each address."""
    access = machine.access
    if space == "shared":
        memory, rows = access.place(space, addresses, width, mask, instruction, is_store=True)
        return [(memory.view(dtype), int(row)) for row in rows]
    if space != "global":
        raise machine.unsupported(f"atomic on .{space}")
    index = access.locate(addresses, width, mask, instruction, is_store=True)
    access.record("atomic", index, width, addresses, mask)
    start, array = access.buffers.view(width, 1)
    flat = array.reshape(-1).view(dtype)
    return [(flat, (int(address) - start) // width) for address in addresses]
