"""What the lanes of a warp do together: shuffles, votes, matches, reductions."""

import numpy

from ptxsim.integer_functions import count_leading_zeros
from ptxsim.machine import POISON, Machine, put
from ptxsim.operands import Pair
from ptxsim.program import Instruction
from ptxsim.scalar_types import S32, U32, U64
from ptxsim.steps import Compute, Mask, Step, WarpStep, builds


def _everyone(machine: Machine, mask: Mask) -> numpy.ndarray:
    return numpy.ones(machine.n_threads, numpy.bool_) if mask is None else mask


def _targets(machine: Machine, operand: object) -> tuple[numpy.ndarray | None, numpy.ndarray | None]:
    """A destination of 32 bits, and the predicate after it where there is one."""
    if isinstance(operand, Pair):
        return machine.destination(operand.first, "b32"), machine.destination(operand.second, "pred")
    return machine.destination(operand, "b32"), None


@builds("shfl")
def shuffle(machine: Machine, instruction: Instruction) -> Step:
    _, sync, mode, kind = instruction.parts
    if sync != "sync" or kind != "b32":
        raise machine.unsupported()
    destination, predicate = _targets(machine, instruction.args[0])
    values, by, clamp, members = (machine.source(arg, "u32") for arg in instruction.args[1:5])
    lane = machine.lane.astype(S32)
    first_of_warp = machine.thread - machine.lane.astype(numpy.intp)
    last_of_block = (machine.thread // (machine.n_threads // machine.n_blocks) + 1) * (
        machine.n_threads // machine.n_blocks
    )

    def run(mask: Mask) -> None:
        b, c = (by & U32(31)).astype(S32), (clamp & U32(31)).astype(S32)
        segment = ((clamp >> U32(8)) & U32(31)).astype(S32)
        lowest, highest = lane & segment, (lane & segment) | (c & ~segment)
        other = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
        is_valid = other >= highest if mode == "up" else other <= highest
        source = first_of_warp + numpy.where(is_valid, other, lane)
        is_there = source < last_of_block
        source = numpy.where(is_there, source, 0)
        is_active = is_there if mask is None else is_there & mask[source]
        # What an inactive lane gives is undefined.
        result = numpy.where(is_active, values[source], U32(POISON[32]))
        if destination is not None:
            put(destination, result, mask)
        if predicate is not None:
            put(predicate, is_valid, mask)

    return WarpStep(members, run)


@builds("vote")
def vote(machine: Machine, instruction: Instruction) -> Step:
    _, *modifiers, kind = instruction.parts
    is_sync, mode = modifiers[0] == "sync", modifiers[-1]
    to, operand = instruction.args[:2]
    predicate, destination = machine.predicate(operand), machine.destination(to, kind)

    def run(mask: Mask) -> None:
        active = _everyone(machine, mask)
        votes, voters = machine.warp_bits(predicate() & active), machine.warp_bits(active)
        result = {
            "ballot": votes,
            "all": votes == voters,
            "any": votes != 0,
            "uni": (votes == voters) | (votes == 0),
        }[mode]
        if destination is not None:
            put(destination, machine.per_thread(result), mask)

    return WarpStep(machine.source(instruction.args[2], "u32"), run) if is_sync else Compute(run)


@builds("activemask")
def active_mask(machine: Machine, instruction: Instruction) -> Step:
    destination = machine.destination(instruction.args[0], "b32")

    def run(mask: Mask) -> None:
        if destination is not None:
            put(destination, machine.per_thread(machine.warp_bits(_everyone(machine, mask))), mask)

    return Compute(run)


@builds("elect")
def elect(machine: Machine, instruction: Instruction) -> Step:
    destination, predicate = _targets(machine, instruction.args[0])

    def run(mask: Mask) -> None:
        active = machine.warp_bits(_everyone(machine, mask))
        first = machine.per_thread(U32(31) - count_leading_zeros(active & (~active + U32(1))))
        if destination is not None:
            put(destination, first, mask)
        if predicate is not None:
            put(predicate, first == machine.lane, mask)

    return WarpStep(machine.source(instruction.args[1], "u32"), run)


@builds("redux")
def reduce(machine: Machine, instruction: Instruction) -> Step:
    _, sync, operation, *modifiers, kind = instruction.parts
    if sync != "sync" or modifiers not in ([], ["NaN"]) or (modifiers and kind != "f32"):
        raise machine.unsupported()
    if kind == "f32":
        extremes = (numpy.minimum, numpy.maximum) if modifiers else (numpy.fmin, numpy.fmax)
        function = dict(zip(("min", "max"), extremes, strict=True))[operation]
    else:
        function = {
            "add": numpy.add,
            "min": numpy.minimum,
            "max": numpy.maximum,
            "and": numpy.bitwise_and,
            "or": numpy.bitwise_or,
            "xor": numpy.bitwise_xor,
        }[operation]
    to, values, members = instruction.args
    source, destination = machine.source(values, kind), machine.destination(to, kind)

    def run(mask: Mask) -> None:
        active = _everyone(machine, mask)
        for warp in numpy.unique(machine.warp[active]):
            lanes = numpy.flatnonzero(active & (machine.warp == warp))
            if destination is not None:
                destination[lanes] = function.reduce(source[lanes], dtype=source.dtype)

    return WarpStep(machine.source(members, "u32"), run)


@builds("match")
def match(machine: Machine, instruction: Instruction) -> Step:
    _, mode, sync, kind = instruction.parts
    if sync != "sync" or mode not in ("any", "all"):
        raise machine.unsupported()
    destination, predicate = _targets(machine, instruction.args[0])
    values, members = machine.source(instruction.args[1], kind), machine.source(instruction.args[2], "u32")

    def run(mask: Mask) -> None:
        active = _everyone(machine, mask)
        for warp in numpy.unique(machine.warp[active]):
            threads = numpy.flatnonzero(active & (machine.warp == warp))
            equal = values[threads, None] == values[None, threads]
            lane_bits = U64(1) << machine.lane[threads].astype(U64)
            result = (equal * lane_bits[None, :]).sum(axis=1).astype(U32)
            if mode == "all":
                result = result * U32(equal.all())
            if destination is not None:
                destination[threads] = result
            if predicate is not None and mode == "all":
                predicate[threads] = equal.all()

    return WarpStep(members, run)
