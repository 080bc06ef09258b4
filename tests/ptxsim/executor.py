"""Runs the blocks of a launch: all threads at the smallest program counter at a time, until none is left."""

from itertools import product
from typing import Any

import numpy

from ptxsim.errors import BarrierError, PTXError, StepLimitError, TrapError
from ptxsim.machine import Machine
from ptxsim.steps import Barrier, Branch, Compute, Exit, Mask, Raise, WarpStep

_NEVER = 1 << 60


class _Meeting:
    """Threads that wait at one barrier of a block, by the place where they go on."""

    def __init__(self, counter: int) -> None:
        self.counter = counter
        self.groups: list[tuple[int, numpy.ndarray]] = []
        self.count: int | None = None
        self.finishes: list[Any] = []

    @property
    def n_threads(self) -> int:
        return sum(int(numpy.count_nonzero(threads)) for _, threads in self.groups)


class Executor:
    """Runs a machine's blocks, batch after batch.

    Attributes:
        counts: how many threads have reached each instruction.
        n_warp_instructions, most_instructions: as `Stats` has them.
    """

    def __init__(self, machine: Machine, max_steps: int) -> None:
        self._machine, self._max_steps = machine, max_steps * machine.n_blocks
        self.counts = [0] * len(machine.code)
        self.n_warp_instructions = self.most_instructions = 0

    def run(self, blocks: list[tuple[int, int, int]]) -> None:
        """Run these blocks, as many as the machine has, side by side."""
        machine = self._machine
        per_block = machine.n_threads // machine.n_blocks
        for axis, indices in zip(machine.block_index, zip(*blocks, strict=True), strict=True):
            axis[:] = numpy.repeat(numpy.array(indices, axis.dtype), per_block)
        machine.reset()
        self._live = numpy.ones(machine.n_threads, numpy.bool_)
        self._pending: dict[int, numpy.ndarray] = {0: self._live.copy()}
        self._parked: dict[int, numpy.ndarray] = {}
        self._meetings: dict[int, _Meeting] = {}
        self._run_lengths = numpy.zeros(machine.n_threads, numpy.int64)
        self._steps = 0
        while True:
            if not self._pending:
                self._release()
            if not self._pending:
                if self._live.any():
                    self._fail_for_deadlock()
                break
            self._run_group()
        self.most_instructions = max(self.most_instructions, int(self._run_lengths.max()))

    def _add(self, counter: int, threads: numpy.ndarray) -> None:
        """Let these threads go on from there."""
        waiting = self._pending.get(counter)
        self._pending[counter] = threads if waiting is None else waiting | threads

    def _run_group(self) -> None:
        """Run the threads at the smallest program counter until some of them part, wait, or meet others."""
        machine, code, counts = self._machine, self._machine.code, self.counts
        counter = min(self._pending)
        threads = self._pending.pop(counter)
        stop = min(self._pending, default=_NEVER)
        n_threads = int(numpy.count_nonzero(threads))
        mask: Mask = None if n_threads == machine.n_threads else threads
        n_warps = machine.n_warps if mask is None else int(numpy.count_nonzero(machine.warp_bits(threads)))
        n_run = 0
        while counter < stop:
            if counter >= len(code):
                raise PTXError(f"kernel {machine.body.name}: execution ran past the end of the code")
            step, guard = code[counter]
            counts[counter] += n_threads
            n_run += 1
            active, n_active = mask, n_threads
            if guard is not None:
                passed = ~guard[0] if guard[1] else guard[0]
                passed = passed if mask is None else passed & mask
                n_active = int(numpy.count_nonzero(passed))
                if n_active == 0:
                    counter += 1
                    continue
                if n_active < n_threads:
                    active = passed.copy() if passed is guard[0] else passed
            kind = type(step)
            if kind is Compute:
                step.run(active)
                counter += 1
            elif kind is Branch and n_active == n_threads:
                if step.target <= counter and self._steps + n_run > self._max_steps:
                    break
                counter = step.target
            elif kind is WarpStep and active is None:
                step.run(None)
                counter += 1
            else:
                self._count(threads, n_run, n_warps)
                self._part(counter, step, threads, threads if active is None else active)
                return
        self._count(threads, n_run, n_warps)
        if self._steps > self._max_steps:
            self._fail_for_steps(counter)
        self._add(counter, threads)

    def _count(self, threads: numpy.ndarray, n_run: int, n_warps: int) -> None:
        self._steps += n_run
        self.n_warp_instructions += n_run * n_warps
        self._run_lengths[threads] += n_run

    def _part(self, counter: int, step: Any, threads: numpy.ndarray, active: numpy.ndarray) -> None:
        """Some threads of the group take the step, the others go past it."""
        if isinstance(step, Raise):
            self._raise(step.error, active)
        if self._steps > self._max_steps:
            self._fail_for_steps(counter)
        others = threads & ~active
        if others.any():
            self._add(counter + 1, others)
        if isinstance(step, Branch):
            self._add(step.target, active)
        elif isinstance(step, Exit):
            self._live = self._live & ~active
        elif isinstance(step, Barrier):
            self._wait(counter, step, active)
        else:
            waiting = self._parked.pop(counter, None)
            self._run_warps(counter, step, active if waiting is None else active | waiting)

    def _raise(self, error: Exception, active: numpy.ndarray) -> None:
        if not isinstance(error, TrapError):
            raise error
        thread = int(numpy.argmax(active))
        machine = self._machine
        block, index = (tuple(int(axis[thread]) for axis in a) for a in (machine.block_index, machine.thread_index))
        raise TrapError(f"{error} (block {block}, thread {index})")

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _wait(self, counter: int, step: Barrier, active: numpy.ndarray) -> None:
        first = int(numpy.argmax(active))
        if (step.number[active] != step.number[first]).any():
            line = self._machine.body.code[counter].line
            raise NotImplementedError(
                f"kernel {self._machine.body.name}, PTX line {line}: the barrier's number differs between threads"
            )
        meeting = self._meetings.setdefault(int(step.number[first]), _Meeting(counter))
        meeting.groups.append((counter + 1, active.copy()))
        if step.count is not None:
            meeting.count = int(step.count[first])
        if step.finish is not None:
            meeting.finishes.append(step.finish)

    def _run_warps(self, counter: int, step: WarpStep, active: numpy.ndarray) -> None:
        """Run the warps all of whose live members have come; the others wait here."""
        machine = self._machine
        here, alive = (machine.per_thread(machine.warp_bits(threads)) for threads in (active, self._live))
        is_missed = active & ((step.members & alive & ~here) != 0)
        ready = active & ~machine.per_thread(machine.warp_bits(is_missed) != 0)
        if ready.any():
            step.run(ready)
            self._add(counter + 1, ready)
        waiting = active & ~ready
        if waiting.any():
            self._parked[counter] = waiting

    def _release(self) -> None:
        """Nothing else can run: let complete barriers and warps go on."""
        n_live = int(numpy.count_nonzero(self._live))
        for number, meeting in list(self._meetings.items()):
            if meeting.n_threads < (n_live if meeting.count is None else meeting.count):
                continue
            if len(set(map(id, meeting.finishes))) > 1:
                raise NotImplementedError(
                    f"kernel {self._machine.body.name}: one barrier's reduction is reached at several places"
                )
            if meeting.finishes:
                meeting.finishes[0](numpy.logical_or.reduce([threads for _, threads in meeting.groups]))
            for counter, threads in meeting.groups:
                self._add(counter, threads)
            del self._meetings[number]
        for counter in list(self._parked):
            step, _ = self._machine.code[counter]
            assert isinstance(step, WarpStep)
            self._run_warps(counter, step, self._parked.pop(counter))

    # -- failures --------------------------------------------------------------------------------------------------

    def _place(self) -> str:
        block = tuple(int(axis[0]) for axis in self._machine.block_index)
        return f"kernel {self._machine.body.name}, block {block}"

    def _fail_for_steps(self, counter: int) -> None:
        code = self._machine.body.code
        line = code[min(counter, len(code) - 1)].line
        raise StepLimitError(f"{self._place()}, PTX line {line}: more than {self._max_steps} steps")

    def _fail_for_deadlock(self) -> None:
        code = self._machine.body.code
        n_live = int(numpy.count_nonzero(self._live))
        waits = [
            f"{meeting.n_threads} of {n_live} live threads wait at barrier {number} "
            f"(PTX line {code[meeting.counter].line})"
            for number, meeting in self._meetings.items()
        ]
        waits += [
            f"{int(numpy.count_nonzero(threads))} threads wait for other lanes at PTX line {code[counter].line} "
            f"`{code[counter].text}`"
            for counter, threads in self._parked.items()
        ]
        raise BarrierError(f"{self._place()}: deadlock; {'; '.join(waits)}")


def blocks_of(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """The index of every block, x changing fastest."""
    return [(x, y, z) for z, y, x in product(*map(range, reversed(grid)))]
