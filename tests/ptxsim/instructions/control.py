"""Branches, exits, barriers, and what does nothing here."""

import numpy

from ptxsim.errors import PTXSyntaxError, TrapError
from ptxsim.machine import Machine
from ptxsim.operands import Integer, Register, Special, Symbol
from ptxsim.program import Instruction
from ptxsim.steps import Barrier, Branch, Compute, Exit, Raise, Step, WarpStep, builds


@builds("prefetch", "prefetchu", "griddepcontrol", "membar", "fence", "nanosleep", "pmevent", "applypriority")
@builds("discard", "setmaxnreg", "brkpt")
def nothing(machine: Machine, instruction: Instruction) -> Step:
    """Hints, debugging, and fences, which lockstep makes idle."""
    return Compute(lambda mask: None)


@builds("bra")
def branch(machine: Machine, instruction: Instruction) -> Step:
    (label,) = instruction.args
    target = instruction.label(label.name) if isinstance(label, Symbol) else None
    if target is None:
        raise PTXSyntaxError(f"{machine.where}: unknown label")
    return Branch(target)


@builds("ret", "exit")
def leave(machine: Machine, instruction: Instruction) -> Step:
    return Exit()


@builds("trap")
def trap(machine: Machine, instruction: Instruction) -> Step:
    return Raise(TrapError(f"{machine.where}: trap executed"))


@builds("call")
def call(machine: Machine, instruction: Instruction) -> Step:
    if Symbol("__assertfail") in instruction.args:
        return Raise(TrapError(f"{machine.where}: device assertion failed"))
    raise machine.unsupported("device function calls")


@builds("bar", "barrier")
def barrier(machine: Machine, instruction: Instruction) -> Step:
    kind = [part for part in instruction.parts[1:] if part not in ("cta", "aligned")]
    args = instruction.args
    if kind == ["warp", "sync"]:
        return WarpStep(machine.source(args[0], "b32"), lambda mask: None)
    if kind[:1] == ["sync"] and all(isinstance(arg, Integer | Register | Special) for arg in args):
        count = machine.source(args[1], "b32") if len(args) > 1 else None
        return Barrier(machine.source(args[0], "b32"), count, None)
    if kind[:1] != ["red"]:
        raise machine.unsupported()
    _, operation, type_name = kind
    count = machine.source(args[2], "b32") if len(args) == 4 else None
    predicate = machine.predicate(args[-1])
    destination = machine.destination(args[0], type_name)

    def finish(arrived: numpy.ndarray) -> None:
        n_true, n_all = (int(numpy.count_nonzero(threads)) for threads in (predicate() & arrived, arrived))
        value = {"popc": n_true, "or": n_true > 0, "and": n_true == n_all}[operation]
        if destination is not None:
            numpy.copyto(destination, destination.dtype.type(value), where=arrived)

    return Barrier(machine.source(args[1], "b32"), count, finish)
