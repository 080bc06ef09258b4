"""What the parser makes of PTX text: modules, kernels' declarations, instructions."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy

from ptxsim.memory import Buffer
from ptxsim.scalar_types import U8


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of code.

    Attributes:
        line, text: where and what it is, for messages.
        op, parts: "add.rn.f32", ["add", "rn", "f32"].
        guard: the predicate register of @p, and whether it is negated.
    """

    line: int
    text: str
    op: str
    parts: list[str]
    guard: tuple[str, bool] | None
    args: list[Any]
    scope: "Scope"

    def label(self, name: str) -> int | None:
        """The index of the instruction that the label stands before."""
        return self.scope.find("labels", name)


class Variable(NamedTuple):
    name: str
    space: str
    align: int
    size: int
    initial: bytes | None


class Parameter(NamedTuple):
    name: str
    type: str
    size: int
    offset: int
    is_array: bool


class Scope:
    """The names of one pair of braces."""

    def __init__(self, parent: "Scope | None" = None) -> None:
        self.parent = parent
        self.registers: dict[str, str] = {}
        self.labels: dict[str, int] = {}
        self.variables: dict[str, str] = {}

    def find(self, table: str, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None:
            names = getattr(scope, table)
            if name in names:
                return names[name]
            scope = scope.parent
        return None


@dataclass
class Body:
    """A kernel as it was declared.

    Attributes:
        parameters, parameter_bytes: the arguments' layout.
        directives: as .reqntid, with their numbers.
        registers: the type of each.
        variables: those declared in the body.
    """

    name: str
    parameters: list[Parameter]
    parameter_bytes: int
    directives: dict[str, list[int]] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)


class Module:
    """All that one text declares."""

    def __init__(self) -> None:
        self.bodies: dict[str, Body] = {}
        self.variables: dict[str, Variable] = {}
        self._buffers: dict[str, Buffer] | None = None

    def buffers(self) -> dict[str, Buffer]:
        """Memory of the module's .global and .const variables, made once: it lasts from launch to launch."""
        if self._buffers is None:
            variables = dict(self.variables)
            for body in self.bodies.values():
                variables.update(body.variables)
            self._buffers = {
                key: _make_buffer(variable)
                for key, variable in variables.items()
                if variable.space in ("global", "const") and variable.size
            }
        return self._buffers


def _make_buffer(variable: Variable) -> Buffer:
    room = numpy.zeros(variable.size + 256, U8)
    start = -room.ctypes.data % 256
    memory = room[start : start + variable.size]
    if variable.initial:
        memory[:] = numpy.frombuffer(variable.initial[: variable.size], U8)
    is_global = variable.space == "global"
    name = f".{variable.space} {variable.name}"
    return Buffer(name, memory.ctypes.data, variable.size, is_global, memory, is_counted=is_global)
