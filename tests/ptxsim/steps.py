"""What an instruction becomes, and where what makes it of its text is registered."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy

if TYPE_CHECKING:
    from ptxsim.machine import Machine
    from ptxsim.program import Instruction

Mask = numpy.ndarray | None
"""Which threads take part; None means all, and is faster."""

Run = Callable[[Mask], None]


class Compute(NamedTuple):
    """Every thread goes on to the next instruction."""

    run: Run


class Branch(NamedTuple):
    target: int


class Exit(NamedTuple):
    pass


class Barrier(NamedTuple):
    """Threads wait for others of their block.

    Attributes:
        number, count: of each thread; the count is of threads, None for all that live.
        finish: run once with all that came, for a reduction.
    """

    number: numpy.ndarray
    count: numpy.ndarray | None
    finish: Callable[[numpy.ndarray], None] | None


class WarpStep(NamedTuple):
    """Lanes wait for the members of their warp's mask, then run together."""

    members: numpy.ndarray
    run: Run


class Raise(NamedTuple):
    error: Exception


Step = Compute | Branch | Exit | Barrier | WarpStep | Raise
Builder = Callable[["Machine", "Instruction"], Step]

BUILDERS: dict[str, Builder] = {}
"""By the first part of the opcode; ptxsim.instructions fills it."""


def builds(*names: str) -> Callable[[Builder], Builder]:
    """Register what builds the steps of these instructions."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register
