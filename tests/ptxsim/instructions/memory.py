"""Loads and stores."""

import re
from collections.abc import Callable
from typing import Any

import numpy

from ptxsim.access import WINDOWS
from ptxsim.errors import PTXError
from ptxsim.instructions.moves import halves
from ptxsim.machine import Machine, put
from ptxsim.operands import Address, Integer, Register, Symbol, Vector
from ptxsim.program import Instruction
from ptxsim.scalar_types import ALL_64, BITS, DTYPES, SINT, U64, UINT
from ptxsim.steps import Compute, Mask, Step, builds

IGNORED = re.compile(
    r"weak|relaxed|acquire|release|acq_rel|volatile|mmio|sys|gpu|cta|cluster|nc|ca|cg|cs|lu|cv|wb|wt|"
    r"unified|L1::\w+|L2::\w+|noftz|sc"
)
"""Modifiers about caches and the order of accesses, of which there is one here."""

_SPACES = ("global", "shared", "local", "param", "const")

Addresses = Callable[[], numpy.ndarray]


def addresses_of(machine: Machine, operand: Any, space: str) -> tuple[Addresses, int | None]:
    """A function that gives the present addresses of all threads; and the address, where it is a constant."""
    base = operand.base if isinstance(operand, Address) else None
    match base:
        case Register():
            return _register_addresses(machine, base, operand.offset), None
        case Integer():
            constant = base.value + operand.offset
        case Symbol():
            kind, start = machine.symbol(base.name)
            constant = start + operand.offset
            if space == "generic":
                constant += WINDOWS[kind]
            elif kind != ("global" if space == "const" else space) and (space, kind) != ("param", "local"):
                raise machine.unsupported(f"{kind} symbol in .{space}")
        case _:
            raise machine.unsupported("address")
    values = numpy.full(machine.n_threads, constant & ALL_64, U64)
    return lambda: values, constant


def _register_addresses(machine: Machine, register: Register, offset: int) -> Addresses:
    width = machine.register_bits(register.key)
    values = machine.view(register.key, UINT[width])
    step = U64(offset & ALL_64)
    if width == 32:
        return lambda: (values.astype(U64) + step) & U64(0xFFFFFFFF)
    if width != 64:
        raise machine.unsupported("address register")
    return (lambda: values + step) if offset else (lambda: values)


def _space_of(machine: Machine, instruction: Instruction) -> tuple[str, int]:
    """The space and the number of elements of a thread's access."""
    space, count = "generic", 1
    for part in instruction.parts[1:-1]:
        name = part.split("::")[0]
        if name in _SPACES:
            space = name
        elif part in ("v2", "v4", "v8"):
            count = int(part[1:])
        elif not IGNORED.fullmatch(part):
            raise machine.unsupported(part)
    return space, count


def _elements(machine: Machine, operand: Any, kind: str, count: int) -> tuple[list[Any], str]:
    """The registers of an access and the type of each; 128 bits are two registers of 64."""
    items = list(operand.items) if isinstance(operand, Vector) else [operand]
    if len(items) != count:
        raise machine.unsupported("vector length")
    if kind != "b128":
        return items, kind
    pairs = [halves(item) if isinstance(item, Register) else (item, item) for item in items]
    return [half for pair in pairs for half in pair], "b64"


@builds("ld", "ldu")
def load(machine: Machine, instruction: Instruction) -> Step:
    space, count = _space_of(machine, instruction)
    to, address = instruction.args[:2]
    items, kind = _elements(machine, to, instruction.parts[-1], count)
    destinations = [machine.destination(item, kind) for item in items]
    addresses, constant = addresses_of(machine, address, space)
    is_constant_param = space == "param" and constant is not None
    if is_constant_param and machine.symbol(address.base.name)[0] == "param":
        return _load_parameters(machine, destinations, kind, constant)
    space = "local" if is_constant_param else space
    width, signed = BITS[kind] // 8, SINT[BITS[kind]]

    def values_for(column: numpy.ndarray, destination: numpy.ndarray) -> numpy.ndarray:
        if destination.dtype.itemsize == width:
            return column.view(destination.dtype)
        return column.view(signed) if kind[0] == "s" else column

    def run(mask: Mask) -> None:
        some = addresses() if mask is None else addresses()[mask]
        rows = machine.access.load(space, some, width, len(items), mask, instruction)
        for index, destination in enumerate(destinations):
            if destination is not None:
                destination[... if mask is None else mask] = values_for(rows[:, index], destination)

    return Compute(run)


def _load_parameters(machine: Machine, destinations: list[Any], kind: str, offset: int) -> Step:
    """The kernel's arguments, which are the same for all threads."""
    width = BITS[kind] // 8
    if offset + width * len(destinations) > machine.body.parameter_bytes:
        raise PTXError(f"{machine.where}: reads beyond the parameters")
    values = [
        machine.access.parameters[offset + index * width : offset + (index + 1) * width].view(DTYPES[kind])
        for index in range(len(destinations))
    ]

    def run(mask: Mask) -> None:
        for destination, value in zip(destinations, values, strict=True):
            if destination is not None:
                is_wider = destination.dtype.itemsize > width
                put(destination, value if is_wider else value.view(destination.dtype), mask)

    return Compute(run)


@builds("st")
def store(machine: Machine, instruction: Instruction) -> Step:
    space, count = _space_of(machine, instruction)
    address, values = instruction.args[:2]
    items, kind = _elements(machine, values, instruction.parts[-1], count)
    width, unsigned = BITS[kind] // 8, UINT[BITS[kind]]
    sources = [machine.source(item, kind) for item in items]
    sources = [source.view(unsigned) if source.flags.c_contiguous else source for source in sources]
    addresses, _ = addresses_of(machine, address, space)
    space = "local" if space == "param" else space

    def run(mask: Mask) -> None:
        some = addresses() if mask is None else addresses()[mask]
        rows = numpy.empty((some.size, len(sources)), unsigned)
        for index, source in enumerate(sources):
            rows[:, index] = source if mask is None else source[mask]
        machine.access.store(space, some, width, len(sources), rows, mask, instruction)

    return Compute(run)
