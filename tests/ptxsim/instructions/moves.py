"""Moves between registers, packing and unpacking, address spaces."""

import numpy

from ptxsim.access import WINDOWS
from ptxsim.machine import Machine, put
from ptxsim.operands import Register, Special, Vector
from ptxsim.program import Instruction
from ptxsim.scalar_types import BITS, DTYPES, U64, UINT
from ptxsim.steps import Compute, Mask, Step, builds

Pairs = list[tuple[numpy.ndarray | None, numpy.ndarray]]


def halves(register: Register) -> tuple[Register, Register]:
    """Of 128 bits, the lower one first."""
    return Register(f"{register.key}#low"), Register(f"{register.key}#high")


@builds("mov")
def move(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.parts[-1]
    to, value = instruction.args
    if isinstance(to, Vector) and isinstance(value, Vector):
        raise machine.unsupported("vector to vector")
    if kind == "b128":
        return _move_128(machine, to, value)
    if isinstance(to, Vector):
        return _unpack(machine, to, value, kind)
    if isinstance(value, Vector):
        return _pack(machine, to, value, kind)
    destination = machine.destination(to, kind)
    if kind == "pred":
        predicate = machine.predicate(value)
        return machine.assign(destination, lambda: predicate())
    if isinstance(value, Special):
        return _move_special(machine, destination, value.name, kind)
    return _moves([(destination, machine.source(value, kind))])


def _move_special(machine: Machine, destination: numpy.ndarray | None, name: str, kind: str) -> Step:
    values = machine.special(name)
    if values.dtype.itemsize * 8 >= BITS[kind]:
        values = machine.source(Special(name), kind)
    is_clock = name.startswith("%clock") or name == "%globaltimer"

    def run(mask: Mask) -> None:
        if is_clock:  # every look at it is later than the last
            values[...] += 1
        if destination is not None:
            put(destination, values, mask)

    return Compute(run)


def _move_128(machine: Machine, to: Register | Vector, value: Register | Vector) -> Step:
    targets, values = (o.items if isinstance(o, Vector) else halves(o) for o in (to, value))
    if len(targets) != 2 or len(values) != 2:
        raise machine.unsupported()
    pairs = zip(targets, values, strict=True)
    return _moves([(machine.destination(a, "b64"), machine.source(b, "b64")) for a, b in pairs])


def _unpack(machine: Machine, to: Vector, value: Register, kind: str) -> Step:
    width = BITS[kind] // len(to.items)
    values = machine.source(value, kind)
    if not values.flags.c_contiguous:
        raise machine.unsupported("unpack of a wider register")
    parts = values.view(UINT[width]).reshape(machine.n_threads, len(to.items))
    return _moves([(machine.destination(item, f"b{width}"), parts[:, i]) for i, item in enumerate(to.items)])


def _pack(machine: Machine, to: Register, value: Vector, kind: str) -> Step:
    width = BITS[kind] // len(value.items)
    destination = machine.destination(to, kind)
    if destination is None or destination.dtype.itemsize * 8 != BITS[kind]:
        raise machine.unsupported("pack into a wider register")
    columns = destination.view(UINT[width]).reshape(machine.n_threads, len(value.items))
    return _moves([(columns[:, i], machine.source(item, f"b{width}")) for i, item in enumerate(value.items)])


def _moves(pairs: Pairs) -> Compute:
    """All at once: a destination may be another one's source."""
    pairs = [pair for pair in pairs if pair[0] is not None]
    if len(pairs) == 1:
        ((destination, values),) = pairs
        return Compute(lambda mask: put(destination, values, mask))

    def run(mask: Mask) -> None:
        for destination, values in [(destination, values.copy()) for destination, values in pairs]:
            put(destination, values, mask)

    return Compute(run)


@builds("cvta")
def convert_address(machine: Machine, instruction: Instruction) -> Step:
    *_, space, kind = instruction.parts
    is_to_space = instruction.parts[1] == "to"
    base = WINDOWS[space.split("::")[0].replace("const", "global")]
    if base and BITS[kind] != 64:
        raise machine.unsupported()
    offset = DTYPES[kind](base)
    destination, address = machine.destination(instruction.args[0], kind), machine.source(instruction.args[1], kind)
    return machine.assign(destination, (lambda a: a - offset) if is_to_space else (lambda a: a + offset), address)


@builds("isspacep")
def is_in_space(machine: Machine, instruction: Instruction) -> Step:
    space = instruction.parts[1].split("::")[0]
    window = U64(WINDOWS[space] >> 56 if space != "const" else 99)
    destination, address = machine.destination(instruction.args[0], "pred"), machine.source(instruction.args[1], "b64")
    return machine.assign(destination, lambda a: (a >> U64(56)) == window, address)


@builds("createpolicy")
def create_policy(machine: Machine, instruction: Instruction) -> Step:
    return machine.assign(machine.destination(instruction.args[0], "b64"), lambda: U64(0))
